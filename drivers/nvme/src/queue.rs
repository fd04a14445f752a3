//! I/O queues.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::transport::AddressSpaceId;
use vfio_remap::{Error, Result};

use super::controller::{Condition, Controller};
use super::doorbells::Doorbells;
use super::pair::{Completion, QueuePair, QueueShape};
use super::settings::Settings;
use super::spin::{Spin, Wait};

/// A polled queue reads the clock after this many empty polls, because the clock costs as much as many polls;
/// and how many polls a batch counts for.
const POLLS_PER_CHECK: u32 = 1 << 14;
const POLLS_PER_BATCH: u32 = 1 << 4;
/// The interval between two searches for overdue commands.
const SCAN_INTERVAL: Duration = Duration::from_millis(10);
/// The time limit of a wait for an interrupt, after which the queue is checked; and the interval between two
/// checks of the controller.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// How often a controller is reset in a row before the queue fails.
const MAX_RESETS: u32 = 3;

/// A pair of queues of a [`Controller`], for one thread. Dropping it deletes the queues of the controller.
///
/// [`read`](Self::read), [`write`](Self::write) and others put commands into the queue. [`ring`](Self::ring)
/// notifies the controller of all of them at once. [`pop`](Self::pop) and [`wait`](Self::wait) return
/// completions, in any order. The queue holds a command's buffer until then.
///
/// A command that does not complete within [`Settings::timeout`](super::Settings::timeout) is aborted. If that
/// has no effect, or the controller has failed, the controller is reset. All outstanding commands then complete
/// with [`ABORTED_BY_HOST`](super::Status::ABORTED_BY_HOST), and the queue can be used again.
/// [`wait`](Self::wait) always returns within the sum of that time, the grace for the abort, twice the time
/// limit of the admin queue, and three times the limit of a reset (six times CAP.TO, and twice
/// [`Settings::disable_delay`](super::Settings::disable_delay)).
pub struct IoQueue {
    pub(super) pair: QueuePair,
    /// Completions of commands that a reset has ended.
    ended: VecDeque<Completion>,
    pub(super) controller: Arc<Controller>,
    pub(super) max_transfer: usize,
    /// The address space that the controller reaches.
    pub(super) space: AddressSpaceId,
    id: u16,
    vector: Option<usize>,
    spin: Spin,
    sleeps: u64,
    /// The generation of the controller in which the queue was created.
    generation: u32,
    /// Why the queue could not be created again.
    pub(super) failed: Option<Error>,
    created: Instant,
    /// Polls since the clock was read.
    polls: u32,
    /// When overdue commands were last searched, in milliseconds since the queue was made.
    scanned: u32,
    /// When the controller was last checked, in milliseconds since the queue was made.
    checked: u32,
}

impl fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, name, outstanding) = (self.id, self.controller.name(), self.outstanding());
        write!(f, "IoQueue({id} of {name}, {outstanding} outstanding)")
    }
}

impl IoQueue {
    pub(super) fn new(controller: Arc<Controller>, id: u16) -> Result<Self> {
        let (entries, page_shift) = controller.queue_shape();
        let max_transfer = controller.identity().max_transfer;
        let vector = controller.vector(id);
        let Settings { acknowledge_after, spin, .. } = *controller.settings();
        let acknowledge_after = acknowledge_after.unwrap_or(entries / 2).clamp(1, entries - 1);
        let shape = QueueShape { entries, page_shift, max_transfer, acknowledge_after };
        let doorbells = Doorbells::new(controller.device(), id, controller.doorbell_stride())?;
        let mut pair = QueuePair::new(controller.space(), doorbells, &shape)?;
        let attached = controller.attach(&pair, id);
        let generation = attached.inspect_err(|_| controller.discard(&mut pair))?;
        Ok(Self {
            ended: VecDeque::with_capacity(usize::from(entries)),
            pair,
            space: controller.space().address_space(),
            controller,
            max_transfer,
            id,
            vector,
            spin: Spin::new(spin),
            sleeps: 0,
            generation,
            failed: None,
            created: Instant::now(),
            polls: 0,
            scanned: 0,
            checked: 0,
        })
    }

    /// The queue's number.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// The bytes of BAR 0 that this queue's window covers; `None` if the doorbells are trapped.
    pub fn doorbell_range(&self) -> Option<std::ops::Range<u64>> {
        self.pair.doorbells().range()
    }

    /// The generation of the controller in which the queue was created. If it changes, data that was written
    /// since the last flush may be lost.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// How many commands can be outstanding at once.
    pub fn depth(&self) -> usize {
        usize::from(self.pair.entries()) - 1
    }

    /// How many commands have not completed.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.pair.outstanding() + self.ended.len()
    }

    /// How many more commands can be submitted.
    #[inline]
    pub fn room(&self) -> usize {
        self.pair.room()
    }

    /// Notifies the controller of all submitted commands.
    #[inline]
    pub fn ring(&mut self) {
        if self.generation == self.controller.generation() {
            self.pair.ring();
        }
        self.polls += POLLS_PER_BATCH;
        if self.polls >= POLLS_PER_CHECK {
            self.check();
        }
    }

    /// The next completion, if there is one. It checks the queue and the controller from time to time, and may
    /// then take as long as [`wait`](Self::wait).
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Completion> {
        if let Some(done) = self.pair.pop() {
            return Some(done);
        }
        if self.idle() { self.ended.pop_front() } else { None }
    }

    /// Handles a poll without a completion: the controller may wait for room in the completion queue. Returns
    /// whether a reset has ended commands.
    #[inline(never)]
    fn idle(&mut self) -> bool {
        if self.generation == self.controller.generation() {
            self.pair.acknowledge();
        }
        self.polls += 1;
        if self.polls >= POLLS_PER_CHECK {
            self.check();
        }
        !self.ended.is_empty()
    }

    /// Waits for the next completion; `None` if no command is outstanding. Rings the doorbells. A failed queue
    /// is created again if possible, and then has room.
    #[inline]
    pub fn wait(&mut self) -> Option<Completion> {
        self.ring();
        if let Some(done) = self.pop() { Some(done) } else { self.wait_longer() }
    }

    /// Waits until `count` commands have completed, or all that are outstanding. Passes these completions, and any
    /// others that are there, to `done`. Returns how many there were.
    ///
    /// With interrupts, this sleeps fewer times than `count` calls of [`wait`](Self::wait) if the controller reports
    /// several completions by one interrupt
    /// ([`Controller::set_interrupt_coalescing`](super::Controller::set_interrupt_coalescing)).
    pub fn wait_for(&mut self, count: usize, mut done: impl FnMut(Completion)) -> usize {
        let mut taken = 0;
        while taken < count {
            let Some(first) = self.wait() else { break };
            done(first);
            taken += 1;
            while let Some(next) = self.pop() {
                done(next);
                taken += 1;
            }
        }
        taken
    }

    /// How often the queue has slept until an interrupt.
    pub fn sleeps(&self) -> u64 {
        self.sleeps
    }

    /// Waits after a poll without a completion.
    #[inline(never)]
    fn wait_longer(&mut self) -> Option<Completion> {
        let wait = self.vector.map(|_| self.spin.begin());
        loop {
            if self.outstanding() == 0 {
                self.recreate_if_broken();
                return None;
            }
            self.pause(wait.as_ref());
            if let Some(done) = self.pop() {
                if let Some(wait) = &wait {
                    self.spin.end(wait);
                }
                return Some(done);
            }
        }
    }

    /// Creates a queue again that the last completion broke.
    #[cold]
    fn recreate_if_broken(&mut self) {
        if self.pair.is_broken() && self.failed.is_none() {
            self.check();
        }
    }

    /// Waits between two polls, or for an interrupt.
    #[inline]
    fn pause(&mut self, wait: Option<&Wait>) {
        match self.vector {
            Some(_) if wait.is_some_and(Wait::polls) => std::hint::spin_loop(),
            Some(vector) => self.sleep(vector),
            // `pop` has just checked the queue.
            None if self.polls == 0 => {
                self.pair.ring();
                // Other threads may need the processor, for example an emulated controller.
                std::thread::yield_now();
            }
            None => {}
        }
    }

    fn sleep(&mut self, vector: usize) {
        if self.generation == self.controller.generation() {
            self.pair.acknowledge_after(1);
        }
        self.sleeps += 1;
        match self.controller.wait(vector, CHECK_INTERVAL) {
            Ok(true) => {}
            Ok(false) => self.check(),
            Err(error) => {
                log::warn!("nvme: polling instead: {error}");
                self.vector = None;
            }
        }
    }

    /// Checks the queue: no command is overdue, and the controller works and was not reset.
    #[cold]
    #[inline(never)]
    pub(super) fn check(&mut self) {
        self.polls = 0;
        let now = self.created.elapsed().as_millis() as u32;
        if self.generation != self.controller.generation() {
            return self.recreate();
        }
        if self.failed.is_some() {
            return;
        }
        if self.pair.is_broken() {
            return self.recover();
        }
        if now.wrapping_sub(self.scanned) < millis(SCAN_INTERVAL) {
            return;
        }
        self.scanned = now;
        let limit = millis(self.controller.settings().timeout);
        if let Some(command) = self.pair.overdue(now, limit) {
            return self.abort_overdue(command, now, limit);
        }
        if now.wrapping_sub(self.checked) >= millis(CHECK_INTERVAL) {
            self.checked = now;
            if self.pair.outstanding() > 0
                && let Err(error) = self.controller.check()
            {
                log::warn!("nvme: {error}");
                self.recover();
            }
        }
    }

    /// Aborts an overdue command. If that was done before, resets the controller.
    fn abort_overdue(&mut self, command: u16, now: u32, limit: u32) {
        let grace = millis(self.controller.settings().grace);
        let first = self.pair.abort(command, now, limit, grace);
        log::warn!("nvme: command {command} of queue {} is overdue", self.id);
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
        self.recreate();
    }

    /// After a reset of the controller: ends all commands and creates the queue again.
    fn recreate(&mut self) {
        for _ in 0..MAX_RESETS {
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
