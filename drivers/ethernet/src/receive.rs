//! Receive queues (82576 datasheet §7.1, 82574 datasheet §7.1).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::device::Vector;
use vfio_remap::transport::AddressSpaceId;
use vfio_remap::{Error, ErrorKind, IoRegisterBlock, Result};

use super::descriptors::{Descriptors, HASH, Received, STATUS};
use super::interrupts::Waker;
use super::nic::{Direction, Memory, Nic, Started};
use super::offload::Request;
use super::pool::{Frame, Pool, foreign};
use super::registers::Ring;
use super::wait::WATCH;

/// After how many buffers the card is told of them, if frames come one after the other: a quarter of the ring,
/// and this many at most. Telling it costs more than a frame.
const TELL_AFTER: usize = 64;

/// After how many looks in vain it is seen whether the card is well, unless that was seen just now.
const LOOK: u32 = 64;

/// A receive queue of a [`Nic`], for one thread; dropped, the card forgets it.
///
/// It has a register window of its own: see [`registers`](Self::registers) for what that does not keep apart.
pub struct Receiver {
    nic: Arc<Nic>,
    queue: u16,
    waker: Waker,
    ring: IoRegisterBlock<Ring>,
    descriptors: Option<Descriptors>,
    /// The buffer of each descriptor that the card has.
    slots: Box<[Option<Frame>]>,
    /// The number of descriptors, less one: they are a power of two.
    mask: usize,
    /// The next descriptor to look at.
    next: usize,
    /// The next one to fill; what is between is the card's, as far as it was told.
    fill: usize,
    /// The tail that the card knows.
    told: usize,
    /// The size of a buffer, as the card knows it.
    buffer_size: usize,
    /// Where the card reaches buffers.
    space: AddressSpaceId,
    /// The next descriptor goes on with a frame that is dropped.
    within_dropped: bool,
    dropped: u64,
    /// The generation of the card that knows the queue.
    generation: u32,
    /// Looks in vain since the clock was looked at, and when the card was.
    polls: u32,
    watched: Option<Instant>,
}

impl Receiver {
    pub(crate) fn new(nic: Arc<Nic>, queue: u16) -> Result<Self> {
        let offset = nic.hardware().model.receive_ring(queue);
        let entries = nic.settings().receive_entries.into();
        let Started { ring, descriptors, waker, generation } =
            nic.start(Direction::Receive, queue, offset, entries)?;
        Ok(Self {
            waker,
            buffer_size: nic.buffer_size(),
            space: nic.address_space(),
            nic,
            queue,
            ring,
            slots: std::iter::repeat_with(|| None).take(entries).collect(),
            mask: descriptors.len() - 1,
            descriptors: Some(descriptors),
            next: 0,
            fill: 0,
            told: 0,
            within_dropped: false,
            dropped: 0,
            generation,
            polls: 0,
            watched: None,
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

    /// The bytes of BAR 0 that this queue's window shows, and no others can be reached through it.
    ///
    /// What the processor maps is the page that they lie on. The registers of *all* receive queues share one
    /// page in both cards, and those of all transmit queues another (82576 datasheet §8.10 and §8.12: 0xc000
    /// and 0xe000, 0x40 bytes each; 82574 datasheet §10.2: 0x2800 and 0x3800, 0x100 bytes each). So a
    /// window is never exclusive: it keeps a thread's registers apart from others', but not from a stray
    /// pointer. Give queues to threads that trust each other.
    pub fn registers(&self) -> Range<u64> {
        let start = self.nic.hardware().model.receive_ring(self.queue);
        start..start + 0x40
    }

    /// Whether the registers are reached through a window, rather than by calls of the transport.
    pub fn has_window(&self) -> bool {
        self.ring.is_mapped()
    }

    /// Frames that were dropped since they did not fit into a buffer, or the card said that they are
    /// damaged.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How many buffers the card has, filled or not.
    pub fn outstanding(&self) -> usize {
        self.fill.wrapping_sub(self.next) & self.mask
    }

    /// Looks at `limit` buffers at most, moves the frames that have come to the end of `frames`, and gives the card
    /// buffers of the pool in their place, as many as the ring has room for. How many there were.
    ///
    /// It neither allocates nor copies if `frames` has room, and makes no system call if the registers
    /// [have a window](Self::has_window). While the pool is empty, the card goes on with the buffers that it
    /// has, and loses frames when there are none left.
    ///
    /// # Errors
    /// `OutOfRange` if the pool's buffers are smaller than the card takes them for: it would write past
    /// their ends. `Unsupported` if they are in an address space that the card does not reach ([`Pool`]). What the
    /// transport answers; frames that have come are then in `frames` all the same.
    #[inline]
    pub fn receive(
        &mut self,
        pool: &mut Pool,
        frames: &mut Vec<Frame>,
        limit: usize,
    ) -> Result<usize> {
        if pool.buffer_size() < self.buffer_size || pool.address_space() != self.space {
            return Err(self.unsuitable(pool));
        }
        let before = frames.len();
        if let Some(descriptors) = &self.descriptors {
            let (mut next, mask) = (self.next, self.mask);
            let buffer_size = self.buffer_size as u32;
            // The longest that is received: nothing, in the middle of a frame that is dropped.
            let mut longest = if self.within_dropped { 0 } else { buffer_size };
            let outstanding = self.outstanding();
            let slots = &mut self.slots[..];
            for _ in 0..limit.min(outstanding) {
                let received = Received(descriptors.load(next, STATUS));
                if !received.is_done() {
                    break;
                }
                let hash = descriptors.load(next, HASH);
                let Some(mut frame) = slots[next].take() else { break };
                let len = received.len();
                // None has no bytes.
                if received.is_whole() && len.wrapping_sub(1) < longest {
                    let inner = &mut *frame.0;
                    (inner.len, inner.received, inner.hash) = (len, received, hash);
                    inner.request = Request::default();
                    frames.push(frame);
                } else {
                    self.dropped += u64::from(received.is_end());
                    longest = if received.is_end() { buffer_size } else { 0 };
                    put_back(pool, frame);
                }
                next = (next + 1) & mask;
            }
            self.within_dropped = longest == 0;
            self.next = next;
        }
        let count = frames.len() - before;
        self.polls = if count == 0 { self.polls + 1 } else { 0 };
        if self.polls >= LOOK || self.generation != self.nic.generation() {
            self.watch()?;
        }
        self.refill(pool, count == 0)?;
        Ok(count)
    }

    /// [Looks](Self::look), now and then.
    #[cold]
    #[inline(never)]
    fn watch(&mut self) -> Result<()> {
        self.polls = 0;
        let just_now = self.watched.is_some_and(|watched| watched.elapsed() < WATCH);
        if just_now && self.generation == self.nic.generation() { Ok(()) } else { self.look() }
    }

    /// Whether the card is well, and knows the queue: if not, it is reset, and told.
    #[cold]
    fn look(&mut self) -> Result<()> {
        self.watched = Some(Instant::now());
        if self.generation == self.nic.generation() {
            let knows = self.nic.hardware().knows(&self.ring, self.mask + 1)?;
            if knows {
                return Ok(());
            }
            log::warn!("{}: something has reset it", self.nic.name());
            self.nic.recover(self.generation)?;
        }
        // What has come before is received first, now or next time.
        if self.has_frame() { Ok(()) } else { self.restart() }
    }

    /// Has the card, which was reset, know the queue again, with the buffers that it had.
    fn restart(&mut self) -> Result<()> {
        let Some(descriptors) = &self.descriptors else { return Ok(()) };
        self.nic.is_quiet(self.generation).map_err(|failed| {
            failed.unwrap_or_else(|| Error::new(ErrorKind::Gone, "use", self.nic.name()))
        })?;
        let held: Vec<_> = self.slots.iter_mut().filter_map(Option::take).collect();
        (self.next, self.fill, self.told, self.within_dropped) = (0, 0, 0, false);
        for frame in held {
            descriptors.store_entry(self.fill, [frame.0.iova.0, 0]);
            self.slots[self.fill] = Some(frame);
            self.fill += 1;
        }
        let iova = descriptors.iova(0).0;
        self.generation = self.nic.restart(Direction::Receive, &self.ring, iova, self.mask + 1)?;
        self.tell()
    }

    /// Gives the card buffers, and tells it of them: at once where it may wait for them.
    #[inline]
    fn refill(&mut self, pool: &mut Pool, idle: bool) -> Result<()> {
        let Some(descriptors) = &self.descriptors else { return Ok(()) };
        let mut fill = self.fill;
        // One stays empty: a ring whose tail is its head has nothing for the card.
        let (room, mask) = (self.mask - self.outstanding(), self.mask);
        let slots = &mut self.slots[..];
        for frame in pool.take_some(room) {
            descriptors.store_entry(fill, [frame.0.iova.0, 0]);
            // There is none in it to drop.
            std::mem::forget(slots[fill].replace(frame));
            fill = (fill + 1) & mask;
        }
        self.fill = fill;
        let untold = fill.wrapping_sub(self.told) & self.mask;
        let enough = TELL_AFTER.min(self.slots.len() / 4);
        if untold >= enough || idle { self.tell() } else { Ok(()) }
    }

    /// Waits until a frame has come, and whether one has in time: polls for [`Settings::poll`], then sleeps
    /// until the queue interrupts, or takes naps if it has no [vector](Self::vector). The card is told of all
    /// buffers first.
    ///
    /// An interrupt that gets lost costs 50 ms, and no frame. If something has reset the card, it is brought up
    /// again.
    ///
    /// [`Settings::poll`]: super::Settings::poll
    ///
    /// # Errors
    /// What the transport answers.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let mut poll = self.nic.settings().poll;
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if self.generation == self.nic.generation() {
                self.tell()?;
            } else {
                self.look()?;
            }
            let left = deadline
                .map_or(WATCH, |deadline| deadline.saturating_duration_since(Instant::now()));
            if self.waker.wait(poll, left.min(WATCH), || self.has_frame())? {
                return Ok(true);
            }
            self.look()?;
            if left <= WATCH {
                return Ok(self.has_frame());
            }
            poll = Duration::ZERO;
        }
    }

    /// Whether a frame has come.
    pub fn has_frame(&self) -> bool {
        let done =
            |descriptors: &Descriptors| Received(descriptors.load(self.next, STATUS)).is_done();
        self.next != self.fill && self.descriptors.as_ref().is_some_and(done)
    }

    /// The vector that fires when a frame has come, for an event loop; `None` if it has none, without
    /// [interrupts](super::Settings::interrupts) or since there are not as many. It fires once after each
    /// [`arm`](Self::arm).
    pub fn vector(&self) -> Option<&Vector> {
        self.waker.vector()
    }

    /// Has the [vector](Self::vector) fire when the next frame comes. Look [whether one has](Self::has_frame)
    /// afterwards, and before going to sleep: for one that has come before, it may not.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn arm(&mut self) -> Result<()> {
        self.watch()?;
        self.tell()?;
        self.waker.arm()
    }

    /// Has the [vector](Self::vector) not fire any more: a queue that is polled again need not interrupt.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn disarm(&mut self) -> Result<()> {
        self.waker.disarm()
    }

    /// Tells the card of all buffers.
    fn tell(&mut self) -> Result<()> {
        if self.told != self.fill {
            self.told = self.fill;
            self.ring.write(Ring::TAIL, self.fill as u32)?;
        }
        Ok(())
    }

    #[cold]
    fn unsuitable(&self, pool: &Pool) -> Error {
        if pool.address_space() != self.space {
            return foreign("receive", "frames", &self.nic);
        }
        let size = pool.buffer_size();
        Error::new(ErrorKind::OutOfRange, "fill", format!("receive queue {}", self.queue))
            .with_reason(format!(
                "the pool's buffers have {size} bytes, and {} takes them for {}",
                self.nic.name(),
                self.buffer_size
            ))
            .with_advice("make the pool by Nic::pool of this card")
    }

    /// Has the card forget the queue, and puts all its buffers into the pool. Frames that have come and were
    /// not received are lost.
    ///
    /// # Errors
    /// If the card does not say that it has stopped: the memory that it may still write to is kept until it
    /// cannot, at [`Nic::close`] at the latest.
    pub fn stop(mut self, pool: &mut Pool) -> Result<()> {
        let memory = self.release()?;
        pool.take_back(memory.frames);
        Ok(())
    }

    /// Has the card forget the queue; what it had.
    fn release(&mut self) -> Result<Memory> {
        let frames = self.slots.iter_mut().filter_map(Option::take).collect();
        let memory = Memory { ring: self.descriptors.take(), frames };
        self.nic.stop(Direction::Receive, self.queue, &self.ring, self.generation, memory)
    }
}

/// Out of line, so that a frame that is not dropped does not pay for it.
#[cold]
#[inline(never)]
fn put_back(pool: &mut Pool, frame: Frame) {
    pool.reclaim(frame);
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.descriptors.is_some()
            && let Err(error) = self.release()
        {
            log::warn!("{}: {error}", self.nic.name());
        }
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receiver({} of {}, {} buffers)", self.queue, self.nic.name(), self.outstanding())
    }
}
