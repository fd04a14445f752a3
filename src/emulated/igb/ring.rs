//! Rings: the mapped registers of a queue, and their meaning (82576 datasheet §8.10, §8.12).

use crate::device::Register;
use crate::emulated::{Bus, Memory};
use crate::error::Result;

/// Queues of each direction.
pub(super) const QUEUES: usize = 16;
/// Where the registers of queues lie, a page for each direction.
pub(super) const RECEIVE: u32 = 0xc000;
pub(super) const TRANSMIT: u32 = 0xe000;
pub(super) const PAGE: u32 = 0x1000;
const STRIDE: u32 = 0x40;
/// Where those of the first four queues lie as well.
const RECEIVE_ALIAS: u32 = 0x2800;
const TRANSMIT_ALIAS: u32 = 0x3800;
const ALIAS_STRIDE: u32 = 0x100;
const ALIASES: u32 = 4;

const DESCRIPTOR: usize = 16;
/// How many descriptors are read at once.
const BATCH: usize = 16;
const ENABLE: u32 = 1 << 25;
/// Of a ring's size in bytes, and of its base: multiples of 128.
const SIZE_BITS: u32 = 0x000f_ff80;
const BASE_BITS: u64 = !0x7f;

/// The offset in a mapped page of a register that lies in that page or is an alias of one in it.
pub(super) fn mapped(offset: u32) -> Option<u32> {
    if [RECEIVE, TRANSMIT].contains(&(offset & !(PAGE - 1))) {
        return Some(offset);
    }
    let at = |start: u32, to: u32| {
        let (queue, register) = {
            let offset = offset.checked_sub(start)?;
            (offset / ALIAS_STRIDE, offset % ALIAS_STRIDE)
        };
        (queue < ALIASES && register < STRIDE).then_some(to + queue * STRIDE + register)
    };
    at(RECEIVE_ALIAS, RECEIVE).or_else(|| at(TRANSMIT_ALIAS, TRANSMIT))
}

/// The registers of a queue.
pub(super) struct Ring {
    base_low: Register<u32>,
    base_high: Register<u32>,
    size: Register<u32>,
    split: Register<u32>,
    head: Register<u32>,
    tail: Register<u32>,
    control: Register<u32>,
    write_back_low: Register<u32>,
    write_back_high: Register<u32>,
}

/// The descriptors of a ring, by the values of its registers at one time. Head and tail lie within the ring.
#[derive(Debug)]
pub(super) struct Descriptors {
    base: u64,
    pub(super) count: u32,
    pub(super) head: u32,
    tail: u32,
    /// Descriptors that have been read, from the index `first` on.
    fetched: [[u32; 4]; BATCH],
    first: u32,
    fetched_count: u32,
}

impl Ring {
    /// The registers of a queue whose page starts at `page`.
    pub(super) fn new(memory: &Memory, page: u32, queue: usize) -> Result<Self> {
        let register =
            |offset: usize| memory.register((page + STRIDE * queue as u32) as usize + offset);
        Ok(Self {
            base_low: register(0x00)?,
            base_high: register(0x04)?,
            size: register(0x08)?,
            split: register(0x0c)?,
            head: register(0x10)?,
            tail: register(0x18)?,
            control: register(0x28)?,
            write_back_low: register(0x38)?,
            write_back_high: register(0x3c)?,
        })
    }

    /// Sets the values of a reset.
    pub(super) fn reset(&self, control: u32, split: u32, enabled: bool) {
        self.control.write(control | if enabled { ENABLE } else { 0 });
        self.split.write(split);
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.control.read() & ENABLE != 0
    }

    /// `None` if the queue is disabled, has no size, or has its head or tail outside of the ring: then there is
    /// nothing to do.
    pub(super) fn descriptors(&self) -> Option<Descriptors> {
        if !self.is_enabled() {
            return None;
        }
        let count = (self.size.read() & SIZE_BITS) / DESCRIPTOR as u32;
        let (head, tail) = (self.head.read(), self.tail.read());
        let base = u64::from(self.base_low.read()) | u64::from(self.base_high.read()) << 32;
        (head < count && tail < count)
            .then(|| Descriptors::new(base & BASE_BITS, count, head, tail))
    }

    pub(super) fn set_head(&self, head: u32) {
        self.head.write(head);
    }

    /// SRRCTL.
    pub(super) fn split(&self) -> u32 {
        self.split.read()
    }

    /// The address to which the head is written instead of descriptors (TDWBAL, TDWBAH).
    pub(super) fn head_write_back(&self) -> Option<u64> {
        let low = self.write_back_low.read();
        let address = u64::from(low & !3) | u64::from(self.write_back_high.read()) << 32;
        (low & 1 != 0).then_some(address)
    }
}

impl Descriptors {
    fn new(base: u64, count: u32, head: u32, tail: u32) -> Self {
        let fetched = [[0; 4]; BATCH];
        Self { base, count, head, tail, fetched, first: 0, fetched_count: 0 }
    }

    /// How many descriptors the driver has given.
    pub(super) fn ready(&self) -> u32 {
        if self.tail >= self.head {
            self.tail - self.head
        } else {
            self.count - self.head + self.tail
        }
    }

    /// The address of the descriptor at the head.
    pub(super) fn address(&self) -> u64 {
        self.base.wrapping_add(u64::from(self.head) * DESCRIPTOR as u64)
    }

    /// The descriptor at the head, in words of 32 bits.
    pub(super) fn next(&mut self, bus: &Bus) -> Result<[u32; 4]> {
        let index = self.head.wrapping_sub(self.first);
        if index < self.fetched_count {
            return Ok(self.fetched[index as usize]);
        }
        let most = self.ready().clamp(1, BATCH as u32).min(self.count - self.head);
        // A ring may be mapped in part.
        if self.fetch(bus, most).is_err() {
            self.fetch(bus, 1)?;
        }
        Ok(self.fetched[0])
    }

    fn fetch(&mut self, bus: &Bus, count: u32) -> Result<()> {
        let mut bytes = [0; BATCH * DESCRIPTOR];
        bus.dma_read(self.address(), &mut bytes[..count as usize * DESCRIPTOR])?;
        let (words, _) = bytes.as_chunks::<4>();
        for (word, bytes) in self.fetched.as_flattened_mut().iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        (self.first, self.fetched_count) = (self.head, count);
        Ok(())
    }

    /// The head moves on.
    pub(super) fn advance(&mut self) {
        self.head = if self.head + 1 >= self.count { 0 } else { self.head + 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_four_queues_have_aliases() {
        assert_eq!(mapped(0x2818), Some(0xc018));
        assert_eq!(mapped(0x2b28), Some(0xc0e8));
        assert_eq!(mapped(0x3938), Some(0xe078));
        assert_eq!(mapped(0xcffc), Some(0xcffc));
        let none = [0x2404, 0x2840, 0x2c18, 0x3404, 0x3bff, 0x3c18, 0xb600, 0xd000];
        assert!(none.iter().all(|offset| mapped(*offset).is_none()));
    }

    #[test]
    fn a_ring_wraps_around() {
        let mut ring = Descriptors::new(BASE_BITS, 8, 6, 1);
        assert_eq!(ring.ready(), 3);
        (0..3).for_each(|_| ring.advance());
        assert_eq!((ring.head, ring.ready()), (1, 0));
        // Past the end of the address space, and no panic.
        ring.head = 7;
        assert_eq!(ring.address(), BASE_BITS + 112);
    }
}
