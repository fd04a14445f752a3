//! A pair of queues: submission and completion of commands.
//!
//! This path allocates nothing, makes no system call and copies no data. It stores entries into a ring that the
//! controller reads, finds completions by the phase bit in a ring that the controller writes, and rings the
//! doorbells once for a batch.

use std::{fmt, io};

use vfio_remap::device::{BufferRequest, DmaArray, DmaBuffer, DmaSpace, IovaPlacement};
use vfio_remap::{Error, ErrorKind, Result};

use super::command::Command;
use super::doorbells::Doorbells;
use super::status::Status;

/// Not an identifier of a command: the slot is free.
const FREE: u32 = 1 << 16;
/// The slot is never used.
const RESERVED: u32 = FREE + 1;
/// Most pages in the PRP list of a transfer, so that a list never leaves a page of 4 KiB.
pub const LIST: usize = 512;

/// Most entries of a queue, so that an identifier holds the index of a slot and a counter.
pub const MOST_ENTRIES: u16 = 1 << 14;

/// The parameters of a pair of queues.
#[derive(Clone, Copy, Debug)]
pub struct QueueShape {
    /// Entries of each queue: 2 to [`MOST_ENTRIES`].
    pub entries: u16,
    /// The binary logarithm of the controller's page size.
    pub page_shift: u32,
    /// The largest transfer in bytes: at most [`LIST`] pages.
    pub max_transfer: usize,
    /// After how many completions the head doorbell is rung. One if the controller fires an interrupt for each
    /// batch; with polling, half a queue is enough.
    pub acknowledge_after: u16,
}

/// An outstanding command, or room for one.
///
/// Identifiers are counted: the lower bits are the index of the command's slot, the upper bits differ for the
/// slot's next command. Identifiers whose slot is in use are skipped. So a duplicate or late completion cannot
/// match another command until 65536 identifiers later.
#[derive(Debug)]
struct Slot {
    /// The controller owns it until it completes the command or is disabled.
    buffer: Option<DmaBuffer>,
    tag: u64,
    /// When the command was first seen outstanding, in milliseconds of the queue's clock.
    since: u32,
    /// The identifier of the command; [`FREE`], or [`RESERVED`].
    id: u32,
    state: State,
}

impl Slot {
    /// Whether the slot has an outstanding command.
    fn is_busy(&self) -> bool {
        self.id < FREE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Submitted; the clock has not been read since.
    New,
    Busy,
    /// Overdue; its abort was requested.
    Aborting,
}

/// A submission queue, its completion queue, and the commands in them.
#[derive(Debug)]
pub struct QueuePair {
    submissions: DmaArray<u64, 8>,
    completions: DmaArray<u64, 2>,
    /// Each slot's PRP list: `list_len` entries.
    lists: DmaArray<u64, 1>,
    list_len: usize,
    doorbells: Doorbells,
    /// At least twice as many as commands, so that a free one is found quickly. A power of two.
    slots: Box<[Slot]>,
    /// The next identifier, if its slot is free.
    next_id: u16,
    /// How many more commands can be submitted.
    free: usize,
    entries: usize,
    tail: usize,
    /// The last value of the tail doorbell.
    rung_tail: usize,
    head: usize,
    /// The phase bit of a new completion.
    phase: u64,
    /// The last value of the head doorbell.
    rung_head: usize,
    acknowledge_after: usize,
    page: u64,
    broken: bool,
    /// A part of the memory of both queues and the lists. It keeps all of it allocated.
    anchor: Option<DmaBuffer>,
}

/// The completion of a command.
#[derive(Debug)]
#[must_use]
#[non_exhaustive]
pub struct Completion {
    /// The tag of the submission.
    pub tag: u64,
    /// Whether the command has succeeded, or why not.
    pub status: Status,
    /// Double word 0 of the completion.
    pub result: u32,
    /// The buffer. If the controller may still reach it, it stays with the queue.
    pub buffer: Option<DmaBuffer>,
}

/// The error for a command that was not submitted.
#[derive(Debug)]
#[non_exhaustive]
pub struct SubmitError {
    /// The reason.
    pub error: Error,
    /// The buffer.
    pub buffer: Option<DmaBuffer>,
}

impl From<SubmitError> for Error {
    fn from(refused: SubmitError) -> Self {
        refused.error
    }
}

impl From<SubmitError> for io::Error {
    fn from(refused: SubmitError) -> Self {
        refused.error.into()
    }
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for SubmitError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl QueuePair {
    pub fn new(space: &DmaSpace, doorbells: Doorbells, shape: &QueueShape) -> Result<Self> {
        let QueueShape { entries, page_shift, max_transfer, acknowledge_after } = *shape;
        let page = 1u64 << page_shift;
        let list_len = (max_transfer >> page_shift).clamp(1, LIST).next_power_of_two();
        let entries = usize::from(entries);
        let count = (2 * entries).next_power_of_two();
        let slot = || Slot { buffer: None, tag: 0, since: 0, id: FREE, state: State::New };
        let mut slots: Box<[Slot]> = std::iter::repeat_with(slot).take(count).collect();
        // The identifier of all ones should not be used (NVMe Base 2.0 §3.3.3.1): it would be in this slot.
        slots[count - 1].id = RESERVED;
        let sizes = [entries * 64, entries * 16, count * list_len * 8];
        let ([submissions, completions, lists], anchor) = memory(space, sizes, page as usize)?;
        let mut pair = Self {
            submissions: array(submissions)?,
            completions: array(completions)?,
            lists: array(lists)?,
            list_len,
            doorbells,
            slots,
            next_id: 0,
            free: 0,
            entries,
            tail: 0,
            rung_tail: 0,
            head: 0,
            phase: 1,
            rung_head: 0,
            acknowledge_after: acknowledge_after.into(),
            page,
            broken: false,
            anchor: Some(anchor),
        };
        pair.reset();
        Ok(pair)
    }

    /// The addresses of the submission queue and of the completion queue.
    pub fn addresses(&self) -> (u64, u64) {
        (self.submissions.iova(0).0, self.completions.iova(0).0)
    }

    pub fn entries(&self) -> u16 {
        self.entries as u16
    }

    pub fn doorbells(&self) -> &Doorbells {
        &self.doorbells
    }

    /// How many commands are outstanding.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.depth() - self.free
    }

    /// How many commands the queue can hold: one less than its entries.
    fn depth(&self) -> usize {
        self.entries - 1
    }

    /// The slot of a command.
    #[inline]
    fn index(&self, id: u16) -> usize {
        usize::from(id) & (self.slots.len() - 1)
    }

    /// How many more commands can be submitted.
    #[inline]
    pub fn room(&self) -> usize {
        if self.broken { 0 } else { self.free }
    }

    /// Whether the controller has posted a malformed completion, or a doorbell could not be rung.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Stops submissions until [`reset`](Self::reset).
    pub fn break_off(&mut self) {
        self.broken = true;
    }

    /// Puts a command into the queue. [`ring`](Self::ring) notifies the controller. The controller owns the
    /// buffer until the command [completes](Self::pop).
    pub fn submit(
        &mut self,
        command: Command,
        buffer: Option<DmaBuffer>,
        tag: u64,
    ) -> std::result::Result<(), SubmitError> {
        if self.room() == 0 {
            return Err(full(buffer));
        }
        self.put(command, buffer, tag);
        Ok(())
    }

    /// Puts a command into the queue, which must have [room](Self::room). PRP entries (NVMe Base 1.4 §4.3)
    /// describe the buffer; each slot has a PRP list.
    #[inline]
    pub fn put(&mut self, command: Command, buffer: Option<DmaBuffer>, tag: u64) {
        let mut id = self.next_id;
        while self.slots[self.index(id)].id != FREE {
            id = id.wrapping_add(1);
        }
        self.next_id = id.wrapping_add(1);
        let index = self.index(id);
        let prps = match &buffer {
            None => [0; 2],
            Some(buffer) => self.describe(index, buffer.iova().0, buffer.size()),
        };
        let slot = &mut self.slots[index];
        // A free slot has no buffer to drop.
        std::mem::forget(std::mem::replace(&mut slot.buffer, buffer));
        slot.tag = tag;
        slot.state = State::New;
        slot.id = id.into();
        self.submissions.store_entry(self.tail, command.finish(id, prps));
        self.tail = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
        self.free -= 1;
    }

    /// The two PRP entries for the `size` bytes at `iova`.
    #[inline]
    fn describe(&self, slot: usize, iova: u64, size: usize) -> [u64; 2] {
        let first = self.page - (iova & (self.page - 1));
        let rest = (size as u64).saturating_sub(first);
        match rest {
            0 => [iova, 0],
            _ if rest <= self.page => [iova, iova + first],
            _ => [iova, self.list(slot, iova + first, rest)],
        }
    }

    /// Writes the PRP list for the `rest` bytes at `page`. Returns its address.
    fn list(&self, slot: usize, page: u64, rest: u64) -> u64 {
        let start = slot * self.list_len;
        let pages = (page..page + rest).step_by(self.page as usize);
        for (index, page) in pages.take(self.list_len).enumerate() {
            self.lists.store(start + index, 0, page);
        }
        self.lists.iova(start).0
    }

    /// The next completion, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<Completion> {
        // This load contains the submission queue and its head, the identifier, the phase and the status. Later
        // loads see what the controller wrote before it.
        let word = self.completions.load(self.head, 1);
        if word >> 48 & 1 != self.phase {
            return None;
        }
        let result = self.completions.load(self.head, 0) as u32;
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase ^= 1;
        }
        let id = (word >> 32) as u16;
        let index = self.index(id);
        let slot = &mut self.slots[index];
        if slot.id != u32::from(id) {
            self.malformed(id);
            return None;
        }
        slot.id = FREE;
        let (tag, buffer) = (slot.tag, slot.buffer.take());
        self.free += 1;
        Some(Completion { tag, status: Status::from_field((word >> 49) as u16), result, buffer })
    }

    #[cold]
    fn malformed(&mut self, id: u16) {
        log::warn!("nvme: a completion for command {id}, which is not outstanding");
        self.break_off();
    }

    /// Rings the tail doorbell for all submitted commands, and the head doorbell if enough completions were
    /// taken.
    #[inline]
    pub fn ring(&mut self) {
        if self.tail != self.rung_tail {
            self.rung_tail = self.tail;
            let rung = self.doorbells.tail.write(self.tail as u32);
            self.check_doorbell(rung);
        }
        self.acknowledge();
    }

    /// Rings the head doorbell if [enough](QueueShape::acknowledge_after) completions were taken since the last
    /// time.
    #[inline]
    pub fn acknowledge(&mut self) {
        let wrapped = if self.head < self.rung_head { self.entries } else { 0 };
        if self.head + wrapped - self.rung_head >= self.acknowledge_after {
            self.rung_head = self.head;
            let rung = self.doorbells.head.write(self.head as u32);
            self.check_doorbell(rung);
        }
    }

    #[inline]
    fn check_doorbell(&mut self, rung: Result<()>) {
        if let Err(error) = rung {
            log::warn!("nvme: {error}");
            self.break_off();
        }
    }

    /// A command that has been outstanding for at least `limit` milliseconds, at the time `now`. The time
    /// counts from the first call of this, because submission reads no clock.
    pub fn overdue(&mut self, now: u32, limit: u32) -> Option<u16> {
        let mut late = None;
        for slot in self.slots.iter_mut().filter(|slot| slot.is_busy()) {
            match slot.state {
                State::New => (slot.state, slot.since) = (State::Busy, now),
                State::Busy | State::Aborting if now.wrapping_sub(slot.since) >= limit => {
                    late = late.or(Some(slot.id as u16));
                }
                State::Busy | State::Aborting => {}
            }
        }
        late
    }

    /// Marks an overdue command as aborting and extends its `limit` by `grace` milliseconds. `false` if it was
    /// marked before.
    pub fn abort(&mut self, id: u16, now: u32, limit: u32, grace: u32) -> bool {
        let Some(slot) = self.slots.get_mut(self.index(id)) else { return false };
        slot.since = now.wrapping_sub(limit.saturating_sub(grace));
        std::mem::replace(&mut slot.state, State::Aborting) != State::Aborting
    }

    /// Ends all commands, in the order of their slots. If the controller cannot reach memory any more
    /// (`quiet`), the completions return the buffers; otherwise the buffers stay here.
    pub fn end_all(&mut self, quiet: bool, mut done: impl FnMut(Completion)) {
        for slot in self.slots.iter_mut().filter(|slot| slot.is_busy()) {
            slot.id = FREE;
            let buffer = if quiet { slot.buffer.take() } else { None };
            done(Completion { tag: slot.tag, status: Status::ABORTED_BY_HOST, result: 0, buffer });
        }
        self.free = self.depth();
        self.break_off();
    }

    /// Takes all memory that the controller knows. The caller must hold it until the controller cannot reach it
    /// any more. Nothing can be submitted afterwards.
    pub fn take_memory(&mut self) -> Vec<DmaBuffer> {
        self.break_off();
        let buffers = self.slots.iter_mut().filter_map(|slot| slot.buffer.take());
        buffers.chain(self.anchor.take()).collect()
    }

    /// Empties both queues after [`end_all`](Self::end_all). The controller must not have the queues, and must
    /// not reach their memory.
    pub fn reset(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        (self.tail, self.rung_tail, self.head, self.rung_head, self.phase) = (0, 0, 0, 0, 1);
        self.slots.iter_mut().for_each(|slot| slot.buffer = None);
        (self.free, self.broken) = (self.depth(), false);
    }
}

#[cold]
fn full(buffer: Option<DmaBuffer>) -> SubmitError {
    let error = Error::new(ErrorKind::InUse, "submit", "a command")
        .with_reason("the queue is full, or has failed")
        .with_advice("take completions first");
    SubmitError { error, buffer }
}

/// DMA memory in parts of these sizes, each at the beginning of a page of the controller, and a rest.
fn memory<const N: usize>(
    space: &DmaSpace,
    sizes: [usize; N],
    page: usize,
) -> Result<([DmaBuffer; N], DmaBuffer)> {
    let sizes = sizes.map(|size| size.next_multiple_of(page));
    let placement = IovaPlacement::default().aligned(page as u64);
    let request = BufferRequest::new(sizes.iter().sum::<usize>() + 1).placement(placement);
    let mut rest = space.buffer_with(request)?;
    let mut parts = Vec::with_capacity(N);
    for size in sizes {
        let (part, after) = rest.split_at(size).map_err(|_| no_queue())?;
        parts.push(part);
        rest = after;
    }
    Ok((parts.try_into().map_err(|_| no_queue())?, rest))
}

fn array<T: vfio_remap::device::Width, const N: usize>(
    buffer: DmaBuffer,
) -> Result<DmaArray<T, N>> {
    DmaArray::new(buffer).map_err(|_| no_queue())
}

fn no_queue() -> Error {
    Error::new(ErrorKind::Unaligned, "make", "a queue")
}
