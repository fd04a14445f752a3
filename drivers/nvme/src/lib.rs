//! A driver for NVMe controllers (NVM Express Base 1.0 to 2.0), in user space and in safe Rust.
//!
//! It drives any [`Device`](vfio_remap::Device) that is an NVMe controller: one that is bound to vfio-pci
//! ([`Vfio`](https://docs.rs/vfio-remap/latest/vfio_remap/transport/struct.Vfio.html)), one that a
//! vfio-user server emulates, or one in this process. This program reads a block of the latter; with
//! `Vfio::open("0000:00:03.0")?` in the place of `Emulated::new(model)?` it reads one of a disk.
//!
//! ```
//! use std::sync::Arc;
//!
//! use vfio_remap::emulated::{self, Emulated, Nvme};
//! use vfio_remap::{Device, Result};
//! use vfio_remap_nvme::{Controller, Settings};
//!
//! fn main() -> Result<()> {
//!     // A controller with one namespace of 1 MiB, in blocks of 4 KiB.
//!     let model = Nvme::new(vec![emulated::Namespace::memory(1 << 20, 4096)?]);
//!     let device = Device::new(Arc::new(Emulated::new(model)?));
//!
//!     let controller = Controller::new(device, Settings::default())?;
//!     let namespace = controller.namespace(1)?;
//!     let mut queue = controller.queue()?;
//!
//!     // The buffer is the controller's until the command is done, and comes back with it.
//!     let buffer = controller.buffer(namespace.block_size())?;
//!     queue.read(&namespace, 7, buffer, 0)?;
//!     let done = queue.wait().expect("a command is outstanding");
//!     done.status.check("read", || "block 7".to_owned())?;
//!     let buffer = done.buffer.expect("the command has succeeded");
//!
//!     let mut block = vec![0xff; namespace.block_size()];
//!     buffer.read(0, &mut block);
//!     assert!(block.iter().all(|byte| *byte == 0));
//!
//!     drop((queue, buffer));
//!     controller.close()
//! }
//! ```
//!
//! # Threads and queues
//!
//! Threads share a [`Controller`], and have an [`IoQueue`] each, with a doorbell window of its own. On the
//! path of a request nothing is allocated, no system call is made, and no data is copied: 4 KiB are read
//! by some two hundred instructions. [`IoQueue::wait`] polls, or sleeps until an interrupt
//! ([`Settings::interrupts`]).
//!
//! # When something goes wrong
//!
//! A command that is late is aborted; a controller that has failed, or answers nonsense, is reset. Each
//! request comes back in bounded time, with its buffer unless the controller may still reach that.
//! [`Controller::generation`] counts resets: what was written and not flushed before one may be lost.
//! Nothing that a controller answers is trusted.
//!
//! # What it does not do
//!
//! Metadata and protection information, scatter-gather lists, fused commands, and command sets other
//! than NVM. Namespaces and controllers that need them are refused by name.

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
mod queue;
mod registers;
mod request;
mod status;

pub use controller::{Controller, Settings};
pub use events::AsyncEvent;
pub use identify::{Identity, Namespace};
pub use log_page::{ErrorEntry, Health};
pub use pair::{Done, Refused};
pub use queue::IoQueue;
pub use status::Status;
