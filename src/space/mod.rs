//! Address space, with no notion of devices: reservations, mappings, and the ladder of strategies by
//! which a mapping is duplicated or relocated.
//!
//! `unsafe` is here because ranges of address space are owned by convention only. The convention: a
//! [`Reservation`] owns its range, a mapping owns its own, and only the owner of a range replaces it.

mod backing;
#[cfg(test)]
mod failed_calls;
#[cfg(test)]
mod fixture;
mod hazard;
mod kernel;
mod ladder;
mod limits;
mod mapping;
mod memory;
mod placement;
mod report;
mod reservation;

pub(crate) use backing::Backing;
pub use backing::BackingKind;
pub use hazard::Hazard;
pub use kernel::KernelVersion;
pub use ladder::Relocation;
pub(crate) use limits::out_of_memory;
pub(crate) use mapping::Mapping;
pub use memory::DmaMemory;
pub use placement::{Failed, Placement, Request, Strategy};
pub use report::{Attempt, Attempts, Outcome, Report, Source, Verb};
pub use reservation::Reservation;

pub use crate::sys::mm::Access;
