//! A driver for Intel's 82576 (igb) and 82574L (e1000e) Ethernet cards, in user space and in safe Rust.
//!
//! It drives a [`Device`](vfio_remap::Device) that is bound to vfio-pci
//! ([`Vfio`](https://docs.rs/vfio-remap/latest/vfio_remap/transport/struct.Vfio.html)), or one that a
//! vfio-user server emulates. This program receives frames, and sends each back to where it came from:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use vfio_remap::{Device, Result};
//! use vfio_remap_ethernet::{Nic, Settings};
//!
//! fn main() -> Result<()> {
//!     let nic = Nic::new(Device::open("0000:00:05.0")?, Settings::default())?;
//!     println!("{} at {}: {}", nic.model(), nic.address(), nic.wait_for_link(Duration::from_secs(5))?);
//!
//!     // Buffers for the receive ring, and for frames that are elsewhere.
//!     let mut pool = nic.pool(1024)?;
//!     let mut queues = nic.queue()?;
//!     let mut frames = Vec::with_capacity(32);
//!     let mut count = 0;
//!     while count < 1000 {
//!         queues.receiver.receive(&mut pool, &mut frames, 32)?;
//!         for frame in &frames {
//!             let mut header = [0; 12];
//!             frame.read(0, &mut header);
//!             header.rotate_left(6);
//!             frame.buffer().write(0, &header);
//!         }
//!         count += queues.transmitter.transmit(&mut frames, &mut pool)?;
//!     }
//!     queues.transmitter.stop(&mut pool)?;
//!     queues.receiver.stop(&mut pool)?;
//!     drop((frames, pool));
//!     Ok(nic.close()?)
//! }
//! ```
//!
//! # Threads and queues
//!
//! Threads share a [`Nic`], and have a [`Receiver`] and a [`Transmitter`] each ([`Nic::queue`]), with a
//! register window of their own, and a [`Pool`] of buffers. Frames move in bursts: on their path nothing is
//! allocated, no system call is made, and no data is copied. What a window does and does not keep apart is
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
