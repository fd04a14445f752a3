//! One that writes, flushes and reads on a controller that fails, and knows what it must find.
//!
//! A block holds its own number, a value that grows with each write of it, and a checksum. Of each block
//! it is known which value was flushed, which was acknowledged, and which was submitted last: what is
//! read must lie between.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::device::DmaBuffer;
use vfio_remap::emulated::nvme::Namespace as Storage;
use vfio_remap::emulated::nvme::{Fault, Faults, Power};
use vfio_remap::emulated::{Emulated, Nvme};
use vfio_remap::{Device, Result};

use vfio_remap_nvme::{Completion, Controller, IoQueue, Namespace, Settings};

const BLOCK: usize = 512;
const BLOCKS: u64 = 48;
/// Commands that the worker has with the controller at a time.
const DEPTH: usize = 8;
/// Between two faults: few enough that they strike recoveries, and bring-ups, too.
const APART: std::ops::RangeInclusive<u64> = 3..=60;

/// The driver's patience, in milliseconds, and what the model says in CAP.TO.
const TIMEOUT: u64 = 200;
const GRACE: u64 = 200;
const ADMIN: u64 = 1000;
const READY: u64 = 10_000;

/// Within this the driver promises an answer ([`IoQueue`]).
const STATED: Duration = Duration::from_millis(TIMEOUT + GRACE + ADMIN + 3 * 2 * READY);

/// Attempts to bring a controller up, or up again, while faults go on.
const ATTEMPTS: u32 = 20;

/// What is known of a block.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Acknowledged, and flushed afterwards.
    flushed: u64,
    acknowledged: Option<Acknowledged>,
    /// Submitted last, whatever came of it.
    last: u64,
    /// A command for it is with the controller: there is one at a time, so that they are in order.
    busy: bool,
}

#[derive(Clone, Copy)]
struct Acknowledged {
    value: u64,
    when: When,
}

/// When a command was submitted: how often the controller had been reset by the driver, and how often it
/// had lost what was not flushed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct When {
    generation: u32,
    losses: usize,
}

enum Pending {
    Write {
        block: u64,
        value: u64,
        when: When,
    },
    Read {
        block: u64,
    },
    /// With what it makes last, if it succeeds.
    Flush {
        generation: u32,
        lasting: Vec<(u64, u64)>,
    },
}

/// A run: one seed, one controller, and its faults.
pub struct Run {
    seed: u64,
    random: u64,
    faults: Faults,
    power: Power,
    model: Emulated,
    blocks: Vec<Known>,
    pending: Vec<Option<Pending>>,
    longest: Cell<Duration>,
    /// How many blocks were read, and held what they may.
    checked: Cell<u64>,
}

/// What came of a run.
pub struct Outcome {
    pub struck: Vec<Fault>,
    /// How long the driver took for its slowest answer.
    pub longest: Duration,
}

impl Run {
    pub fn new(seed: u64, faults: usize) -> Self {
        let faults = Faults::seeded(seed, &Fault::ALL, faults, APART);
        let storage = Storage::memory(BLOCKS * BLOCK as u64, BLOCK as u32).unwrap();
        let nvme = Nvme::new(vec![storage]).with_faults(&faults);
        let power = nvme.power();
        Self {
            seed,
            random: seed ^ 0x5eed,
            faults,
            power,
            model: Emulated::new(nvme).unwrap(),
            blocks: vec![Known::default(); BLOCKS as usize],
            pending: (0..DEPTH).map(|_| None).collect(),
            longest: Cell::default(),
            checked: Cell::default(),
        }
    }

    /// Works until all faults have struck, takes the power away, and looks at what is left.
    pub fn perform(mut self) -> Outcome {
        let (controller, namespace, mut queue) = self.open();
        while self.faults.remaining() > 0 {
            self.step(&controller, &namespace, &mut queue);
        }
        while self.pending.iter().any(Option::is_some) {
            self.take(&mut queue);
        }
        let seed = self.seed;
        let flushed = self.blocks.iter().filter(|known| known.flushed > 0).count();
        assert!(flushed > 0, "seed {seed}: nothing was flushed, of which any could be lost");
        self.bring_back(&controller);
        self.submit_flush(&controller, &namespace, &mut queue, 0);
        while self.pending[0].is_some() {
            self.take(&mut queue);
        }
        drop(queue);
        controller.close().unwrap();

        self.power.cycle();
        let (controller, namespace, mut queue) = self.open();
        self.checked.set(0);
        for block in 0..BLOCKS {
            // Nothing strikes any more, but the machine may be slow.
            for _ in 0..ATTEMPTS {
                self.submit_read(&controller, &namespace, &mut queue, 0, block);
                if self.pending[0].is_some() {
                    self.take(&mut queue);
                }
                if self.checked.get() > block {
                    break;
                }
            }
        }
        assert_eq!(self.checked.get(), BLOCKS, "seed {seed}: not all blocks could be read");
        drop(queue);
        controller.close().unwrap();
        let struck = self.faults.injected().into_iter().map(|(_, fault)| fault).collect();
        Outcome { struck, longest: self.longest.get() }
    }

    /// Brings the controller up, by as many attempts as it takes while faults strike.
    fn open(&self) -> (Arc<Controller>, Namespace, IoQueue) {
        let settings = Settings::DEFAULT
            .with_entries(16)
            .with_interrupts(!self.seed.is_multiple_of(2))
            .with_timeout(Duration::from_millis(TIMEOUT))
            .with_grace(Duration::from_millis(GRACE))
            .with_admin_timeout(Duration::from_millis(ADMIN));
        let open = || {
            self.faults.plug_in();
            let device = Device::new(Arc::new(self.model.clone()));
            let controller = Controller::new(device, settings)?;
            let namespace = controller.namespace(1)?;
            let queue = controller.queue()?;
            Ok((controller, namespace, queue))
        };
        self.persist(open)
    }

    /// A controller that was pulled, or could not be brought up again, works again.
    fn bring_back(&self, controller: &Controller) {
        self.persist(|| {
            self.faults.plug_in();
            controller.reset()
        });
    }

    fn persist<T>(&self, attempt: impl Fn() -> Result<T>) -> T {
        for _ in 1..ATTEMPTS {
            if let Ok(done) = self.in_time(&attempt) {
                return done;
            }
        }
        attempt()
            .unwrap_or_else(|error| panic!("seed {}: it does not come back: {error}", self.seed))
    }

    fn in_time<T>(&self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = f();
        let took = start.elapsed();
        self.longest.set(took.max(self.longest.get()));
        assert!(took < STATED, "seed {}: it took {took:?}", self.seed);
        done
    }

    /// One command more, or one less.
    fn step(&mut self, controller: &Arc<Controller>, namespace: &Namespace, queue: &mut IoQueue) {
        let Some(slot) = self.pending.iter().position(Option::is_none) else {
            return self.take(queue);
        };
        let block = self.random() % BLOCKS;
        match self.random() % 100 {
            0..10 => self.submit_flush(controller, namespace, queue, slot),
            // Somebody resets it under load.
            10 => self.bring_back(controller),
            _ if self.blocks[block as usize].busy => self.take(queue),
            11..45 => self.submit_read(controller, namespace, queue, slot, block),
            _ => self.submit_write(controller, namespace, queue, slot, block),
        }
        if self.random().is_multiple_of(3) {
            queue.ring();
        }
    }

    fn submit_write(
        &mut self,
        controller: &Controller,
        namespace: &Namespace,
        queue: &mut IoQueue,
        slot: usize,
        block: u64,
    ) {
        let known = &mut self.blocks[block as usize];
        known.last += 1;
        known.busy = true;
        let value = known.last;
        let when = self.now(queue);
        let buffer = buffer(controller);
        buffer.write(0, &content(block, value));
        self.pending[slot] = Some(Pending::Write { block, value, when });
        let submitted = self.in_time(|| queue.write(namespace, block, buffer, slot as u64));
        if submitted.is_err() {
            self.end(slot, None, queue);
            self.bring_back(controller);
        }
    }

    fn submit_read(
        &mut self,
        controller: &Controller,
        namespace: &Namespace,
        queue: &mut IoQueue,
        slot: usize,
        block: u64,
    ) {
        self.blocks[block as usize].busy = true;
        self.pending[slot] = Some(Pending::Read { block });
        let buffer = buffer(controller);
        if self.in_time(|| queue.read(namespace, block, buffer, slot as u64)).is_err() {
            self.end(slot, None, queue);
            self.bring_back(controller);
        }
    }

    fn submit_flush(
        &mut self,
        controller: &Controller,
        namespace: &Namespace,
        queue: &mut IoQueue,
        slot: usize,
    ) {
        // What an earlier generation acknowledged may have been lost before this flush: the driver says
        // so by its generation.
        let generation = queue.generation();
        let lasting = self.blocks.iter().zip(0..).filter_map(|(known, block)| {
            let Acknowledged { value, when } = known.acknowledged?;
            (when.generation == generation).then_some((block, value))
        });
        self.pending[slot] = Some(Pending::Flush { generation, lasting: lasting.collect() });
        if self.in_time(|| queue.flush(namespace, slot as u64)).is_err() {
            self.end(slot, None, queue);
            self.bring_back(controller);
        }
    }

    /// Takes one completion, if any command is with the controller.
    fn take(&mut self, queue: &mut IoQueue) {
        match self.in_time(|| queue.wait()) {
            Some(done) => self.end(done.tag as usize, Some(done), queue),
            None => {
                let lost = self.pending.iter().flatten().count();
                assert_eq!(lost, 0, "seed {}: requests have never ended", self.seed);
            }
        }
    }

    /// A command has ended, or was not even submitted.
    fn end(&mut self, slot: usize, done: Option<Completion>, queue: &IoQueue) {
        let pending = self.pending[slot].take();
        let pending = pending.unwrap_or_else(|| panic!("seed {}: ended twice", self.seed));
        let done = done.filter(|done| {
            let (status, seed) = (done.status, self.seed);
            assert!(status.is_success() || status.is_undecided(), "seed {seed}: {status}");
            status.is_success()
        });
        match pending {
            Pending::Write { block, value, when } => {
                let known = &mut self.blocks[block as usize];
                known.busy = false;
                if done.is_some() {
                    known.acknowledged = Some(Acknowledged { value, when });
                }
            }
            Pending::Read { block } => {
                self.blocks[block as usize].busy = false;
                if let Some(buffer) = done.and_then(|done| done.buffer) {
                    self.check(block, &buffer);
                }
            }
            Pending::Flush { generation, lasting } => {
                if done.is_some() && queue.generation() == generation {
                    for (block, value) in lasting {
                        let flushed = &mut self.blocks[block as usize].flushed;
                        *flushed = value.max(*flushed);
                    }
                }
            }
        }
    }

    /// Whether what was read of a block is what it may hold.
    fn check(&self, block: u64, buffer: &DmaBuffer) {
        let mut found = [0; BLOCK];
        buffer.read(0, &mut found);
        let value = u64::from_le_bytes(found[8..16].try_into().unwrap());
        let seed = self.seed;
        // Zeros are what a block holds that was never written.
        let expected = if value == 0 { [0; BLOCK] } else { content(block, value) };
        assert!(found == expected, "seed {seed}: block {block} holds {found:02x?}");
        let known = self.blocks[block as usize];
        let kept = known.acknowledged.filter(|seen| seen.when.losses == self.losses());
        let least = kept.map_or(known.flushed, |kept| kept.value.max(known.flushed));
        assert!(
            (least..=known.last).contains(&value),
            "seed {seed}: block {block} holds {value}; at least {least} must be there, and {} was \
             submitted last",
            known.last
        );
        self.checked.set(self.checked.get() + 1);
    }

    fn now(&self, queue: &IoQueue) -> When {
        When { generation: queue.generation(), losses: self.losses() }
    }

    /// How often the controller has lost what was not flushed.
    fn losses(&self) -> usize {
        let struck = self.faults.injected();
        let losses = [Fault::PowerLoss, Fault::Removal];
        struck.iter().filter(|(_, fault)| losses.contains(fault)).count()
    }

    /// xorshift64* (Vigna 2014).
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

fn buffer(controller: &Controller) -> DmaBuffer {
    controller.buffer(BLOCK).unwrap().split_at(BLOCK).unwrap().0
}

/// What a block holds: its number, the value, words that follow from both, and their sum.
fn content(block: u64, value: u64) -> [u8; BLOCK] {
    let mut words = [0u64; BLOCK / 8];
    (words[0], words[1]) = (block, value);
    for at in 2..words.len() - 1 {
        words[at] =
            (words[at - 1] ^ words[at - 2].rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    words[BLOCK / 8 - 1] = words.iter().fold(0, |sum, word| sum.rotate_left(1) ^ word);
    let mut bytes = [0; BLOCK];
    bytes.copy_from_slice(words.map(u64::to_le_bytes).as_flattened());
    bytes
}
