//! `nvme bench`: random reads and writes by one or more threads.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;
use vfio_remap::device::DmaBuffer;
use vfio_remap::{Error, ErrorKind, Result};

use crate::guard;
use crate::histogram::Latencies;
use crate::mover::Mover;
use crate::options::{Bench, Options};
use crate::session::Session;
use crate::stop;
use vfio_remap_nvme::{Completion, IoQueue, Namespace, Settings};

/// The latency of one request of this many is measured.
pub const SAMPLE: u64 = 256;

/// The results of a thread.
struct Tally {
    operations: u64,
    elapsed: Duration,
    latencies: Latencies,
}

/// Measures, and prints the results.
pub fn run(options: &Options, bench: &Bench) -> Result<()> {
    let entries = u16::try_from(bench.depth.saturating_add(1)).unwrap_or(u16::MAX);
    let settings = Settings::DEFAULT
        .with_queues(bench.threads.max(1))
        .with_entries(entries.max(Settings::DEFAULT.entries))
        .with_interrupts(bench.interrupts)
        .with_spin(Duration::from_micros(bench.spin));
    let settings = match bench.acknowledge_after {
        Some(completions) => settings.with_acknowledge_after(completions),
        None => settings,
    };
    let session = Session::open(&options.common, settings)?;
    check(bench, &session)?;
    if bench.read_percent < 100 {
        guard::permit(&options.common, &session, &mut Mover::new(&session)?)?;
    }
    let queues = (0..bench.threads.max(1)).map(|_| session.controller.queue());
    let queues = queues.collect::<Result<Vec<_>>>()?;
    if let Some(most) = queues.iter().map(IoQueue::depth).min().filter(|most| bench.depth > *most) {
        return Err(Error::new(ErrorKind::OutOfRange, "measure", session.controller.name())
            .with_reason(format!("its queues hold at most {most} requests")));
    }
    if !options.common.json {
        introduce(bench, &session, &queues);
    }
    let time = bench.time;
    let start = Barrier::new(queues.len());
    // All workers are made before the first thread starts, because each thread waits for the others.
    let workers = queues.into_iter().map(|queue| Worker::new(queue, session.namespace, bench));
    let workers = workers.collect::<Result<Vec<_>>>()?;
    let mut processors = if bench.pin { processors() } else { Vec::new() }.into_iter();
    let stop = stop::flag()?;
    let (start, stop) = (&start, &*stop);
    let tallies = thread::scope(|scope| {
        let threads = workers.into_iter().map(|worker| {
            let processor = processors.next();
            scope.spawn(move || {
                if let Some(Err(error)) = processor.map(pin) {
                    crate::say::aside(format_args!("warning: {error}"));
                }
                worker.run(time, start, stop)
            })
        });
        let threads: Vec<_> = threads.collect();
        let joined = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Os, "run", "a thread").with_reason("it has panicked"))
            })
        });
        joined.collect::<Result<Vec<Tally>>>()
    })?;
    report(options, bench, &tallies);
    session.close()
}

/// The processors that this process may use.
fn processors() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count()).filter(|processor| allowed.is_set(*processor) == Ok(true)).collect()
}

/// Keeps the calling thread on a processor (`man 2 sched_setaffinity`).
fn pin(processor: usize) -> Result<()> {
    let mut only = CpuSet::new();
    let pinned = only.set(processor).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    pinned.map_err(|errno| {
        Error::new(ErrorKind::Os, "pin a thread to", format!("processor {processor}"))
            .with_errno(errno as i32)
    })
}

fn check(bench: &Bench, session: &Session) -> Result<()> {
    let Session { controller, namespace, .. } = session;
    let refuse = |kind, reason: String| {
        Err(Error::new(kind, "measure", controller.name()).with_reason(reason))
    };
    let size = bench.block_size;
    if size == 0 || !size.is_multiple_of(namespace.block_size()) || size as u64 > namespace.size() {
        let block = namespace.block_size();
        return refuse(
            ErrorKind::Unaligned,
            format!("requests of {size} bytes do not consist of whole blocks of {block}"),
        );
    }
    if size > controller.identity().max_transfer {
        let most = controller.identity().max_transfer;
        return refuse(ErrorKind::OutOfRange, format!("a request has at most {most} bytes"));
    }
    if bench.depth == 0 {
        return refuse(ErrorKind::OutOfRange, "the depth is 0".to_owned());
    }
    Ok(())
}

fn introduce(bench: &Bench, session: &Session, queues: &[IoQueue]) {
    let Bench { depth, block_size, read_percent, threads, time, .. } = bench;
    let seconds = time.as_secs_f64();
    say!(
        "{}: {read_percent} % reads, {block_size} bytes at random places, {depth} at a time, \
         {threads} threads, {seconds} s",
        session.controller.name()
    );
    let pairs = session.controller.queues_per_doorbell_page();
    for queue in queues {
        match queue.doorbell_range() {
            Some(range) => say!(
                "queue {}: doorbells at {:#x}..{:#x} of BAR 0, in a window of their own",
                queue.id(),
                range.start,
                range.end
            ),
            None => say!("queue {}: its doorbells cannot be mapped", queue.id()),
        }
    }
    if pairs > 1 {
        say!("  (the page that such a window maps holds the doorbells of {pairs} pairs)");
    }
}

fn report(options: &Options, bench: &Bench, tallies: &[Tally]) {
    let operations: u64 = tallies.iter().map(|tally| tally.operations).sum();
    let seconds = tallies.iter().map(|tally| tally.elapsed.as_secs_f64()).fold(0.0, f64::max);
    let mut latencies = Latencies::new();
    tallies.iter().for_each(|tally| latencies.add(&tally.latencies));
    let iops = operations as f64 / seconds;
    if options.common.json {
        let completion = if bench.interrupts { "interrupts" } else { "polled" };
        say!(
            "{}",
            json!({
                "iops": iops, "depth": bench.depth, "block_size": bench.block_size,
                "read_percent": bench.read_percent, "threads": tallies.len(),
                "completion": completion, "seconds": seconds, "operations": operations,
                "latency_ns": latencies.as_json(),
            })
        );
        return;
    }
    let rate = iops * bench.block_size as f64 / 1e6;
    say!("{operations} requests in {seconds:.2} s: {iops:.0} a second, {rate:.1} MB/s");
    latencies.print();
}

/// One thread: a queue with as many requests as the depth.
struct Worker {
    queue: IoQueue,
    namespace: Namespace,
    /// The blocks of a request, and how many requests fit into the namespace.
    blocks: u64,
    places: u64,
    /// A 32-bit random number below this means a read.
    reads_below: u64,
    random: u64,
    submitted: u64,
    /// The submission times of the measured requests, indexed by tag.
    since: Vec<Option<Instant>>,
    buffers: Vec<DmaBuffer>,
}

impl Worker {
    fn new(queue: IoQueue, namespace: Namespace, bench: &Bench) -> Result<Self> {
        let depth = bench.depth;
        // Each buffer begins at a page, so that PRP lists are as short as possible.
        let spacing = bench.block_size.next_multiple_of(4096);
        let mut rest = queue.controller().buffer(depth * spacing)?;
        let mut buffers = Vec::with_capacity(depth);
        for _ in 1..depth {
            let (buffer, after) = split(rest, spacing)?;
            buffers.push(cut(buffer, bench.block_size)?);
            rest = after;
        }
        buffers.push(cut(rest, bench.block_size)?);
        let blocks = (bench.block_size >> namespace.block_shift()) as u64;
        Ok(Self {
            // Different for each thread, the same in each run.
            random: 0x9e37_79b9_7f4a_7c15 ^ u64::from(queue.id()) << 32,
            queue,
            namespace,
            blocks,
            places: namespace.block_count() / blocks,
            reads_below: (u64::from(bench.read_percent) << 32) / 100,
            submitted: 0,
            since: vec![None; depth],
            buffers,
        })
    }

    fn run(mut self, time: Duration, start: &Barrier, stop: &AtomicBool) -> Result<Tally> {
        let mut latencies = Latencies::new();
        let mut operations = 0;
        start.wait();
        let start = Instant::now();
        for (tag, buffer) in std::mem::take(&mut self.buffers).into_iter().enumerate() {
            self.submit(tag as u64, buffer)?;
        }
        let mut now = start;
        while now - start < time && !stop.load(Ordering::Relaxed) {
            // Takes all completions and submits as many requests, before the doorbell is rung.
            let mut done = self.queue.wait();
            while let Some(Completion { tag, status, buffer, .. }) = done {
                status.check("read or write", || format!("namespace {}", self.namespace.id()))?;
                operations += 1;
                if let Some(since) = self.since[tag as usize].take() {
                    now = Instant::now();
                    latencies.record(now - since);
                }
                if let Some(buffer) = buffer {
                    self.submit(tag, buffer)?;
                }
                done = self.queue.pop();
            }
        }
        let elapsed = start.elapsed();
        // Outstanding requests do not count.
        while let Some(done) = self.queue.wait() {
            drop(done);
        }
        Ok(Tally { operations, elapsed, latencies })
    }

    #[inline]
    fn submit(&mut self, tag: u64, buffer: DmaBuffer) -> Result<()> {
        let random = self.random();
        // The upper half selects the place, the lower half read or write.
        let place = ((u128::from(random) * u128::from(self.places)) >> 64) as u64;
        let block = place * self.blocks;
        if self.submitted.is_multiple_of(SAMPLE) {
            self.since[tag as usize] = Some(Instant::now());
        }
        self.submitted += 1;
        if random & 0xffff_ffff < self.reads_below {
            self.queue.read(&self.namespace, block, buffer, tag)?;
        } else {
            self.queue.write(&self.namespace, block, buffer, tag)?;
        }
        Ok(())
    }

    /// xorshift64* (Vigna 2014): three shifts and a product.
    #[inline]
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn split(buffer: DmaBuffer, size: usize) -> Result<(DmaBuffer, DmaBuffer)> {
    Ok(buffer.split_at(size)?)
}

/// The first `size` bytes of a buffer.
fn cut(buffer: DmaBuffer, size: usize) -> Result<DmaBuffer> {
    if buffer.size() == size { Ok(buffer) } else { Ok(split(buffer, size)?.0) }
}
