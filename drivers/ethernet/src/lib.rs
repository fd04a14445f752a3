//! A driver for Intel's 82576 (igb) and 82574L (e1000e) Ethernet cards, in user space and in safe Rust.
//!
//! It drives a [`Device`](vfio_remap::Device) that is bound to vfio-pci
//! ([`Vfio`](https://docs.rs/vfio-remap/latest/vfio_remap/transport/struct.Vfio.html)), one that a
//! vfio-user server emulates, or one in this process. This program sends back a frame that the latter has
//! received; with `Device::open("0000:00:05.0")?` it drives a card.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use vfio_remap::emulated::Emulated;
//! use vfio_remap::emulated::igb::{Igb, Port};
//! use vfio_remap::{Device, Result};
//! use vfio_remap_ethernet::{Nic, Settings};
//!
//! fn main() -> Result<()> {
//!     let (port, network) = Port::pair();
//!     let model = Igb::new([2, 0, 0, 0, 0, 1]).with_wire(port);
//!     let device = Device::new(Arc::new(Emulated::new(model)?));
//!
//!     let nic = Nic::new(device, Settings::default())?;
//!     println!("{} at {}: {}", nic.model(), nic.address(), nic.wait_for_link(Duration::from_secs(5))?);
//!
//!     // Buffers for the receive ring, and for frames that are elsewhere.
//!     let mut pool = nic.pool(1024)?;
//!     let mut queues = nic.queue()?;
//!     let mut frames = Vec::with_capacity(32);
//!     // The card is given buffers. Nothing has come yet.
//!     queues.receiver.receive(&mut pool, &mut frames, 32)?;
//!
//!     let mut hello = [0; 60];
//!     hello[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
//!     network.send(&hello);
//!
//!     // A burst comes, its frames are turned round, and go.
//!     assert!(queues.receiver.wait(Duration::from_secs(5))?);
//!     assert_eq!(queues.receiver.receive(&mut pool, &mut frames, 32)?, 1);
//!     for frame in &frames {
//!         let mut addresses = [0; 12];
//!         frame.read(0, &mut addresses);
//!         addresses.rotate_left(6);
//!         frame.buffer().write(0, &addresses);
//!     }
//!     queues.transmitter.transmit(&mut frames, &mut pool)?;
//!
//!     // Frames on their way are sent, and all buffers come back.
//!     queues.transmitter.stop(&mut pool)?;
//!     queues.receiver.stop(&mut pool)?;
//!     assert_eq!(pool.len(), 1024);
//!     assert_eq!(network.receive().expect("it was sent")[..6], [2, 0, 0, 0, 0, 2]);
//!     drop(pool);
//!     Ok(nic.close()?)
//! }
//! ```
//!
//! # Threads and queues
//!
//! Threads share a [`Nic`], and have a [`Receiver`] and a [`Transmitter`] each ([`Nic::queue`]), with a
//! register window of their own, and a [`Pool`] of buffers. Frames move in bursts: on their path nothing is
//! allocated, no system call is made, and no data is copied: a frame takes at most 80 instructions in either
//! direction (`tests/cost.rs` counts them). What a window does and does not keep apart is
//! said at [`Receiver::registers`].
//!
//! A queue is polled, or waited for: [`Receiver::wait`] polls for a while, then sleeps until the queue
//! interrupts ([`Settings::interrupts`]). A queue that is polled does not interrupt.
//!
//! With the feature `smoltcp`, a pair of queues is a device of that TCP/IP stack.
//!
//! # Buffers
//!
//! A buffer that the card may write to or read from is owned by the queue, and comes back when the card is
//! done with it, or when it has said that it no longer accesses the queue's memory. Memory of a queue that
//! could not be stopped is kept until the card was reset, and is never released before.
//!
//! # Where the facts are from
//!
//! Intel 82576EB Gigabit Ethernet Controller Datasheet, revision 2.63; Intel 82574 GbE Controller Family
//! Datasheet, revision 3.4. Sections are named at each item.

#![forbid(unsafe_code)]

mod address;
mod close_error;
mod context;
mod descriptors;
mod hardware;
mod interrupts;
mod model;
mod nic;
mod offload;
mod phy;
mod pool;
mod receive;
mod registers;
mod settings;
#[cfg(feature = "smoltcp")]
pub mod smoltcp;
mod statistics;
mod transmit;
mod wait;

pub use address::{MacAddress, NoMacAddress};
pub use close_error::CloseError;
pub use descriptors::{Checksum, Checksums};
pub use model::Model;
pub use nic::{Nic, QueuePair};
pub use phy::Link;
pub use pool::{Frame, Pool};
pub use receive::Receiver;
pub use settings::Settings;
pub use statistics::Statistics;
pub use transmit::Transmitter;
