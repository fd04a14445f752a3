//! Drivers for PCI devices in user space on Linux, in safe Rust: registers, DMA, interrupts, events and
//! reset. A mapped window of a BAR can be duplicated and relocated while the device runs.
//!
//! A program opens a [`Device`] through a [`Transport`] (Linux VFIO for real PCI devices), finds its
//! [`Region`]s, such as BARs, and maps [`Window`]s over them. An access to a [`Register`] in a window is
//! one load or store. [`Window::duplicate`] and [`Window::relocate`] give the crate its name. They report
//! which system call they used and why.
//!
//! ```
//! use std::sync::Arc;
//! use vfio_remap::{Device, Placement, Reservation, transport::MemoryDevice};
//!
//! // A device that is plain memory. For a real one: Device::open("0000:00:03.0")?
//! let device = Device::new(Arc::new(MemoryDevice::new(1 << 20)?));
//! let mut window = device.bar(0)?.map(0x1000..0x3000, Placement::Anywhere)?;
//! window.register::<u32>(0x10)?.write(1);
//!
//! // Give a thread its own window, which it drops when it ends.
//! let (doorbells, report) = window.duplicate(Placement::Anywhere)?;
//! println!("{report}");
//! let worker = std::thread::spawn(move || doorbells.register::<u32>(0x10).map(|reg| reg.read()));
//! assert_eq!(worker.join().expect("it does not panic")?, 1);
//!
//! // Move the window to an address in reserved address space.
//! let place = Reservation::new(window.addresses().len())?;
//! let wanted = place.range();
//! window.relocate(Placement::In(place))?;
//! assert_eq!(window.addresses(), wanted);
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! # Why duplicate or relocate a window
//! - A virtual machine monitor relocates a window when the guest moves the BAR of a device that is passed
//!   through.
//! - A driver gives each thread a duplicate of the registers that it needs.
//! - A driver hands a running device over: the new user gets a duplicate, and the old one drops its
//!   window later.
//! - The addresses of a window stay reserved after the device is gone, so that no other memory is mapped
//!   there.
//!
//! # What it needs
//! Root only for set-up: binding the device to vfio-pci, and giving its file to a user. The program then
//! runs as that user. Huge pages are not needed; DMA buffers are ordinary memory. Hardware is not needed
//! for a start: device models run in the same process (`emulated`), or in another one as vfio-user
//! servers.
//!
//! # Steps of a driver
//! In this order:
//!
//! 1. Bind the device to vfio-pci: [`PciDevice::bind_vfio_pci`](transport::PciDevice::bind_vfio_pci).
//!    This requires root, and can be part of the machine's set-up.
//! 2. Open it: [`Device::open`].
//! 3. Enable memory decoding: [`Config::set_memory_decoding`](device::Config::set_memory_decoding).
//!    Without it, an access through a window raises SIGBUS, and an access through the kernel fails with
//!    EIO.
//! 4. Enable bus mastering: [`Config::set_bus_mastering`](device::Config::set_bus_mastering). It is
//!    disabled when VFIO opens a device, and then DMA and MSI silently do nothing.
//! 5. Map windows: [`Device::bar`], [`Region::map`]. Get registers by [`Window::block`], if
//!    [`register_block!`] declares them by name, or by [`Window::register`].
//! 6. Map memory for DMA: [`Device::dma`], [`DmaSpace::buffer`](device::DmaSpace::buffer). For a device
//!    with fewer than 64 address bits, pass
//!    [`IovaPlacement::below_bits`](device::IovaPlacement::below_bits). Give the device the address
//!    [`DmaBuffer::iova`](device::DmaBuffer::iova), never an address of this process.
//!    For rings there is [`Descriptors`](device::Descriptors).
//! 7. Connect interrupts: [`Device::vectors`]. For devices without interrupts, [`poll_until`] waits.
//! 8. Watch for events: [`Device::events`]. The kernel reports errors, and requests that the device be
//!    released.
//! 9. At the end, stop the device, so that it does not access memory that is about to be unmapped: as its
//!    data sheet says, or by [`Device::reset`] if it supports reset.
//! 10. Drop windows, buffers, vectors and events, and call [`Device::close`], which names what is still
//!     in use.
//!
//! ```no_run
//! use std::time::Duration;
//! use vfio_remap::device::{BufferRequest, Interrupt, IovaPlacement};
//! use vfio_remap::transport::Sysfs;
//! use vfio_remap::{Device, PciAddress, Placement};
//!
//! let address: PciAddress = "0000:00:03.0".parse()?;
//! let _binding = Sysfs::default().device(address)?.bind_vfio_pci()?; // restored at the end
//! let device = Device::open(address)?;
//! device.config()?.set_memory_decoding(true)?;
//! device.config()?.set_bus_mastering(true)?;
//! let window = device.bar(0)?.map(.., Placement::Anywhere)?;
//! // This device has 28 address bits. Without a placement, memory gets an address above 4 GiB.
//! let request = BufferRequest::new(4096).placement(IovaPlacement::below_bits(28));
//! let buffer = device.dma()?.buffer_with(request)?;
//! let vectors = device.vectors(Interrupt::Msi, 1)?;
//! let events = device.events()?;
//!
//! // The driver: writes the address of the buffer and starts the device.
//! window.register::<u64>(0x80)?.write(buffer.iova().0);
//! window.register::<u32>(0x98)?.write(1);
//! assert_eq!(vectors.wait(0, Duration::from_secs(1))?, 1);
//!
//! assert!(device.reset()?.is_over());
//! drop((window, buffer, vectors, events));
//! device.close()?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! # When a device disappears
//! A card is pulled or falls asleep, a server ends, another process switches memory decoding off: an access
//! through a window then raises SIGBUS or reads all ones. A driver that survives this
//!
//! 1. installs [`FaultGuard`](space::FaultGuard) when it starts: a fault revokes the window instead of ending
//!    the process, and the access completes;
//! 2. asks when a value is suspicious, and not at each access: [`Register::try_read`] where all ones is not a
//!    value that the register has, [`Window::gone`] after a time limit, [`Device::gone`] from time to time;
//! 3. ends its requests with an error when the device is [gone](Device::gone). What is gone reaches no memory,
//!    so its buffers can be used again;
//! 4. lets go when [`Device::events`] reports [`Event::Release`](device::Event::Release), and closes the device;
//! 5. restores the windows ([`Device::restore`]) and initializes the device if it is back.
//!
//! ```
//! # use vfio_remap::{Device, Error, ErrorKind, Register, Result, Window};
//! /// The status of a device whose registers are never all ones.
//! fn status(window: &Window, register: &Register<u32>) -> Result<u32> {
//!     let value = register.try_read()?; // Revoked
//!     if value == u32::MAX && window.gone() {
//!         return Err(Error::new(ErrorKind::Gone, "read the status of", "the device"));
//!     }
//!     Ok(value)
//! }
//! ```
//!
//! The crate's own calls raise no fault: a reset, low power and switching memory decoding off revoke the windows
//! first. The example `unplug` shows all causes, the NVMe driver uses the pattern.
//!
//! # Layers
//! - [`device`]: what a driver uses.
//! - [`transport`]: how a device is reached: Linux VFIO, a vfio-user server, or an implementation of
//!   [`Transport`] of your own.
//! - `passthrough` (a feature): what a guest sees of a device that is passed through to it.
//! - [`space`]: address space, independent of devices: reservations, strategies, reports.
//!
//! # Errors
//! An [`Error`] says which operation failed on which object, the errno, the reason, and what to do. A
//! verb that takes a [`Placement`] returns a [`Failed`], which gives the reservation back. If a verb fails,
//! the window has not changed. A reservation is lost only with [`ErrorKind::ReservationLost`]: a failing call
//! may have unmapped it, and the crate leaves alone what is mapped there now.
//!
//! A wait that reaches its time limit fails with [`ErrorKind::TimedOut`].
//!
//! # Cargo features
//! - `vfio-user` (default): the client of vfio-user servers, `transport::VfioUser`.
//! - `emulated` (default; enables `vfio-user`): device models in this process, `emulated::Emulated`, and
//!   `emulated::Server`, which serves one to other processes.
//! - `passthrough`: the module `passthrough`, for virtual machine monitors: what a guest sees of a device.
//! - `vm-memory`: `DmaSpace::map_guest`, which maps all memory of a guest of the crate vm-memory for DMA.
//!
//! A driver for real devices needs none of them. In production, depend on the crate with
//! `default-features = false`: device models and the vfio-user server are then not built.
//!
//! # Public dependencies
//! Types and traits of these crates are part of this crate's interface, so a new major version of one is a
//! new major version of this crate: `zerocopy` 0.8 (the descriptors of [`Descriptors`](device::Descriptors)),
//! `bitfield-struct` 0.13 (what [`register_block!`] declares), and `vm-memory` 0.18 with the feature
//! `vm-memory`. [`zerocopy`] and `vm_memory` are re-exported, so that a driver names the version that this
//! crate has. A driver whose descriptors are structures of its own depends on zerocopy 0.8 with the feature
//! `derive`. Without it there are arrays and the types of [`zerocopy::little_endian`]:
//!
//! ```
//! use vfio_remap::Result;
//! use vfio_remap::device::{Descriptors, DmaSpace};
//! use vfio_remap::zerocopy::little_endian::U64;
//!
//! /// A ring of 16 descriptors: an address and a length each.
//! fn ring(space: &DmaSpace) -> Result<Descriptors<[U64; 2], u64>> {
//!     space.descriptors(16)
//! }
//! ```

#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(docsrs, doc(auto_cfg(hide(target_os = "linux", target_pointer_width = "64"))))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "vfio-remap needs Linux on a 64-bit machine: only Linux has VFIO, and large BARs need 64-bit addresses"
);

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod device;
#[cfg(all(target_os = "linux", target_pointer_width = "64", feature = "emulated"))]
pub mod emulated;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod error;
#[cfg(all(target_os = "linux", target_pointer_width = "64", feature = "passthrough"))]
pub mod passthrough;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod space;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod sys;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod transport;

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use device::{
    Device, IoRegister, IoRegisterBlock, Region, Register, RegisterArray, RegisterBlock, Window,
    poll_until, try_poll_until, try_poll_until_async,
};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use error::{Error, ErrorKind, Result};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use space::{Access, Failed, Placement, Relocation, Report, Reservation, Strategy};
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use transport::{PciAddress, Transport};

#[cfg(all(target_os = "linux", target_pointer_width = "64", feature = "vm-memory"))]
pub use vm_memory;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub use zerocopy;

/// Items that the expansion of [`register_block!`] uses.
#[doc(hidden)]
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub mod __register_block {
    pub use crate::device::register_layout::max_align;
    pub use bitfield_struct::bitfield;
}

/// Tests the code in the README with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
