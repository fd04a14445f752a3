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
//! Buffers are for the cards of one address space: see [`Pool`].
//!
//! # When something goes wrong
//!
//! | what | noticed | what follows |
//! |---|---|---|
//! | an interrupt is lost | [`Receiver::wait`] and [`Transmitter::wait`] look every 50 ms | no frame is lost |
//! | the card sends nothing, although it has a link | [`Settings::timeout`] after [`Transmitter::reclaim`], a [`transmit`](Transmitter::transmit) without room, or a wait has first found nothing sent, when one of them is called again; while waiting 50 ms later | the card is reset; frames that it had are counted as [lost](Transmitter::lost) |
//! | somebody resets the card | waiting within 50 ms; polling after 64 looks in vain, once in 50 ms; when a queue is [taken](Nic::queue) | it is brought up again; frames that have come are received |
//! | the card is removed | as a reset | `Gone`, until [`Nic::reset`] finds the card back |
//! | the link is down | [`Nic::wait_for_link_change`] | frames wait for it |
//!
//! To bring a card up, or up again, takes some 20 ms, and at most ten seconds beside the kernel's reset of the
//! function; a queue stops within a second. No call waits longer than that, or than it is told to.
//!
//! # Where the facts are from
//!
//! Intel 82576EB Gigabit Ethernet Controller Datasheet, revision 2.63; Intel 82574 GbE Controller Family
//! Datasheet, revision 3.4. Sections are named at each item.

#![forbid(unsafe_code)]

mod address;
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
pub use descriptors::{Checksum, Checksums};
pub use model::Model;
pub use nic::{Nic, QueuePair};
pub use phy::Link;
pub use pool::{Frame, Pool};
pub use receive::Receiver;
pub use settings::Settings;
pub use statistics::Statistics;
pub use transmit::Transmitter;
