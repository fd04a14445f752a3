//! A pair of queues, and the path that every command takes.
//!
//! From submission to completion nothing is allocated, no system call is made, and no data is copied:
//! entries are stored into a ring that the controller reads, completions are found by the phase bit in
//! a ring that it writes, and the doorbells are rung once for a batch.

use vfio_remap::device::{BufferRequest, DmaArray, DmaBuffer, DmaSpace, IovaPlacement};
use vfio_remap::{Error, ErrorKind, Result};

use super::command::Command;
use super::doorbells::Doorbells;
use super::status::Status;

/// No command's identifier: the slot is free.
const FREE: u32 = 1 << 16;
/// The slot is never used.
const RESERVED: u32 = FREE + 1;
/// Most pages of a transfer that its list describes: one list never leaves a page of 4 KiB.
pub const LIST: usize = 512;

/// Most entries of a queue, so that identifiers have room for a slot and a generation.
pub const MOST_ENTRIES: u16 = 1 << 14;

/// How a pair of queues is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Of each queue: 2 to [`MOST_ENTRIES`].
    pub entries: u16,
    /// The controller's page size, as a power of two.
    pub page_shift: u32,
    /// The largest transfer in bytes: [`LIST`] pages at most.
    pub max_transfer: usize,
    /// After how many completions the controller is told that their entries are free again. One, where
    /// it fires an interrupt for each batch; where they are polled for, half a queue is as good.
    pub acknowledge_after: u16,
}

/// A command that is with the controller, or room for one.
///
/// Identifiers are counted: the lower bits are the index of the command's slot, and those above them are
/// another one for the slot's next command. An identifier whose slot is in use is passed over. So a
/// completion that comes twice, or late, is of no other command until 65536 identifiers later.
#[derive(Debug)]
struct Slot {
    /// The controller's until it completes the command or can reach no memory any more.
    buffer: Option<DmaBuffer>,
    tag: u64,
    /// When it was first seen to be with the controller, in milliseconds of the queue's clock.
    since: u32,
    /// The identifier of the command; [`FREE`], or [`RESERVED`].
    id: u32,
    state: State,
}

impl Slot {
    /// Whether a command in it is with the controller.
    fn is_busy(&self) -> bool {
        self.id < FREE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Submitted; nobody has looked at the clock since.
    New,
    Busy,
    /// Late, and asked to be aborted.
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
    /// Twice as many as commands, at least, so that a free one is soon found. A power of two.
    slots: Box<[Slot]>,
    /// The next identifier, if its slot is free.
    next_id: u16,
    /// How many more commands the queue takes.
    free: usize,
    entries: usize,
    tail: usize,
    /// The tail that the controller knows.
    told: usize,
    head: usize,
    /// What the phase bit of a new completion is.
    phase: u64,
    /// The head that the controller knows.
    acknowledged: usize,
    acknowledge_after: usize,
    page: u64,
    broken: bool,
    /// A part of the memory of both queues and the lists: none of it goes while this is there.
    anchor: Option<DmaBuffer>,
}

/// A command that has ended.
#[derive(Debug)]
#[must_use]
pub struct Done {
    /// What it was submitted with.
    pub tag: u64,
    /// Whether it has succeeded, and why not.
    pub status: Status,
    /// Double word 0 of the completion.
    pub result: u32,
    /// The buffer again. Where the controller might still reach it, it stays with the queue.
    pub buffer: Option<DmaBuffer>,
}

/// A command that was not submitted.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub error: Error,
    /// The buffer again.
    pub buffer: Option<DmaBuffer>,
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

impl QueuePair {
    pub fn new(space: &DmaSpace, doorbells: Doorbells, shape: &Shape) -> Result<Self> {
        let Shape { entries, page_shift, max_transfer, acknowledge_after } = *shape;
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
            told: 0,
            head: 0,
            phase: 1,
            acknowledged: 0,
            acknowledge_after: acknowledge_after.into(),
            page,
            broken: false,
            anchor: Some(anchor),
        };
        pair.reset();
        Ok(pair)
    }

    /// Where the controller finds the submission queue and the completion queue.
    pub fn places(&self) -> (u64, u64) {
        (self.submissions.iova(0).0, self.completions.iova(0).0)
    }

    pub fn entries(&self) -> u16 {
        self.entries as u16
    }

    pub fn doorbells(&self) -> &Doorbells {
        &self.doorbells
    }

    /// Commands that may be with the controller.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.depth() - self.free
    }

    /// A queue is full with one entry less than it has.
    fn depth(&self) -> usize {
        self.entries - 1
    }

    /// The slot of a command.
    #[inline]
    fn index(&self, id: u16) -> usize {
        usize::from(id) & (self.slots.len() - 1)
    }

    /// How many more commands there is room for.
    #[inline]
    pub fn room(&self) -> usize {
        if self.broken { 0 } else { self.free }
    }

    /// Whether the controller has answered with nonsense, or a doorbell could not be rung.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Nothing can be submitted until [`reset`](Self::reset).
    pub fn break_off(&mut self) {
        self.broken = true;
    }

    /// Puts a command into the queue, for [`ring`](Self::ring) to tell the controller of. The buffer is
    /// the controller's until the command is [done](Self::pop).
    pub fn submit(
        &mut self,
        command: Command,
        buffer: Option<DmaBuffer>,
        tag: u64,
    ) -> std::result::Result<(), Refused> {
        if self.room() == 0 {
            return Err(full(buffer));
        }
        self.put(command, buffer, tag);
        Ok(())
    }

    /// [Submits](Self::submit) a command where there is [room](Self::room). Its buffer is described by PRP
    /// entries (NVMe Base 1.4 §4.3), a list of which belongs to each slot.
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
        // A free slot has no buffer, so that there is none to drop.
        std::mem::forget(std::mem::replace(&mut slot.buffer, buffer));
        slot.tag = tag;
        slot.state = State::New;
        slot.id = id.into();
        self.submissions.store_entry(self.tail, command.finish(id, prps));
        self.tail = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
        self.free -= 1;
    }

    /// The two PRP entries for `size` bytes from `iova` on, which lie at consecutive I/O addresses.
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

    /// A list of the pages from `page` on that hold `rest` bytes.
    fn list(&self, slot: usize, page: u64, rest: u64) -> u64 {
        let start = slot * self.list_len;
        let pages = (page..page + rest).step_by(self.page as usize);
        for (index, page) in pages.take(self.list_len).enumerate() {
            self.lists.store(start + index, 0, page);
        }
        self.lists.iova(start).0
    }

    /// The next command that has ended, if one has.
    #[inline]
    pub fn pop(&mut self) -> Option<Done> {
        // One load gives all that says so: submission queue and its head, identifier, phase, status. What
        // is loaded later was written before.
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
            self.nonsense(id);
            return None;
        }
        slot.id = FREE;
        let (tag, buffer) = (slot.tag, slot.buffer.take());
        self.free += 1;
        Some(Done { tag, status: Status::from_field((word >> 49) as u16), result, buffer })
    }

    #[cold]
    fn nonsense(&mut self, id: u16) {
        log::warn!("nvme: a completion of command {id}, which is not outstanding");
        self.break_off();
    }

    /// Tells the controller of all that was submitted, by one write, and every so often of the
    /// completions that were taken, by another.
    #[inline]
    pub fn ring(&mut self) {
        if self.tail != self.told {
            self.told = self.tail;
            let rung = self.doorbells.tail.write(self.tail as u32);
            self.rung(rung);
        }
        self.acknowledge();
    }

    /// Tells the controller of the completions that were taken, if they are
    /// [so many](Shape::acknowledge_after) that it may have no room for more.
    #[inline]
    pub fn acknowledge(&mut self) {
        let wrapped = if self.head < self.acknowledged { self.entries } else { 0 };
        if self.head + wrapped - self.acknowledged >= self.acknowledge_after {
            self.acknowledged = self.head;
            let rung = self.doorbells.head.write(self.head as u32);
            self.rung(rung);
        }
    }

    #[inline]
    fn rung(&mut self, rung: Result<()>) {
        if let Err(error) = rung {
            log::warn!("nvme: {error}");
            self.break_off();
        }
    }

    /// A command that has been with the controller for `limit` milliseconds, or longer, where it is `now`.
    /// That counts from when this was first asked: submission reads no clock.
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

    /// A command that is late is to be aborted, and gets `grace` milliseconds more where `limit` were
    /// allowed; `false` where that was said before.
    pub fn abort(&mut self, id: u16, now: u32, limit: u32, grace: u32) -> bool {
        let Some(slot) = self.slots.get_mut(self.index(id)) else { return false };
        slot.since = now.wrapping_sub(limit.saturating_sub(grace));
        std::mem::replace(&mut slot.state, State::Aborting) != State::Aborting
    }

    /// Ends all commands, in order of their slots. Their buffers come along where the controller can reach
    /// no memory any more (`quiet`), and stay here otherwise.
    pub fn end_all(&mut self, quiet: bool, mut done: impl FnMut(Done)) {
        for slot in self.slots.iter_mut().filter(|slot| slot.is_busy()) {
            slot.id = FREE;
            let buffer = if quiet { slot.buffer.take() } else { None };
            done(Done { tag: slot.tag, status: Status::ABORTED_BY_HOST, result: 0, buffer });
        }
        self.free = self.depth();
        self.break_off();
    }

    /// What the controller was told of: where it may still reach that when the queues go, it is to be
    /// held until it cannot any more. Nothing can be submitted afterwards.
    pub fn remains(&mut self) -> Vec<DmaBuffer> {
        self.break_off();
        let buffers = self.slots.iter_mut().filter_map(|slot| slot.buffer.take());
        buffers.chain(self.anchor.take()).collect()
    }

    /// Empties both queues, for a controller that knows of neither and reaches no memory, after
    /// [`end_all`](Self::end_all).
    pub fn reset(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        (self.tail, self.told, self.head, self.acknowledged, self.phase) = (0, 0, 0, 0, 1);
        self.slots.iter_mut().for_each(|slot| slot.buffer = None);
        (self.free, self.broken) = (self.depth(), false);
    }
}

#[cold]
fn full(buffer: Option<DmaBuffer>) -> Refused {
    let error = Error::new(ErrorKind::InUse, "submit", "a command")
        .because("the queue is full, or has ended")
        .remedy("take completions first");
    Refused { error, buffer }
}

/// DMA memory in parts of these sizes, each of which begins at a page of the controller's; and a rest.
fn memory<const N: usize>(
    space: &DmaSpace,
    sizes: [usize; N],
    page: usize,
) -> Result<([DmaBuffer; N], DmaBuffer)> {
    let sizes = sizes.map(|size| size.next_multiple_of(page));
    let placement = IovaPlacement::Anywhere { alignment: page as u64, limit: u64::MAX };
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
