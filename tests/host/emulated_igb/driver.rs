//! A driver of the smallest sort for the 82576's model, polled by hand.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::emulated::{Activity, Emulated};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{Transport, irq_index};
use vfio_remap::{Device, Placement, Window};

use crate::support::{edu, shared};

pub const MAC: [u8; 6] = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
pub const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// Where things lie in the driver's memory, which the device sees from `IOVA` on.
pub const IOVA: u64 = 0x10_0000;
pub const SIZE: usize = 0x40_0000;
const RINGS: usize = 0x4000;
const DATA: usize = 0x10_0000;
/// A buffer for each descriptor, 16 KiB.
pub const BUFFER: usize = 0x4000;
pub const ENTRIES: u32 = 64;
/// The bytes of a ring.
const RING: usize = 16 * ENTRIES as usize;

pub const CTRL: u64 = 0x0;
pub const STATUS: u64 = 0x8;
pub const RCTL: u64 = 0x100;
pub const TCTL: u64 = 0x400;
pub const RXCSUM: u64 = 0x5000;

/// Enabled, short frames padded.
pub const TCTL_VALUE: u32 = 0x0004_00fa;
/// Enabled, long frames, broadcast, check sequence stripped.
pub const RCTL_VALUE: u32 = 0x0400_8022;

pub struct Driver {
    pub card: Emulated,
    pub memory: DmaMemory,
    pub receive_page: Window,
    pub transmit_page: Window,
    tails: [u32; 16],
    heads: [u32; 16],
}

/// What a receive descriptor says.
#[derive(Debug)]
pub struct Received {
    pub words: [u32; 4],
    pub data: Vec<u8>,
}

impl Received {
    pub fn status(&self) -> u32 {
        self.words[2]
    }

    pub fn tag(&self) -> u16 {
        (self.words[3] >> 16) as u16
    }
}

impl Driver {
    /// A card, and the other end of its cable.
    pub fn new() -> (Self, Port) {
        let (port, network) = Port::pair();
        let card = Emulated::polled(Igb::new(MAC).with_wire(port)).unwrap();
        (Self::of(card), network)
    }

    pub fn of(card: Emulated) -> Self {
        let memory = shared::memory(SIZE, false);
        card.dma_map(IOVA, &memory, Access::ReadWrite).unwrap();
        let device = Device::new(Arc::new(card.clone()));
        let page = |at: u64| device.bar(0).unwrap().map(at..at + 0x1000, Placement::Anywhere);
        let (receive_page, transmit_page) = (page(0xc000).unwrap(), page(0xe000).unwrap());
        let (tails, heads) = ([0; 16], [0; 16]);
        let driver = Self { card, memory, receive_page, transmit_page, tails, heads };
        driver.start();
        driver
    }

    /// Bus mastering, link, both directions; no queue but what the reset has left.
    pub fn start(&self) {
        self.card.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
        self.write(CTRL, 0x41);
        self.write(TCTL, TCTL_VALUE);
        self.write(RCTL, RCTL_VALUE);
        self.poll();
    }

    pub fn read(&self, offset: u64) -> u32 {
        edu::read(&self.card, offset)
    }

    pub fn write(&self, offset: u64, value: u32) {
        edu::write(&self.card, offset, value);
    }

    /// Until nothing is left to do.
    pub fn poll(&self) {
        for _ in 0..10_000 {
            if self.card.poll().unwrap() != Activity::Busy {
                return;
            }
        }
        panic!("the card never comes to rest");
    }

    /// Sets up a transmit queue, through its mapped page.
    pub fn transmit_queue(&mut self, queue: usize) {
        let page = &self.transmit_page;
        let register = |offset: usize| page.register::<u32>(0x40 * queue + offset).unwrap();
        let base = IOVA + (RING * queue) as u64;
        register(0x28).write(0);
        register(0x00).write(base as u32);
        register(0x04).write((base >> 32) as u32);
        register(0x08).write(16 * ENTRIES);
        register(0x10).write(0);
        register(0x18).write(0);
        register(0x28).write(1 << 25);
        self.tails[queue] = 0;
    }

    /// Sets up a receive queue with a buffer of `kib` KiB for each descriptor but one; type 1 is advanced.
    pub fn receive_queue(&mut self, queue: usize, kind: u32, kib: u32) {
        let page = &self.receive_page;
        let register = |offset: usize| page.register::<u32>(0x40 * queue + offset).unwrap();
        let base = IOVA + (RINGS + RING * queue) as u64;
        register(0x28).write(0);
        for index in 0..ENTRIES as usize {
            self.give(queue, index);
        }
        register(0x00).write(base as u32);
        register(0x04).write((base >> 32) as u32);
        register(0x08).write(16 * ENTRIES);
        register(0x0c).write(kind << 25 | kib);
        register(0x10).write(0);
        register(0x28).write(1 << 25);
        register(0x18).write(ENTRIES - 1);
        self.heads[queue] = 0;
    }

    /// Puts the buffer of a receive descriptor into it.
    pub fn give(&self, queue: usize, index: usize) {
        let buffer = IOVA + (DATA + BUFFER * index) as u64;
        let words = [buffer as u32, (buffer >> 32) as u32, 0, 0];
        let at = RINGS + RING * queue + 16 * index;
        shared::put(&self.memory, at, words.map(u32::to_le_bytes).as_flattened());
    }

    /// A buffer's address, and its place in memory.
    pub fn buffer(&self, index: usize) -> (u64, usize) {
        (IOVA + (DATA + BUFFER * index) as u64, DATA + BUFFER * index)
    }

    fn words(&self, at: usize) -> [u32; 4] {
        let bytes = shared::get(&self.memory, at, 16);
        let words = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        words.collect::<Vec<_>>().try_into().unwrap()
    }

    /// Writes a transmit descriptor, and moves the tail by a store.
    pub fn submit(&mut self, queue: usize, words: [u32; 4]) -> usize {
        let index = self.tails[queue] as usize;
        let at = RING * queue + 16 * index;
        shared::put(&self.memory, at, words.map(u32::to_le_bytes).as_flattened());
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        let tail = self.transmit_page.register::<u32>(0x40 * queue + 0x18).unwrap();
        tail.write(self.tails[queue]);
        index
    }

    /// The status of a transmit descriptor.
    pub fn sent(&self, queue: usize, index: usize) -> bool {
        self.words(RING * queue + 16 * index)[3] & 1 != 0
    }

    /// Submits data by an advanced descriptor, or a legacy one with `command` and `status` as they are.
    pub fn send(&mut self, queue: usize, data: &[u8], command: u32, status: u32) -> usize {
        let (address, at) = self.buffer(self.tails[queue] as usize);
        shared::put(&self.memory, at, data);
        let command = command | data.len() as u32;
        self.submit(queue, [address as u32, (address >> 32) as u32, command, status])
    }

    /// The next descriptor that a receive queue has done.
    pub fn received(&mut self, queue: usize) -> Option<Received> {
        let index = self.heads[queue] as usize;
        let words = self.words(RINGS + RING * queue + 16 * index);
        if words[2] & 1 == 0 {
            return None;
        }
        let len = (words[3] & 0xffff) as usize;
        let data = shared::get(&self.memory, self.buffer(index).1, len);
        self.give(queue, index);
        self.heads[queue] = (self.heads[queue] + 1) % ENTRIES;
        let tail = self.receive_page.register::<u32>(0x40 * queue + 0x18).unwrap();
        tail.write((tail.read() + 1) % ENTRIES);
        Some(Received { words, data })
    }

    /// Connects vectors of MSI-X.
    pub fn vectors(&self, count: usize) -> Vec<EventFd> {
        let events: Vec<_> = (0..count).map(|_| edu::event()).collect();
        let fds: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
        self.card.set_irqs(irq_index::MSIX, 0, &fds).unwrap();
        events
    }
}

/// How often an event has been signalled since asked last.
pub fn taken(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

/// A frame to the card, of `len` bytes.
pub fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = [to, OTHER].concat();
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..len).map(|index| index as u8));
    frame
}

/// UDP or TCP over IPv4 with valid checksums: from a port, with `len` bytes of payload.
pub fn datagram(protocol: u8, port: u16, len: usize) -> Vec<u8> {
    let header = if protocol == 6 { 20 } else { 8 };
    let mut frame = [MAC, OTHER].concat();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + header as u16 + len as u16).to_be_bytes());
    frame.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 7]);
    if protocol == 6 {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    } else {
        frame.extend((8 + len as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend((0..len).map(|index| index as u8));
    let sum = checksum(&frame[14..34], 0);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let sum = transport_checksum(&frame, 14);
    let field = if protocol == 6 { 50 } else { 40 };
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

pub fn checksum(bytes: &[u8], seed: u32) -> u16 {
    let mut sum = seed;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The sum of the pseudo header for a datagram whose IPv4 header is at `at`, not inverted.
pub fn pseudo(frame: &[u8], at: usize) -> u32 {
    let len = u32::from(u16::from_be_bytes([frame[at + 2], frame[at + 3]])) - 20;
    let addresses = frame[at + 12..at + 20].chunks(2);
    let addresses: u32 = addresses.map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    addresses + u32::from(frame[at + 9]) + len
}

/// What the checksum must be, or zero where it is right.
pub fn transport_checksum(frame: &[u8], at: usize) -> u16 {
    let len = usize::from(u16::from_be_bytes([frame[at + 2], frame[at + 3]]));
    checksum(&frame[at + 20..at + len], pseudo(frame, at))
}
