//! Transmit queues (82576 datasheet §7.2, 82574 datasheet §7.2).

mod write;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::device::Vector;
use vfio_remap::transport::AddressSpaceId;
use vfio_remap::{Error, ErrorKind, IoRegisterBlock, Result};

use super::descriptors::{Descriptors, STATUS, transmit};
use super::interrupts::Waker;
use super::nic::{Direction, Memory, Nic, Started};
use super::offload::Request;
use super::pool::{Frame, Pool, foreign};
use super::registers::Ring;
use super::wait::{self, WATCH};
use write::{Kind, Writer};

/// The shortest frame that is sent: an Ethernet header, and what the cards' datasheets ask for (82576
/// §7.2.1.1, 17 bytes). Shorter ones than 60 bytes are padded.
pub const SHORTEST: usize = 17;
/// The most bytes of a buffer of a packet that has several.
const MOST_OF_BUFFER: usize = 16 << 10;
/// The most bytes, with the header of IP, that segments are made of.
const MOST_SEGMENTED: usize = 0xffff;
/// How long frames may take to be sent when the queue is stopped.
const SEND: Duration = Duration::from_millis(500);

/// A transmit queue of a [`Nic`], for one thread; dropped, the card forgets it.
///
/// It has a register window of its own: see [`Receiver::registers`](super::Receiver::registers) for what
/// that does not keep apart.
pub struct Transmitter {
    nic: Arc<Nic>,
    queue: u16,
    waker: Waker,
    ring: IoRegisterBlock<Ring>,
    descriptors: Option<Descriptors>,
    slots: Box<[Slot]>,
    /// The number of descriptors, less one: they are a power of two.
    mask: usize,
    /// The next descriptor that may be sent.
    clean: usize,
    /// The next one to fill, and the tail that the card knows.
    tail: usize,
    kind: Kind,
    longest: usize,
    /// Where the card reaches buffers.
    space: AddressSpaceId,
    /// The context that the card has.
    context: Option<[u64; 2]>,
    /// The generation of the card that knows the queue.
    generation: u32,
    /// Since when the card was seen to have sent nothing, and when it was looked at.
    stalled: Option<Instant>,
    watched: Option<Instant>,
    lost: u64,
}

/// What a packet needs.
struct Plan {
    frames: usize,
    descriptors: usize,
}

/// Why a packet cannot be sent.
enum Refused {
    /// For its length, which is this, or for its parts.
    Shape(usize, &'static str),
    /// The card does not reach a buffer of it.
    Foreign,
}

/// What a descriptor was filled with.
#[derive(Default)]
struct Slot {
    frame: Option<Frame>,
    /// The descriptor that says when the batch that begins here is sent.
    last: usize,
}

impl Transmitter {
    pub(crate) fn new(nic: Arc<Nic>, queue: u16) -> Result<Self> {
        let model = nic.model();
        let entries = nic.settings().transmit_entries.into();
        let Started { ring, descriptors, waker, generation } =
            nic.start(Direction::Transmit, queue, model.transmit_ring(queue), entries)?;
        Ok(Self {
            waker,
            longest: nic.longest_frame(),
            space: nic.address_space(),
            nic,
            queue,
            ring,
            slots: std::iter::repeat_with(Slot::default).take(entries).collect(),
            mask: descriptors.len() - 1,
            descriptors: Some(descriptors),
            clean: 0,
            tail: 0,
            kind: Kind::new(model),
            context: None,
            generation,
            stalled: None,
            watched: None,
            lost: 0,
        })
    }

    /// The queue's number.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// The card that it belongs to.
    pub fn nic(&self) -> &Arc<Nic> {
        &self.nic
    }

    /// The bytes of BAR 0 that this queue's window shows: see
    /// [`Receiver::registers`](super::Receiver::registers).
    pub fn registers(&self) -> Range<u64> {
        let start = self.nic.hardware().model.transmit_ring(self.queue);
        start..start + 0x40
    }

    /// Whether the registers are reached through a window, rather than by calls of the transport.
    pub fn has_window(&self) -> bool {
        self.ring.is_mapped()
    }

    /// Frames that were not yet seen to be sent.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.tail.wrapping_sub(self.clean) & self.mask
    }

    /// How many frames the ring has room for.
    #[inline]
    pub fn room(&self) -> usize {
        // One stays empty: a ring whose tail is its head has nothing for the card.
        self.mask - self.outstanding()
    }

    /// Gives the card frames from the front of `frames`, as many as the ring has room for, and tells it of
    /// them once for all. How many there were; the others stay in `frames`. A packet of several frames is
    /// sent whole or not at all.
    ///
    /// Buffers of frames that were sent go to `pool`, if the ring has no room for all without them. It
    /// neither allocates nor copies, unless the pool is given more buffers than it was made with, and makes
    /// no system call if the registers [have a window](Self::has_window).
    ///
    /// # Errors
    /// `OutOfRange` if the first packet is shorter than 17 bytes or longer than the card sends, has no end,
    /// or more buffers than the ring has room for; `Unsupported` if a buffer of it, or the pool, is in an address
    /// space that the card does not reach ([`Pool`]). Packets before such a one are sent first. What the transport
    /// answers.
    #[inline]
    pub fn transmit(&mut self, frames: &mut Vec<Frame>, pool: &mut Pool) -> Result<usize> {
        if pool.address_space() != self.space {
            return Err(foreign("send", "frames", &self.nic));
        }
        if self.generation != self.nic.generation() {
            self.restart(pool)?;
        }
        if self.room() < 2 * frames.len() {
            self.reclaim(pool);
        }
        let mut room = self.room();
        let mut count = 0;
        let result = loop {
            // Mostly they are all like that.
            let some = &frames[..frames.len().min(room)];
            let (space, longest) = (self.space, self.longest);
            let is_simple = |frame: &&Frame| frame.is_simple(space, longest);
            let simple = some.iter().take_while(is_simple).count();
            self.put(frames, simple, true);
            (count, room) = (count + simple, room - simple);
            if frames.is_empty() || room == 0 {
                break Ok(count);
            }
            match self.plan(frames) {
                Ok(plan) if plan.descriptors <= room => {
                    let before = self.tail;
                    self.put(frames, plan.frames, false);
                    count += plan.frames;
                    room -= self.tail.wrapping_sub(before) & self.mask;
                }
                Ok(_) => break Ok(count),
                // Those before it are sent first.
                Err(_) if count > 0 => break Ok(count),
                Err(refused) => break Err(self.refused(refused)),
            }
        };
        if count > 0 {
            self.ring.write(Ring::TAIL, self.tail as u32)?;
        }
        result
    }

    /// Why a packet cannot be sent.
    #[cold]
    fn refused(&self, refused: Refused) -> Error {
        let Refused::Shape(len, reason) = refused else {
            return foreign("send", "a packet", &self.nic);
        };
        Error::new(ErrorKind::OutOfRange, "send", format!("a packet of {len} bytes"))
            .with_reason(format!(
                "that {reason}: {} sends {SHORTEST} to {} bytes in a frame",
                self.nic.name(),
                self.longest
            ))
            .with_advice("split it, or bring the card up with a larger MTU (Settings::mtu)")
    }

    /// What the first packet needs, which the card can send; or why it cannot. Its length is noted at its first
    /// frame.
    fn plan(&self, frames: &mut [Frame]) -> std::result::Result<Plan, Refused> {
        let (mut len, mut pieces) = (0usize, 0);
        let (mut fits, mut is_reached) = (true, true);
        let end = frames.iter().position(|frame| {
            len = len.saturating_add(frame.len());
            pieces += frame.pieces();
            fits &= (1..=MOST_OF_BUFFER).contains(&frame.len());
            is_reached &= frame.0.space == self.space;
            !frame.goes_on()
        });
        if !is_reached {
            return Err(Refused::Foreign);
        }
        let shape = |reason| Err(Refused::Shape(len, reason));
        let Some(last) = end else { return shape("is a packet without an end") };
        let Some(first) = frames.first_mut() else { return shape("is a packet without a frame") };
        first.0.packet = len as u32;
        let request = first.0.request;
        // One more for the context.
        let plan = Plan { frames: last + 1, descriptors: pieces + 1 };
        if plan.descriptors > self.mask {
            return shape("is in more pieces than the ring has room for");
        }
        if !fits || len < SHORTEST {
            let reason = "is too short, or has a frame without a byte or with more than 16 KiB";
            return shape(reason);
        }
        if !request.has(Request::SEGMENTS) {
            return if len <= self.longest { Ok(plan) } else { shape("is too long") };
        }
        let headers = request.headers_len();
        if first.len() < headers || headers + usize::from(request.mss) > self.longest {
            return shape("has segments that are too long, or headers that are no longer there");
        }
        if len - usize::from(request.ethernet) > MOST_SEGMENTED || len == headers {
            return shape("has no data to make segments of, or more than IP allows");
        }
        Ok(plan)
    }

    /// Writes the descriptors of the first `count` frames, for which there is room: each is simple, or all are
    /// one packet.
    #[inline]
    fn put(&mut self, frames: &mut Vec<Frame>, count: usize, are_simple: bool) {
        let Some(descriptors) = self.descriptors.as_ref().filter(|_| count > 0) else { return };
        let mut writer = Writer {
            kind: self.kind,
            descriptors,
            slots: &mut self.slots,
            context: &mut self.context,
            mask: self.mask,
            tail: self.tail,
        };
        if are_simple {
            writer.write(frames.drain(..count));
        } else {
            writer.write_packet(frames.drain(..count));
        }
        self.tail = writer.tail;
    }

    /// Puts the buffers of frames that were sent into the pool. How many there were. Buffers that are too small
    /// for the pool are released. None, if the pool is in an address space that the card does not reach.
    #[inline]
    pub fn reclaim(&mut self, pool: &mut Pool) -> usize {
        let ours = pool.address_space() == self.space;
        let Some(descriptors) = self.descriptors.as_ref().filter(|_| ours) else { return 0 };
        let mut count = 0;
        while self.clean != self.tail {
            let last = self.slots[self.clean].last;
            if descriptors.load(last, STATUS) & transmit::DONE == 0 {
                break;
            }
            // In two parts, if it goes past the end of the ring.
            let end = if last < self.clean { self.mask } else { last };
            for slot in &mut self.slots[self.clean..=end] {
                if let Some(frame) = slot.frame.take() {
                    pool.reclaim(frame);
                    count += 1;
                }
            }
            if end != last {
                self.slots[0].last = last;
            }
            self.clean = (end + 1) & self.mask;
        }
        if count > 0 || self.clean == self.tail {
            self.stalled = None;
        } else {
            self.watch();
        }
        count
    }

    /// [Looks](Self::look), now and then: a program may come here often, or seldom.
    #[cold]
    #[inline(never)]
    fn watch(&mut self) {
        if self.watched.is_none_or(|watched| watched.elapsed() >= WATCH) {
            self.look();
        }
    }

    /// Whether the card goes on sending: if not for too long, it is reset.
    #[cold]
    fn look(&mut self) {
        self.watched = Some(Instant::now());
        if self.generation != self.nic.generation() {
            return;
        }
        let limit = self.nic.settings().timeout;
        let hangs = self.stalled.get_or_insert_with(Instant::now).elapsed() >= limit;
        let knows = self.nic.hardware().knows(&self.ring, self.mask + 1);
        if !hangs && matches!(knows, Ok(true)) {
            return;
        }
        self.stalled = None;
        // Without a link, frames wait for it.
        if matches!(knows, Ok(true)) && matches!(self.nic.link(), Ok(None)) {
            return;
        }
        log::warn!("{}: transmit queue {} hangs, or was reset", self.nic.name(), self.queue);
        // Said in the log, and when frames are sent next.
        let _ = self.nic.recover(self.generation);
    }

    /// Has the card, which was reset, know the queue again. Frames that it has not sent are lost.
    #[cold]
    fn restart(&mut self, pool: &mut Pool) -> Result<()> {
        self.reclaim(pool);
        self.nic.is_quiet(self.generation).map_err(|failed| {
            failed.unwrap_or_else(|| Error::new(ErrorKind::Gone, "use", self.nic.name()))
        })?;
        for slot in &mut self.slots {
            if let Some(frame) = slot.frame.take() {
                pool.reclaim(frame);
                self.lost += 1;
            }
        }
        (self.clean, self.tail, self.context, self.stalled) = (0, 0, None, None);
        let Some(descriptors) = &self.descriptors else { return Ok(()) };
        let iova = descriptors.iova(0).0;
        self.generation = self.nic.restart(Direction::Transmit, &self.ring, iova, self.mask + 1)?;
        Ok(())
    }

    /// Frames that the card had when it was reset, and that nobody knows to be sent.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Waits until frames can be [reclaimed](Self::reclaim), and whether they can in time; at once if there are
    /// none. It polls and sleeps as [`Receiver::wait`](super::Receiver::wait) does.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let mut poll = self.nic.settings().poll;
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline
                .map_or(WATCH, |deadline| deadline.saturating_duration_since(Instant::now()));
            if self.waker.wait(poll, left.min(WATCH), || self.has_sent())? {
                return Ok(true);
            }
            self.look();
            // All are, once they are lost.
            let is_over = self.generation != self.nic.generation();
            if is_over || left <= WATCH {
                return Ok(is_over || self.has_sent());
            }
            poll = Duration::ZERO;
        }
    }

    /// Whether frames can be reclaimed, or there are none.
    fn has_sent(&self) -> bool {
        let last = self.slots[self.clean].last;
        let done = |descriptors: &Descriptors| descriptors.load(last, STATUS) & transmit::DONE != 0;
        self.clean == self.tail || self.descriptors.as_ref().is_some_and(done)
    }

    /// The vector that fires when frames were sent: see [`Receiver::vector`](super::Receiver::vector).
    pub fn vector(&self) -> Option<&Vector> {
        self.waker.vector()
    }

    /// Waits until all frames are sent, for half a second at most, has the card forget the queue, and puts
    /// all its buffers into the pool, also of frames that were not sent in time. How many those are.
    ///
    /// # Errors
    /// If the card does not say that it has stopped: the memory that it may still read is kept until it
    /// cannot, at [`Nic::close`] at the latest.
    pub fn stop(mut self, pool: &mut Pool) -> Result<usize> {
        wait::until(SEND, || {
            self.reclaim(pool);
            let is_over = self.outstanding() == 0 || self.generation != self.nic.generation();
            Ok(is_over.then_some(()))
        })?;
        let unsent = self.outstanding();
        pool.take_back(self.release()?.frames);
        Ok(unsent)
    }

    /// Has the card forget the queue; what it had.
    fn release(&mut self) -> Result<Memory> {
        let frames = self.slots.iter_mut().filter_map(|slot| slot.frame.take()).collect();
        let memory = Memory { ring: self.descriptors.take(), frames };
        self.nic.stop(Direction::Transmit, self.queue, &self.ring, self.generation, memory)
    }
}

impl Drop for Transmitter {
    fn drop(&mut self) {
        if self.descriptors.is_some()
            && let Err(error) = self.release()
        {
            log::warn!("{}: {error}", self.nic.name());
        }
    }
}

impl fmt::Debug for Transmitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outstanding = self.outstanding();
        write!(f, "Transmitter({} of {}, {outstanding} frames)", self.queue, self.nic.name())
    }
}
