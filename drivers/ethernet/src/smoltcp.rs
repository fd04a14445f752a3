//! A pair of queues as a device of [smoltcp](https://docs.rs/smoltcp), a TCP/IP stack: TCP, UDP, ICMP, DHCP
//! and DNS.
//!
//! ```no_run
//! # use smoltcp::iface::{Config, Interface, SocketSet};
//! # use smoltcp::time::Instant;
//! # use std::time::Duration;
//! use vfio_remap_ethernet::smoltcp::StackDevice;
//! use vfio_remap_ethernet::{Nic, Settings};
//!
//! # fn run(device: vfio_remap::Device) -> vfio_remap::Result<()> {
//! let nic = Nic::new(device, Settings::DEFAULT.with_interrupts(true))?;
//! let mut device = StackDevice::new(nic.queue()?)?;
//! let config = Config::new(device.hardware_address().into());
//! let mut interface = Interface::new(config, &mut device, Instant::now());
//! let mut sockets = SocketSet::new(Vec::new());
//! loop {
//!     interface.poll(Instant::now(), &mut device, &mut sockets);
//!     // Sends what the stack has to say, and sleeps until something comes, or until the stack wants to go on.
//!     let delay = interface.poll_delay(Instant::now(), &sockets);
//!     device.wait(delay.map_or(Duration::from_secs(1), Into::into))?;
//! }
//! # }
//! ```
//!
//! # Copies
//!
//! smoltcp's tokens are slices, and there are no slices of memory that a card writes at any time. Each frame
//! is therefore copied once in each direction; [`StackDevice::counts`] counts the bytes.
//!
//! # Checksums
//!
//! Those of TCP are the card's, in both directions. A frame with a wrong one is dropped. One that the card has
//! not looked at is looked at here, and dropped if it is a fragment. All other checksums are smoltcp's: that of
//! UDP may cover several fragments, which the cards do not put together.

use std::time::Duration;

use smoltcp::phy::{self, Checksum as Checked, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::EthernetAddress;
use vfio_remap::{Error, Result};

use super::descriptors::Checksum;
use super::nic::QueuePair;
use super::offload::{checksums_of_tcp, tcp_is_right};
use super::pool::{Frame, Pool};

/// Frames that are received, and sent, at a time.
const BURST: usize = 32;

/// What has gone through a [`StackDevice`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Frames that were given to the stack.
    pub received: u64,
    /// Bytes of those, which were copied.
    pub received_bytes: u64,
    /// Frames that were not, for their checksum or their VLAN.
    pub dropped: u64,
    /// Frames that came from the stack.
    pub sent: u64,
    /// Bytes of those, which were copied.
    pub sent_bytes: u64,
}

/// A pair of queues with buffers of its own, as a [`Device`](phy::Device) of smoltcp.
///
/// What the stack sends is given to the card a burst at a time: by [`flush`](Self::flush),
/// [`wait`](Self::wait), and when the stack is polled again.
pub struct StackDevice {
    queues: QueuePair,
    pool: Pool,
    /// Frames that have come; the next is the last.
    incoming: Vec<Frame>,
    outgoing: Outgoing,
    /// The frame that the stack looks at.
    current: Vec<u8>,
    vlan: Option<u16>,
    counts: Counts,
    failed: Option<Error>,
}

/// Frames that the stack has sent.
struct Outgoing {
    frames: Vec<Frame>,
    /// Buffers for the next.
    spare: Vec<Frame>,
    /// The frame that the stack writes.
    current: Vec<u8>,
    vlan: Option<u16>,
    sent: u64,
    sent_bytes: u64,
}

impl StackDevice {
    /// A pair of queues, with as many buffers as it has descriptors, and some.
    ///
    /// # Errors
    /// As [`Nic::pool`](super::Nic::pool).
    pub fn new(queues: QueuePair) -> Result<Self> {
        let nic = queues.receiver.nic().clone();
        let settings = nic.settings();
        let entries =
            usize::from(settings.receive_entries) + usize::from(settings.transmit_entries);
        let pool = nic.pool(entries + 2 * BURST)?;
        let longest = nic.longest_frame();
        let outgoing = Outgoing {
            frames: Vec::with_capacity(BURST),
            spare: Vec::with_capacity(BURST),
            current: vec![0; longest],
            vlan: None,
            sent: 0,
            sent_bytes: 0,
        };
        let mut device = Self {
            queues,
            pool,
            incoming: Vec::with_capacity(BURST),
            outgoing,
            current: vec![0; longest],
            vlan: None,
            counts: Counts::default(),
            failed: None,
        };
        // The card has buffers from now on.
        device.fetch();
        device.check()?;
        Ok(device)
    }

    /// The card's address, as smoltcp has it.
    pub fn hardware_address(&self) -> EthernetAddress {
        EthernetAddress(self.queues.receiver.nic().address().0)
    }

    /// Is in this VLAN (IEEE 802.1Q): frames with its identifier are received, and sent; at first in none, and
    /// frames with a tag are dropped.
    pub fn set_vlan(&mut self, vlan: Option<u16>) {
        self.vlan = vlan;
        self.outgoing.vlan = vlan;
    }

    /// The queues.
    pub fn queues(&self) -> &QueuePair {
        &self.queues
    }

    /// What has gone through.
    pub fn counts(&self) -> Counts {
        let Outgoing { sent, sent_bytes, .. } = self.outgoing;
        Counts { sent, sent_bytes, ..self.counts }
    }

    /// What has failed while the stack was polled, which has no way to say so.
    ///
    /// # Errors
    /// That.
    pub fn check(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Gives the card what the stack has sent.
    ///
    /// # Errors
    /// What the transport answers, also to what the stack had the device do before.
    pub fn flush(&mut self) -> Result<()> {
        self.send();
        self.check()
    }

    /// [Flushes](Self::flush), then waits until something has come for the stack, and whether it has in time.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        self.flush()?;
        // Sees whether the card goes on sending: the stack may have nothing to send for a while.
        self.queues.transmitter.reclaim(&mut self.pool);
        Ok(!self.incoming.is_empty() || self.queues.receiver.wait(timeout)?)
    }

    /// The queues and the pool, with the buffers that are not the card's. What the card has not taken of what the
    /// stack has sent, and what the stack has not looked at, is lost: [`flush`](Self::flush) first.
    pub fn into_parts(self) -> (QueuePair, Pool) {
        let Self { queues, mut pool, incoming, outgoing, .. } = self;
        pool.take_back(incoming);
        pool.take_back(outgoing.frames);
        pool.take_back(outgoing.spare);
        (queues, pool)
    }

    /// Stops the queues, after what the stack has sent is sent.
    ///
    /// # Errors
    /// As [`Receiver::stop`](super::Receiver::stop).
    pub fn stop(mut self) -> Result<()> {
        let flushed = self.flush();
        let (QueuePair { receiver, transmitter }, mut pool) = self.into_parts();
        let sent = transmitter.stop(&mut pool).map(drop);
        receiver.stop(&mut pool)?;
        flushed.and(sent)
    }

    fn send(&mut self) {
        let Self { queues, pool, outgoing, .. } = self;
        if !outgoing.frames.is_empty() {
            let sent = queues.transmitter.transmit(&mut outgoing.frames, pool);
            self.failed = sent.err().or(self.failed.take());
        }
    }

    /// Looks whether something has come.
    fn fetch(&mut self) {
        let Self { queues, pool, incoming, .. } = self;
        let received = queues.receiver.receive(pool, incoming, BURST);
        incoming.reverse();
        self.failed = received.err().or(self.failed.take());
    }

    /// Has a buffer for the stack to send by, if there is room for its frame.
    fn prepare(&mut self) -> bool {
        if self.outgoing.frames.len() >= BURST {
            self.send();
        }
        if self.outgoing.frames.len() >= BURST {
            return false;
        }
        if self.outgoing.spare.is_empty() {
            self.queues.transmitter.reclaim(&mut self.pool);
            self.outgoing.spare.extend(self.pool.frame(0));
        }
        !self.outgoing.spare.is_empty()
    }

    /// Copies the next frame that is the stack's; its length.
    fn next_frame(&mut self) -> Option<usize> {
        loop {
            if self.incoming.is_empty() {
                self.fetch();
            }
            let frame = self.incoming.pop()?;
            let len = frame.read(0, &mut self.current);
            let is_ours = frame.vlan().map(|tag| tag & 0xfff) == self.vlan;
            let bytes = &self.current[..len];
            let is_right = match frame.checksums().transport {
                Checksum::Good => true,
                // It may be UDP: smoltcp looks for itself.
                Checksum::Wrong | Checksum::Unchecked => tcp_is_right(bytes) != Some(false),
            };
            self.pool.reclaim(frame);
            if is_ours && is_right {
                self.counts.received += 1;
                self.counts.received_bytes += len as u64;
                return Some(len);
            }
            self.counts.dropped += 1;
        }
    }
}

impl phy::Device for StackDevice {
    type RxToken<'a> = ReceiveToken<'a>;
    type TxToken<'a> = TransmitToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(ReceiveToken<'_>, TransmitToken<'_>)> {
        // The stack may answer at once.
        if !self.prepare() {
            return None;
        }
        let Some(len) = self.next_frame() else {
            // Nothing more comes for now: what was answered goes.
            self.send();
            return None;
        };
        let Self { outgoing, current, .. } = self;
        Some((ReceiveToken { frame: &current[..len] }, TransmitToken { outgoing }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TransmitToken<'_>> {
        self.prepare().then_some(TransmitToken { outgoing: &mut self.outgoing })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        // With the header of Ethernet.
        capabilities.max_transmission_unit = self.queues.receiver.nic().settings().mtu + 14;
        capabilities.checksum.tcp = Checked::None;
        capabilities
    }
}

/// A frame that has come.
pub struct ReceiveToken<'d> {
    frame: &'d [u8],
}

impl phy::RxToken for ReceiveToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.frame)
    }
}

/// Room for a frame to send.
pub struct TransmitToken<'d> {
    outgoing: &'d mut Outgoing,
}

impl phy::TxToken for TransmitToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Outgoing { frames, spare, current, vlan, sent, sent_bytes } = self.outgoing;
        if current.len() < len {
            current.resize(len, 0);
        }
        let bytes = &mut current[..len];
        bytes.fill(0);
        let result = f(bytes);
        let request = checksums_of_tcp(bytes);
        // There is one, as the token says, and a frame that is longer than its buffer is none of ours.
        if let Some(mut frame) = spare.pop().filter(|frame| len <= frame.buffer().size()) {
            frame.buffer().write(0, bytes);
            frame.0.len = len as u32;
            frame.0.request = request.unwrap_or_default();
            frame.set_vlan(*vlan);
            frames.push(frame);
            *sent += 1;
            *sent_bytes += len as u64;
        }
        result
    }
}
