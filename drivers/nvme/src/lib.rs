//! A driver for NVMe controllers (NVM Express Base 1.0 to 2.0), in user space and in safe Rust.
//!
//! It works with any [`Device`](vfio_remap::Device) that is an NVMe controller: one that is bound to vfio-pci
//! ([`Vfio`](https://docs.rs/vfio-remap/latest/vfio_remap/transport/struct.Vfio.html)), one of a vfio-user
//! server, or one that is emulated in this process. This program reads a block of an emulated one.
//!
//! ```
//! use std::sync::Arc;
//!
//! use vfio_remap::emulated::{Emulated, Nvme, nvme};
//! use vfio_remap::{Device, Result};
//! use vfio_remap_nvme::{Controller, Settings};
//!
//! fn main() -> Result<()> {
//!     // A controller with one namespace of 1 MiB, in blocks of 4 KiB.
//!     let model = Nvme::new(vec![nvme::Namespace::memory(1 << 20, 4096)?]);
//!     let device = Device::new(Arc::new(Emulated::new(model)?));
//!
//!     let controller = Controller::new(device, Settings::default())?;
//!     let namespace = controller.namespace(1)?;
//!     let mut queue = controller.queue()?;
//!
//!     // The controller owns the buffer until the command completes. The completion returns it.
//!     let buffer = controller.buffer(namespace.block_size())?;
//!     queue.read(&namespace, 7, buffer, 0)?;
//!     let completion = queue.wait().expect("a command is outstanding");
//!     completion.status.check("read", || "block 7".to_owned())?;
//!     let buffer = completion.buffer.expect("the command has succeeded");
//!
//!     let mut block = vec![0xff; namespace.block_size()];
//!     buffer.read(0, &mut block);
//!     assert!(block.iter().all(|byte| *byte == 0));
//!
//!     drop((queue, buffer));
//!     Ok(controller.close()?)
//! }
//! ```
//!
//! A real controller is one that is bound to vfio-pci:
//!
//! ```no_run
//! # use vfio_remap::Device;
//! # use vfio_remap_nvme::{Controller, Settings};
//! let controller = Controller::new(Device::open("0000:00:03.0")?, Settings::default())?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```
//!
//! # Threads and queues
//!
//! Threads share a [`Controller`]. Each has its own [`IoQueue`] with its own doorbell window. A command needs
//! no allocation, no system call and no copy of data: reading or writing 4 KiB takes some 140 instructions.
//! [`IoQueue::wait`] polls, or sleeps until an interrupt ([`Settings::interrupts`]) after it has polled as long as that
//! is likely to pay ([`Settings::spin`]).
//!
//! # Errors
//!
//! An overdue command is aborted. A controller that has failed, or posts a malformed completion, is reset. Each
//! command completes in bounded time, with its buffer unless the controller may still reach that.
//! [`Controller::generation`] counts resets: a reset may lose data that was written but not flushed. The driver
//! does not trust anything that a controller sends.
//!
//! # What it does not do
//!
//! Metadata and protection information, scatter-gather lists, fused commands, and command sets other than NVM.
//! Namespaces and controllers that need them are `Unsupported`.
//!
//! Shadow doorbells (NVMe Base 1.4 §7.13, Doorbell Buffer Config). Emulated controllers offer them to save writes of
//! doorbells, each of which leaves the guest. They were tried with QEMU's: no gain with one command at a time, and
//! 0.40 to 0.86 times the IOPS with 32, because this driver already rings once for a batch. The load of the
//! controller's event index would need a full barrier after each batch. They are meant for emulated controllers;
//! hardware typically does not have them (NVMe Base 1.4 §5.7).

#![forbid(unsafe_code)]

mod admin;
mod bring_up;
mod command;
mod controller;
mod doorbells;
mod events;
mod identify;
mod log_page;
mod pair;
mod prp;
mod queue;
mod registers;
mod request;
mod settings;
mod spin;
mod status;

pub use controller::Controller;
pub use events::AsyncEvent;
pub use identify::{Identity, Namespace};
pub use log_page::{ErrorEntry, Health};
pub use pair::{Completion, SubmitError};
pub use queue::IoQueue;
pub use settings::Settings;
pub use status::Status;
