//! Devices in other processes, by the vfio-user protocol: the client.

mod bars;
mod client;
mod connection;
mod interrupts;
mod limits;
pub(crate) mod protocol;
mod regions;
mod serving;

pub use client::VfioUser;
pub use limits::TimeLimits;
