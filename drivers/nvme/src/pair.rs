//! A pair of queues: submission and completion of commands.
//!
//! This path allocates nothing, makes no system call and copies no data. It stores entries into a ring that the
//! controller reads, finds completions by the phase bit in a ring that the controller writes, and rings the
//! doorbells once for a batch.

use std::{fmt, io};

use vfio_remap::device::{
    BufferRequest, DmaArray, DmaBuffer, DmaRing, DmaSpace, IovaPlacement, Width,
};
use vfio_remap::{Error, ErrorKind, Result};

use super::command::Command;
use super::doorbells::Doorbells;
use super::prp::PrpLists;
use super::status::Status;

/// Not an identifier of a command: the slot is free.
const FREE: u32 = 1 << 16;
/// The slot is never used.
const RESERVED: u32 = FREE + 1;
/// The phase bit in the last two double words of a completion.
const PHASE: u64 = 1 << 48;
/// Most entries of a queue, so that an identifier holds the index of a slot and a counter.
pub const MOST_ENTRIES: u16 = 1 << 14;

/// The parameters of a pair of queues.
#[derive(Clone, Copy, Debug)]
pub struct QueueShape {
    /// Entries of each queue: 2 to [`MOST_ENTRIES`].
    pub entries: u16,
    /// The binary logarithm of the controller's page size.
    pub page_shift: u32,
    /// The largest transfer in bytes: at most [`LIST`](super::prp::LIST) pages.
    pub max_transfer: usize,
    /// After how many completions the head doorbell is rung: at least one, and at most as many as the queue can hold.
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
    /// Its position is the tail.
    submissions: DmaRing<u64, 8>,
    /// Its position is the head.
    completions: DmaRing<u64, 2>,
    lists: PrpLists,
    doorbells: Doorbells,
    /// At least twice as many as commands, so that a free one is found quickly. A power of two.
    slots: Box<[Slot]>,
    /// The bits of an identifier that are the index of its slot.
    index_bits: usize,
    /// The next identifier, if its slot is free.
    next_id: u16,
    outstanding: usize,
    /// Most outstanding commands: one less than the entries; none while the queue is broken.
    limit: usize,
    /// The last value of the tail doorbell.
    rung_tail: usize,
    /// The phase bit of an old completion; that of a new one is the other.
    old_phase: u64,
    /// The last value of the head doorbell.
    rung_head: usize,
    acknowledge_after: usize,
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
        let list_len = PrpLists::len(max_transfer, page_shift);
        let entries = usize::from(entries);
        let count = (2 * entries).next_power_of_two();
        let slot = || Slot { buffer: None, tag: 0, since: 0, id: FREE, state: State::New };
        let mut slots: Box<[Slot]> = std::iter::repeat_with(slot).take(count).collect();
        // The identifier of all ones should not be used (NVMe Base 2.0 §3.3.3.1): it would be in this slot.
        slots[count - 1].id = RESERVED;
        let sizes = [entries * 64, entries * 16, count * list_len * 8];
        let ([submissions, completions, lists], anchor) = memory(space, sizes, 1 << page_shift)?;
        let mut pair = Self {
            submissions: ring(submissions, entries * 64)?,
            completions: ring(completions, entries * 16)?,
            lists: PrpLists::new(array(lists)?, list_len, page_shift),
            doorbells,
            slots,
            index_bits: count - 1,
            next_id: 0,
            outstanding: 0,
            limit: 0,
            rung_tail: 0,
            old_phase: 0,
            rung_head: 0,
            acknowledge_after: acknowledge_after.into(),
            anchor: Some(anchor),
        };
        pair.reset();
        Ok(pair)
    }

    /// The addresses of the submission queue and of the completion queue.
    pub fn addresses(&self) -> (u64, u64) {
        (self.submissions.iova().0, self.completions.iova().0)
    }

    pub fn entries(&self) -> u16 {
        self.submissions.len() as u16
    }

    pub fn doorbells(&self) -> &Doorbells {
        &self.doorbells
    }

    /// How many commands are outstanding.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The index of the slot for a command.
    #[inline]
    fn index(&self, id: u16) -> usize {
        usize::from(id) & self.index_bits
    }

    /// Whether another command can be submitted.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.outstanding < self.limit
    }

    /// How many more commands can be submitted.
    #[inline]
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.outstanding)
    }

    /// Whether the controller has posted a malformed completion, or a doorbell could not be rung.
    pub fn is_broken(&self) -> bool {
        self.limit == 0
    }

    /// Stops submissions until [`reset`](Self::reset).
    pub fn break_off(&mut self) {
        self.limit = 0;
    }

    /// Puts a command into the queue. [`ring`](Self::ring) notifies the controller. The controller owns the
    /// buffer until the command [completes](Self::pop).
    pub fn submit(
        &mut self,
        command: Command,
        buffer: Option<DmaBuffer>,
        tag: u64,
    ) -> std::result::Result<(), SubmitError> {
        if !self.has_room() {
            return Err(full(buffer));
        }
        self.put(command, buffer, tag);
        Ok(())
    }

    /// Whether there is room for a command whose data, `size` bytes at `iova`, [`put_next`](Self::put_next) can
    /// describe.
    #[inline(always)]
    pub fn is_ready(&self, iova: u64, size: usize) -> bool {
        self.lists.is_one_entry(iova, size)
            && self.has_room()
            && self.slots.get(self.index(self.next_id)).is_some_and(|slot| slot.id == FREE)
    }

    /// Puts a command into the queue, which must be [ready](Self::is_ready) for it. This makes no call, so that
    /// the compiler keeps everything in registers.
    #[inline(always)]
    pub fn put_next(&mut self, command: Command, buffer: DmaBuffer, tag: u64) {
        self.fill(self.next_id, command, (buffer.iova().0, 0), Some(buffer), tag);
    }

    /// Puts a command into the queue, which must have [room](Self::has_room).
    pub fn put(&mut self, command: Command, buffer: Option<DmaBuffer>, tag: u64) {
        let mut id = self.next_id;
        // Less than half of the slots are in use.
        while self.slots[self.index(id)].id != FREE {
            id = id.wrapping_add(1);
        }
        let prps = match &buffer {
            None => (0, 0),
            Some(buffer) => {
                let iova = buffer.iova().0;
                (iova, self.lists.second(self.index(id), iova, buffer.size()))
            }
        };
        self.fill(id, command, prps, buffer, tag);
    }

    /// Puts a command into the queue, with this identifier, whose slot is free, and these PRP entries.
    #[inline(always)]
    fn fill(
        &mut self,
        id: u16,
        command: Command,
        prps: (u64, u64),
        buffer: Option<DmaBuffer>,
        tag: u64,
    ) {
        self.next_id = id.wrapping_add(1);
        let index = self.index(id);
        let slot = &mut self.slots[index];
        // A free slot has no buffer to drop.
        std::mem::forget(std::mem::replace(&mut slot.buffer, buffer));
        slot.tag = tag;
        slot.state = State::New;
        slot.id = id.into();
        command.store(self.submissions.entry(), id, prps);
        self.submissions.advance();
        self.outstanding += 1;
    }

    /// The next completion, if there is one.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Completion> {
        // This load contains the submission queue and its head, the identifier, the phase and the status. Later
        // loads see what the controller wrote before it.
        let entry = self.completions.entry();
        let word = entry.load::<1>();
        if (word ^ self.old_phase) & PHASE == 0 {
            return None;
        }
        let result = entry.load::<0>() as u32;
        if self.completions.advance() {
            self.old_phase ^= PHASE;
        }
        let id = (word >> 32) as u16;
        let index = self.index(id);
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.id == u32::from(id)) else {
            self.malformed(id);
            return None;
        };
        slot.id = FREE;
        let (tag, buffer) = (slot.tag, slot.buffer.take());
        self.outstanding -= 1;
        Some(Completion { tag, status: Status::from_field((word >> 49) as u16), result, buffer })
    }

    #[cold]
    fn malformed(&mut self, id: u16) {
        log::warn!("nvme: a completion for command {id}, which is not outstanding");
        self.break_off();
    }

    /// Rings the head doorbell if enough completions were taken, and the tail doorbell for all submitted
    /// commands.
    ///
    /// The head comes first: the tail starts the controller's work, and an emulated one may then hold its lock
    /// for the whole batch, for which the head doorbell would wait.
    #[inline]
    pub fn ring(&mut self) {
        self.acknowledge();
        let tail = self.submissions.position();
        if tail != self.rung_tail {
            self.rung_tail = tail;
            let rung = self.doorbells.tail.write(tail as u32);
            self.check_doorbell(rung);
        }
    }

    /// Rings the head doorbell if [enough](QueueShape::acknowledge_after) completions were taken since the last
    /// time.
    #[inline]
    pub fn acknowledge(&mut self) {
        self.acknowledge_after(self.acknowledge_after);
    }

    /// Rings the head doorbell if `count` completions were taken since the last time.
    #[inline]
    pub fn acknowledge_after(&mut self, count: usize) {
        let head = self.completions.position();
        let wrapped = if head < self.rung_head { self.completions.len() } else { 0 };
        if head + wrapped - self.rung_head >= count {
            self.rung_head = head;
            let rung = self.doorbells.head.write(head as u32);
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
        self.outstanding = 0;
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
        (self.rung_tail, self.rung_head, self.old_phase) = (0, 0, 0);
        self.slots.iter_mut().for_each(|slot| slot.buffer = None);
        self.limit = self.submissions.len() - 1;
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

fn array<T: Width, const N: usize>(buffer: DmaBuffer) -> Result<DmaArray<T, N>> {
    DmaArray::new(buffer).map_err(|_| no_queue())
}

/// A ring in the first `size` bytes of a buffer.
fn ring<T: Width, const N: usize>(buffer: DmaBuffer, size: usize) -> Result<DmaRing<T, N>> {
    Ok(DmaRing::new(array(buffer.slice(..size)?)?))
}

fn no_queue() -> Error {
    Error::new(ErrorKind::Unaligned, "make", "a queue")
}
