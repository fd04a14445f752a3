//! User-space access to device MMIO on Linux, where mapped windows can be duplicated and relocated.
//!
//! A program opens a [`Device`] through a [`Transport`] (Linux VFIO for real PCI devices), finds its
//! [`Bar`]s, and maps [`Window`]s over them. A [`Register`] in a window is one load or store. The verbs
//! that give the crate its name, [`Window::duplicate`] and [`Window::relocate`], rearrange windows
//! while the device runs, and report which way they took and why.
//!
//! ```
//! use std::sync::Arc;
//! use vfio_remap::{Device, Placement, Reservation, transport::MemoryDevice};
//!
//! // A real one, bound to vfio-pci, is opened by Device::open("0000:00:03.0".parse()?)
//! let device = Device::new(Arc::new(MemoryDevice::new(1 << 20)?));
//! let mut window = device.bar(0)?.map(0x1000..0x3000, Placement::Anywhere)?;
//! window.register::<u32>(0x10)?.write(1);
//!
//! // Hand a window to a thread that shall hold no more of the device than it needs.
//! let (doorbells, report) = window.duplicate(Placement::Anywhere)?;
//! println!("{report}");
//! let worker = std::thread::spawn(move || doorbells.register::<u32>(0x10).map(|reg| reg.read()));
//! assert_eq!(worker.join().expect("it does not panic")?, 1);
//!
//! // Take the window into address space of our own.
//! let place = Reservation::new(window.addresses().len())?;
//! let wanted = place.range();
//! window.relocate(Placement::In(place))?;
//! assert_eq!(window.addresses(), wanted);
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! # Layers
//! - [`device`]: what a driver holds.
//! - [`transport`]: the seam to a device. Linux VFIO is one side of it; implement [`Transport`] to
//!   bring another.
//! - [`space`]: address space with no notion of devices. Reservations, strategies, reports.
//!
//! # Errors
//! An [`Error`] says what was tried on which object, the errno, and what to do; an error of a verb that
//! takes a [`Placement`] is a [`space::Failed`], which gives a reservation back. When a verb fails,
//! nothing has changed.

pub mod device;
mod error;
pub mod space;
mod sys;
pub mod transport;

pub use device::{Bar, Device, IoRegister, Register, Registers, Window};
pub use error::{Error, ErrorKind, Result};
pub use space::{Placement, Report, Reservation, Strategy};
pub use transport::{PciAddress, Transport};

/// The README's code is tested with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
