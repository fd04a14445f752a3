//! Address space, independent of devices: reservations, mappings, and the strategies that duplicate and
//! relocate a mapping.
//!
//! `unsafe` is allowed here because ranges of address space are owned by convention only. The convention: a
//! [`Reservation`] and a mapping each own their range, and only the owner of a range replaces it.

mod backing;
mod cover;
mod destination;
#[cfg(test)]
mod failed_calls;
#[cfg(test)]
mod fixture;
mod hazard;
mod kernel;
mod limits;
mod mapping;
mod memory;
mod placement;
mod report;
mod reservation;
mod revocation;
#[cfg(feature = "emulated")]
mod shared;
mod strategies;

pub(crate) use backing::Backing;
pub use backing::BackingKind;
pub use hazard::Hazard;
pub use kernel::KernelVersion;
pub(crate) use limits::out_of_memory;
pub(crate) use mapping::Mapping;
pub use memory::DmaMemory;
pub use placement::{Failed, Placement, Request, Strategy};
pub use report::{Attempt, Attempts, Outcome, Report, Source, Verb};
pub use reservation::{Reservation, ReservationPool};
pub(crate) use revocation::{Control, Group, Reasons};
pub use revocation::{
    FaultGuard, FaultScope, StateReport, WindowState, revocable_size, set_revocable_size,
};
pub use strategies::Relocation;

pub use crate::sys::mm::Access;
