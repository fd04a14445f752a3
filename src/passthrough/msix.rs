//! The MSI-X table and the pending bits, which the guest accesses by traps.

use std::ops::Range;

use super::interrupts::Message;
use crate::device::Msix;

const ENTRY: usize = 16;
/// The bits of an entry that can be written (PCIe 5.0 §7.7.2.3): a dword address, data, and the mask bit.
const WRITABLE: [u8; ENTRY] =
    [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
const MASK: usize = 12;

/// A guest's MSI-X table.
#[derive(Debug)]
pub(super) struct MsixTable {
    place: Msix,
    bytes: Vec<u8>,
}

/// What an access to a BAR reaches.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// Bytes of the table.
    Table(usize),
    /// Bytes of the pending bits.
    Pending(usize),
    Device,
}

impl MsixTable {
    pub(super) fn new(place: Msix) -> Self {
        let mut this = Self { bytes: vec![0; place.count as usize * ENTRY], place };
        this.reset();
        this
    }

    /// Masks all vectors.
    pub(super) fn reset(&mut self) {
        self.bytes.fill(0);
        self.bytes.iter_mut().skip(MASK).step_by(ENTRY).for_each(|byte| *byte = 1);
    }

    /// What an aligned access of at most eight bytes reaches. Both ranges begin and end at multiples of eight.
    pub(super) fn reached(&self, bar: u32, offset: u64) -> Reached {
        let within = |(at, range): &(u32, Range<u64>)| {
            (*at == bar && range.contains(&offset)).then(|| (offset - range.start) as usize)
        };
        within(&self.place.table)
            .map(Reached::Table)
            .or_else(|| within(&self.place.pending).map(Reached::Pending))
            .unwrap_or(Reached::Device)
    }

    pub(super) fn read(&self, at: usize, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *byte = *value;
        }
    }

    /// Returns the vectors whose entries were written.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> Range<u32> {
        for (index, value) in (at..self.bytes.len()).zip(data) {
            let mask = WRITABLE[index % ENTRY];
            self.bytes[index] = (self.bytes[index] & !mask) | (value & mask);
        }
        let end = at.saturating_add(data.len()).min(self.bytes.len());
        (at / ENTRY) as u32..end.div_ceil(ENTRY) as u32
    }

    /// The number of vectors.
    pub(super) fn count(&self) -> u32 {
        self.place.count
    }

    /// What a vector sends; `None` if it is masked.
    pub(super) fn message(&self, vector: u32) -> Option<Message> {
        let entry = self.bytes.chunks_exact(ENTRY).nth(vector as usize)?;
        let word = |at: usize| {
            entry[at..at + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
        };
        let address = u64::from(word(4)) << 32 | u64::from(word(0));
        (entry[MASK] & 1 == 0).then_some(Message { address, data: word(8) })
    }
}
