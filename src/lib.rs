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
//! // A real one, bound to vfio-pci, is opened by Device::open("0000:00:03.0")
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
//! # Bringing a device up
//! In this order; each step says what it needs.
//!
//! 1. Bind it to vfio-pci: [`PciDevice::bind_vfio_pci`](transport::PciDevice::bind_vfio_pci), as root, or
//!    whoever sets the machine up.
//! 2. Open it: [`Device::open`].
//! 3. Memory decoding on: [`Config::set_memory_decoding`](device::Config::set_memory_decoding). Without it, an
//!    access through a window is a SIGBUS, and one through the kernel an error (EIO).
//! 4. Bus mastering on: [`Config::set_bus_mastering`](device::Config::set_bus_mastering). VFIO opens a device
//!    with it off, and then DMA and MSI silently do nothing.
//! 5. Windows and registers: [`Device::bar`], [`Bar::map`], and [`Window::block`] for the registers that
//!    [`register_block!`] declares by name, or [`Window::register`] for one of them.
//! 6. Memory that the device reaches: [`Device::dma`], [`DmaSpace::buffer`](device::DmaSpace::buffer). The
//!    device is told of [`DmaBuffer::iova`](device::DmaBuffer::iova), never of an address of this process.
//!    Rings are [`Descriptors`](device::Descriptors).
//! 7. Interrupts: [`Device::vectors`]; [`poll_until`] waits for devices without.
//! 8. Events: [`Device::events`], by which the kernel asks for the device back, or tells of an error.
//! 9. When all is done, have the device stop, so that it reaches for no memory that is about to go: as its
//!    data sheet says, or by [`Device::reset`], where it has a reset.
//! 10. Drop what was made, and [`Device::close`], which names what was forgotten.
//!
//! ```no_run
//! use std::time::Duration;
//! use vfio_remap::device::Interrupt;
//! use vfio_remap::transport::Sysfs;
//! use vfio_remap::{Device, PciAddress, Placement};
//!
//! let address: PciAddress = "0000:00:03.0".parse()?;
//! let _binding = Sysfs::default().device(address)?.bind_vfio_pci()?; // restored at the end
//! let device = Device::open(address)?;
//! device.config()?.set_memory_decoding(true)?;
//! device.config()?.set_bus_mastering(true)?;
//! let window = device.bar(0)?.map(.., Placement::Anywhere)?;
//! let buffer = device.dma()?.buffer(4096)?;
//! let vectors = device.vectors(Interrupt::Msi, 1)?;
//! let events = device.events()?;
//!
//! // Here the driver: where its device takes the address of its memory, and what makes it begin.
//! window.register::<u64>(0x80)?.write(buffer.iova().0);
//! window.register::<u32>(0x98)?.write(1);
//! assert_eq!(vectors.wait(0, Duration::from_secs(1))?, 1);
//!
//! device.reset()?;
//! drop((window, buffer, vectors, events));
//! device.close()?;
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
//!
//! # Cargo features
//! - `vfio-user` (default): the client of vfio-user servers, `transport::VfioUser`.
//! - `emulated` (default; brings `vfio-user`): device models in this process, `emulated::Emulated`, and
//!   `emulated::Server`, which offers one to others.
//! - `vm-memory`: a guest's memory, of the crate vm-memory, mapped for DMA as a whole,
//!   `DmaSpace::map_guest`.
//!
//! A driver for devices of this machine needs none of them.

#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(docsrs, doc(auto_cfg(hide(target_os = "linux", target_pointer_width = "64"))))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "vfio-remap needs Linux on a 64-bit machine: VFIO is Linux's, and BARs of GiB need addresses"
);

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod device;
#[cfg(all(target_os = "linux", target_pointer_width = "64", feature = "emulated"))]
pub mod emulated;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod error;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod space;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod sys;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod transport;

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use device::{
    Bar, Device, IoRegister, IoRegisterBlock, Register, RegisterBlock, Registers, Window,
    poll_until, poll_until_async, try_poll_until,
};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use error::{Error, ErrorKind, Result};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use space::{Placement, Report, Reservation, Strategy};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use transport::{PciAddress, Transport};

/// What [`register_block!`] refers to by path.
#[doc(hidden)]
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod __register_block {
    pub use crate::device::register_layout::max_align;
    pub use bitfield_struct::bitfield;
}

/// The README's code is tested with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
