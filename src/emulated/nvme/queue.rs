//! Queues, and the data pointers of commands.

use super::command::{COMMAND, COMPLETION, Command, Status};
use crate::emulated::Bus;
use crate::error::Result;

#[derive(Debug)]
pub(super) struct SubmissionQueue {
    pub(super) base: u64,
    pub(super) size: u16,
    pub(super) head: u16,
    /// The completion queue.
    pub(super) completions: u16,
}

impl SubmissionQueue {
    /// Takes the next command.
    pub(super) fn pop(&mut self, bus: &Bus) -> Result<Command> {
        let mut bytes = [0; COMMAND];
        bus.dma_read(entry(self.base, self.head, COMMAND), &mut bytes)?;
        self.head = next(self.head, self.size);
        Ok(Command::new(bytes))
    }
}

#[derive(Debug)]
pub(super) struct CompletionQueue {
    pub(super) base: u64,
    pub(super) size: u16,
    pub(super) tail: u16,
    pub(super) phase: bool,
    /// The vector; `None` if interrupts are disabled.
    pub(super) vector: Option<u16>,
}

impl CompletionQueue {
    pub(super) fn new(base: u64, size: u16, vector: Option<u16>) -> Self {
        Self { base, size, tail: 0, phase: true, vector }
    }

    /// Whether the queue has no room, for a driver that has read up to `head`.
    pub(super) fn is_full(&self, head: u32) -> bool {
        head >= u32::from(self.size) || u32::from(next(self.tail, self.size)) == head
    }

    /// Posts a completion. Its last double word, with the phase, is written last.
    pub(super) fn push(
        &mut self,
        bus: &Bus,
        result: u32,
        queue: (u16, u16),
        id: u16,
        status: Status,
    ) -> Result<()> {
        let (queue, head) = queue;
        let at = entry(self.base, self.tail, COMPLETION);
        let words = [result, 0, u32::from(queue) << 16 | u32::from(head)];
        bus.dma_write(at, words.map(u32::to_le_bytes).as_flattened())?;
        let state = status.field() << 1 | u16::from(self.phase);
        let last = u32::from(state) << 16 | u32::from(id);
        bus.dma_write(at.wrapping_add(12), &last.to_le_bytes())?;
        self.tail = next(self.tail, self.size);
        self.phase ^= self.tail == 0;
        Ok(())
    }
}

fn entry(base: u64, index: u16, size: usize) -> u64 {
    base.wrapping_add(u64::from(index) * size as u64)
}

fn next(index: u16, size: u16) -> u16 {
    if index + 1 >= size { 0 } else { index + 1 }
}

/// The address and length of each part of the `len` bytes that two PRP entries describe, in pages of `page`
/// bytes (NVMe 1.4 §4.3).
pub(super) fn parts(
    bus: &Bus,
    prps: [u64; 2],
    len: usize,
    page: usize,
) -> std::result::Result<Vec<(u64, usize)>, Status> {
    let [first, second] = prps;
    let offset = (first % page as u64) as usize;
    if !offset.is_multiple_of(4) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let mut parts = vec![(first, len.min(page - offset))];
    let mut rest = len.saturating_sub(page - offset);
    if rest == 0 {
        return Ok(parts);
    }
    let aligned = |address: u64| {
        let aligned = address.is_multiple_of(page as u64);
        aligned.then_some(address).ok_or(Status::INVALID_PRP_OFFSET)
    };
    if rest <= page {
        parts.push((aligned(second)?, rest));
        return Ok(parts);
    }
    // A PRP list. If more entries are needed, the last entry of a page points to the next page of the list.
    let mut list = second;
    if !list.is_multiple_of(8) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    while rest > 0 {
        let room = (page - (list % page as u64) as usize) / 8;
        let wanted = rest.div_ceil(page);
        let mut bytes = vec![0; room.min(wanted) * 8];
        bus.dma_read(list, &mut bytes).map_err(|_| Status::TRANSFER_ERROR)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let chained = wanted > room;
        for (index, entry) in entries.iter().enumerate() {
            let address = aligned(u64::from_le_bytes(*entry))?;
            if chained && index + 1 == entries.len() {
                list = address;
            } else {
                parts.push((address, rest.min(page)));
                rest -= rest.min(page);
            }
        }
    }
    Ok(parts)
}
