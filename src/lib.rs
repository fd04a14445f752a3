//! Duplicate and relocate device MMIO windows in user space on Linux.

pub mod device;
mod error;
pub mod space;
mod sys;
pub mod transport;

pub use device::{Bar, Device, IoRegister, Register, Registers, Window};
pub use error::{Error, ErrorKind, Result};
pub use space::{Placement, Report, Reservation, Strategy};
pub use transport::{PciAddress, Transport};
