//! What a thread does its I/O with.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::{Error, Result};

use super::controller::{Condition, Controller};
use super::doorbells::Doorbells;
use super::pair::{Done, QueuePair, Shape};

/// Empty polls after which a polled queue looks at the clock, which may cost as much as many of them; and
/// how many of these a batch counts for.
const LOOK: u32 = 1 << 14;
const BATCH: u32 = 1 << 4;
/// How often commands that are late are looked for.
const SCAN: Duration = Duration::from_millis(10);
/// How long an interrupt is waited for before the queue looks whether all is well, and how often it asks
/// the controller.
const WATCH: Duration = Duration::from_millis(50);
/// How often a controller is reset in a row before it is given up.
const RESETS: u32 = 3;

/// A pair of queues of a [`Controller`], for one thread; dropped, the controller forgets it.
///
/// Requests are put into the queue ([`read`](Self::read), [`write`](Self::write), …), the controller is
/// told of them once for all ([`ring`](Self::ring)), and they come back when they are done, in any order
/// ([`pop`](Self::pop), [`wait`](Self::wait)). A request holds its buffer until then.
///
/// A command that does not end within [`Settings::timeout`](super::Settings::timeout) is aborted, and if
/// that is in vain, or the controller has failed, the controller is reset. All commands that were with
/// it end as [aborted by the host](super::Status::ABORTED_BY_HOST), and the queue goes on. Whatever
/// happens, [`wait`](Self::wait) gives an answer within that time, the grace for the abort, the time-out of
/// the admin queue, twice, and three times what a reset may take (six times CAP.TO, and
/// [`Settings::disable_delay`](super::Settings::disable_delay), twice).
pub struct IoQueue {
    pub(super) pair: QueuePair,
    /// Commands that a reset has ended.
    ended: VecDeque<Done>,
    pub(super) controller: Arc<Controller>,
    pub(super) max_transfer: usize,
    id: u16,
    vector: Option<usize>,
    /// The generation of the controller that knows the queue.
    generation: u32,
    /// Why the queue could not be created again.
    pub(super) failed: Option<Error>,
    born: Instant,
    /// Since the clock was looked at.
    polls: u32,
    /// When commands that are late were looked for.
    scanned: u32,
    /// When the controller was asked how it is, in milliseconds since the queue was made.
    checked: u32,
}

impl IoQueue {
    pub(super) fn new(controller: Arc<Controller>, id: u16) -> Result<Self> {
        let (entries, page_shift) = controller.queue_shape();
        let max_transfer = controller.identity().max_transfer;
        let vector = controller.vector(id);
        // An interrupt may be held back until what it told of before is acknowledged.
        let acknowledge_after = if vector.is_some() { 1 } else { entries.div_ceil(2) };
        let shape = Shape { entries, page_shift, max_transfer, acknowledge_after };
        let doorbells = Doorbells::new(controller.device(), id, controller.stride())?;
        let mut pair = QueuePair::new(controller.space(), doorbells, &shape)?;
        let attached = controller.attach(&pair, id);
        let generation = attached.inspect_err(|_| controller.discard(&mut pair))?;
        Ok(Self {
            ended: VecDeque::with_capacity(usize::from(entries)),
            pair,
            controller,
            max_transfer,
            id,
            vector,
            generation,
            failed: None,
            born: Instant::now(),
            polls: 0,
            scanned: 0,
            checked: 0,
        })
    }

    /// The queue's number.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The controller that it belongs to.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// The bytes of BAR 0 that this queue's window shows; `None` where doorbells are no memory.
    pub fn doorbell_range(&self) -> Option<std::ops::Range<u64>> {
        self.pair.doorbells().range()
    }

    /// Which generation of the controller knows the queue: another one than before means that what was
    /// written since the last flush may be lost.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// How many commands can be with the controller at a time.
    pub fn depth(&self) -> usize {
        usize::from(self.pair.entries()) - 1
    }

    /// Commands that have not come back.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.pair.outstanding() + self.ended.len()
    }

    /// How many more can be submitted.
    #[inline]
    pub fn room(&self) -> usize {
        self.pair.room()
    }

    /// Tells the controller of all that was submitted.
    #[inline]
    pub fn ring(&mut self) {
        if self.generation == self.controller.generation() {
            self.pair.ring();
        }
        self.polls += BATCH;
        if self.polls >= LOOK {
            self.look();
        }
    }

    /// The next command that is done, if one is. Like [`wait`](Self::wait), it looks now and then whether
    /// all is well, and may then take as long.
    #[inline]
    pub fn pop(&mut self) -> Option<Done> {
        if let Some(done) = self.pair.pop() {
            return Some(done);
        }
        if self.idle() { self.ended.pop_front() } else { None }
    }

    /// Nothing was completed: the controller may wait for room to complete more. Whether a reset has ended
    /// commands.
    #[inline(never)]
    fn idle(&mut self) -> bool {
        if self.generation == self.controller.generation() {
            self.pair.acknowledge();
        }
        self.polls += 1;
        if self.polls >= LOOK {
            self.look();
        }
        !self.ended.is_empty()
    }

    /// The next command that is done; `None` if none is outstanding. Rings the doorbells. A failed queue has been
    /// created again if possible, and has room.
    #[inline]
    pub fn wait(&mut self) -> Option<Done> {
        self.ring();
        loop {
            if let Some(done) = self.pop() {
                return Some(done);
            }
            if self.outstanding() == 0 {
                self.mend();
                return None;
            }
            self.pause();
        }
    }

    /// A queue that was broken by the last completion is created again, although nothing waits for that.
    #[cold]
    fn mend(&mut self) {
        if self.pair.is_broken() && self.failed.is_none() {
            self.look();
        }
    }

    /// Nothing was done: polls on, or sleeps until an interrupt.
    #[inline]
    fn pause(&mut self) {
        if let Some(vector) = self.vector {
            self.sleep(vector);
            return;
        }
        // `pop` has just looked.
        if self.polls == 0 {
            self.pair.ring();
            // Others may need the processor to get on: an emulated controller, for one.
            std::thread::yield_now();
        }
    }

    fn sleep(&mut self, vector: usize) {
        self.pair.ring();
        match self.controller.wait(vector, WATCH) {
            Ok(0) => self.look(),
            Ok(_) => {}
            Err(error) => {
                log::warn!("nvme: polling instead: {error}");
                self.vector = None;
            }
        }
    }

    /// Whether all is well: no command late, the controller working and the same as before.
    #[cold]
    #[inline(never)]
    pub(super) fn look(&mut self) {
        self.polls = 0;
        let now = self.born.elapsed().as_millis() as u32;
        if self.generation != self.controller.generation() {
            return self.rebuild();
        }
        if self.failed.is_some() {
            return;
        }
        if self.pair.is_broken() {
            return self.recover();
        }
        if now.wrapping_sub(self.scanned) < millis(SCAN) {
            return;
        }
        self.scanned = now;
        let limit = millis(self.controller.settings().timeout);
        if let Some(command) = self.pair.overdue(now, limit) {
            return self.late(command, now, limit);
        }
        if now.wrapping_sub(self.checked) >= millis(WATCH) {
            self.checked = now;
            if self.pair.outstanding() > 0
                && let Err(error) = self.controller.check()
            {
                log::warn!("nvme: {error}");
                self.recover();
            }
        }
    }

    /// A command is late: it is aborted, and if it was before, the controller is reset.
    fn late(&mut self, command: u16, now: u32, limit: u32) {
        let grace = millis(self.controller.settings().grace);
        let first = self.pair.abort(command, now, limit, grace);
        log::warn!("nvme: command {command} of queue {} is late", self.id);
        if !first {
            return self.recover();
        }
        if let Err(error) = self.controller.abort(self.id, command) {
            log::warn!("nvme: {error}");
            self.recover();
        }
    }

    fn recover(&mut self) {
        self.controller.recover(self.generation);
        self.rebuild();
    }

    /// The controller was reset: all commands have ended, and the queue is created again.
    fn rebuild(&mut self) {
        for _ in 0..RESETS {
            let Condition { generation, quiet, failed } =
                self.controller.condition(self.generation);
            self.pair.end_all(quiet, |done| self.ended.push_back(done));
            self.generation = generation;
            self.failed = failed;
            if self.failed.is_some() {
                return;
            }
            self.pair.reset();
            match self.controller.attach(&self.pair, self.id) {
                Ok(generation) => {
                    self.generation = generation;
                    return;
                }
                Err(error) => {
                    log::warn!("nvme: {error}");
                    self.pair.break_off();
                    self.failed = Some(error);
                    self.controller.recover(generation);
                }
            }
        }
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        self.controller.detach(self.id, self.generation, &mut self.pair);
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
