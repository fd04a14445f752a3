//! What a transfer costs the NVMe driver: instructions from submission to completion, counted by callgrind
//! on a model that is polled by hand, so that neither the model's work nor polling in vain counts.
//!
//! A program of its own: it needs an optimised build, and its allocator counts.
//!
//! `cargo test --release -p vfio-remap-nvme --test cost -- --ignored --nocapture`

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use allocation_counter::measure;
use vfio_remap::Device;
use vfio_remap::device::DmaBuffer;
use vfio_remap::emulated::nvme::Namespace as Storage;
use vfio_remap::emulated::{Activity, Emulated, Nvme};
use vfio_remap_nvme::{Completion, Controller, IoQueue, Namespace, Settings};

const SIZE: usize = 4096;
/// Tells the counted program what to do: a [`Load`], and how many batches.
const LOAD: &str = "VFIO_REMAP_TEST_LOAD";
const BATCHES: &str = "VFIO_REMAP_TEST_BATCHES";

/// What is counted, and the most instructions of each transfer. Some are the loops' own: see [`Shelf`].
const LOADS: [(Load, u64); 4] = [
    (Load { write: false, depth: 32 }, 142),
    (Load { write: true, depth: 32 }, 142),
    (Load { write: false, depth: 1 }, 195),
    (Load { write: true, depth: 1 }, 195),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    write: bool,
    depth: u64,
}

/// A controller whose model works when it is told to. Bringing it up takes a thread that tells it.
fn controller() -> (Arc<Controller>, Emulated) {
    let storage = Storage::memory(64 << 20, 4096).unwrap();
    let model = Emulated::polled(Nvme::new(vec![storage])).unwrap();
    let device = Device::new(Arc::new(model.clone()));
    let controller = with_model(&model, || Controller::new(device, Settings::default()).unwrap());
    (controller, model)
}

/// Runs `f` while another thread polls the model.
fn with_model<T>(model: &Emulated, f: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                model.poll().unwrap();
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
        });
        // Whatever becomes of `f`, the other is told to stop.
        let _stop = StopOnDrop(&stop);
        f()
    })
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A queue as the counted loops use it.
trait Queue {
    fn transfer<const WRITE: bool>(
        &mut self,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    );
    fn ring(&mut self);
    /// The tag, whether the transfer has succeeded, and the buffer.
    fn pop(&mut self) -> Option<(u64, bool, Option<DmaBuffer>)>;
}

impl Queue for IoQueue {
    #[inline(always)]
    fn transfer<const WRITE: bool>(
        &mut self,
        namespace: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) {
        if WRITE {
            self.write(namespace, block, buffer, tag).unwrap();
        } else {
            self.read(namespace, block, buffer, tag).unwrap();
        }
    }

    #[inline(always)]
    fn ring(&mut self) {
        IoQueue::ring(self);
    }

    #[inline(always)]
    fn pop(&mut self) -> Option<(u64, bool, Option<DmaBuffer>)> {
        let Completion { tag, status, buffer, .. } = IoQueue::pop(self)?;
        Some((tag, status.is_success(), buffer))
    }
}

/// No queue: buffers are put down and taken again. What it costs is the counted loops' own share, and a little more.
struct Shelf<const DEPTH: usize> {
    buffers: [Option<DmaBuffer>; DEPTH],
    next: usize,
}

impl<const DEPTH: usize> Queue for Shelf<DEPTH> {
    #[inline(always)]
    fn transfer<const WRITE: bool>(
        &mut self,
        _: &Namespace,
        block: u64,
        buffer: DmaBuffer,
        tag: u64,
    ) {
        std::hint::black_box(block);
        std::mem::forget(self.buffers[tag as usize].replace(buffer));
    }

    #[inline(always)]
    fn ring(&mut self) {
        self.next = 0;
    }

    #[inline(always)]
    fn pop(&mut self) -> Option<(u64, bool, Option<DmaBuffer>)> {
        let buffer = self.buffers.get_mut(self.next)?.take();
        let tag = std::hint::black_box(self.next as u64);
        self.next += 1;
        Some((tag, std::hint::black_box(true), buffer))
    }
}

/// What is counted: a batch is submitted, and the controller told of it.
#[inline(never)]
fn counted_submission<Q: Queue, const DEPTH: usize, const WRITE: bool>(
    queue: &mut Q,
    of: &Namespace,
    buffers: &mut [Option<DmaBuffer>; DEPTH],
) {
    for (tag, buffer) in buffers.iter_mut().enumerate() {
        let Some(buffer) = buffer.take() else { continue };
        // Apart, so that blocks are not consecutive.
        let block = (tag as u64).wrapping_mul(0x9e37_79b9) % of.block_count();
        queue.transfer::<WRITE>(of, block, buffer, tag as u64);
    }
    queue.ring();
}

/// What is counted: a batch is taken.
#[inline(never)]
fn counted_completion<Q: Queue, const DEPTH: usize>(
    queue: &mut Q,
    buffers: &mut [Option<DmaBuffer>; DEPTH],
) {
    for _ in 0..DEPTH {
        let Some((tag, is_success, buffer)) = queue.pop() else { return };
        assert!(is_success);
        buffers[tag as usize] = buffer;
    }
}

/// Transfers, in batches; how many allocations there were meanwhile. On a [`Shelf`] if `on_shelf`.
fn transfers<const DEPTH: usize, const WRITE: bool>(batches: u64, on_shelf: bool) -> u64 {
    let (controller, model) = controller();
    let (mut queue, namespace, memory) = with_model(&model, || {
        let buffer = controller.buffer(DEPTH * SIZE).unwrap();
        (controller.queue().unwrap(), controller.namespace(1).unwrap(), buffer)
    });
    let mut parts = memory.chunks(SIZE);
    let mut buffers: [Option<DmaBuffer>; DEPTH] = std::array::from_fn(|_| parts.next());
    let mut shelf = Shelf { buffers: [const { None }; DEPTH], next: 0 };
    let mut allocations = 0;
    for _ in 0..batches {
        if on_shelf {
            counted_submission::<_, DEPTH, WRITE>(&mut shelf, &namespace, &mut buffers);
            counted_completion(&mut shelf, &mut buffers);
            continue;
        }
        allocations += measure(|| {
            counted_submission::<_, DEPTH, WRITE>(&mut queue, &namespace, &mut buffers);
        })
        .count_total;
        while queue.outstanding() > 0 {
            while model.poll().unwrap() == Activity::Busy {}
            allocations += measure(|| counted_completion(&mut queue, &mut buffers)).count_total;
        }
    }
    with_model(&model, || {
        drop((queue, buffers));
        controller.close().unwrap();
    });
    allocations
}

#[test]
fn from_submission_to_completion_nothing_is_allocated() {
    assert_eq!(transfers::<32, false>(100, false), 0);
    assert_eq!(transfers::<1, true>(100, false), 0);
}

/// What callgrind runs; nothing where it was not told how many batches.
#[test]
#[ignore = "run by callgrind"]
fn counted() {
    let (Ok(load), Ok(batches)) = (std::env::var(LOAD), std::env::var(BATCHES)) else { return };
    let batches = batches.parse().unwrap();
    let words: Vec<_> = load.split(' ').collect();
    let on_shelf = words[2] == "shelf";
    let allocations = match words[..2] {
        ["read", "32"] => transfers::<32, false>(batches, on_shelf),
        ["write", "32"] => transfers::<32, true>(batches, on_shelf),
        ["read", "1"] => transfers::<1, false>(batches, on_shelf),
        ["write", "1"] => transfers::<1, true>(batches, on_shelf),
        _ => panic!("an unknown load: {load}"),
    };
    assert_eq!(allocations, 0);
}

/// Instructions, and system calls, of that many batches.
fn cost(load: Load, on: &str, batches: u64) -> (u64, u64) {
    let file = std::env::temp_dir().join(format!("vfio-remap-callgrind-{}", std::process::id()));
    let operation = if load.write { "write" } else { "read" };
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-systime=yes", "--collect-atstart=no"])
        .args(["--toggle-collect=*counted_submission*", "--toggle-collect=*counted_completion*"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "counted", "--test-threads=1"])
        .env(LOAD, format!("{operation} {} {on}", load.depth))
        .env(BATCHES, batches.to_string())
        .output()
        .expect("valgrind is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let profile = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(file).unwrap();
    // A line of costs: where (a number, or a difference to the last), and a count of each event. Those of
    // a call are its callee's once more, and stand behind "calls=". What nobody does has no count.
    let mut sums = [0; 2];
    let mut lines = profile.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("calls=") {
            lines.next();
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            let counts = line.split(' ').skip(1).map(|count| count.parse::<u64>().unwrap());
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
    }
    (sums[0], sums[1])
}

/// Instructions of each transfer, and system calls.
fn each(load: Load, on: &str) -> (f64, u64) {
    let ((once, _), (twice, calls)) = (cost(load, on, 200), cost(load, on, 400));
    assert!(once >= 200 * load.depth, "something was counted");
    ((twice - once) as f64 / (200 * load.depth) as f64, calls)
}

#[test]
#[ignore = "needs an optimised build, and valgrind"]
fn a_transfer_takes_few_instructions_and_no_system_call() {
    for (load, most) in LOADS {
        let (instructions, calls) = each(load, "queue");
        let (own, _) = each(load, "shelf");
        let Load { write, depth } = load;
        let operation = if write { "write" } else { "read" };
        println!(
            "{operation} of {SIZE} bytes, {depth} at a time: {instructions:.1} instructions each, at most \
             {own:.1} of them this program's own, and {calls} system calls"
        );
        assert!(instructions <= most as f64, "more than {most}");
        assert_eq!(calls, 0);
    }
}
