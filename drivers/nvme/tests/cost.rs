//! What a read costs the NVMe driver: instructions from submission to completion, counted by callgrind
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

const DEPTH: usize = 32;
const SIZE: usize = 4096;
const BATCHES: &str = "VFIO_REMAP_TEST_BATCHES";
/// The most instructions of a read, and what it takes now and then is allowed for.
const MOST: u64 = 208;

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

/// What is counted: a batch of reads is submitted, and the controller told of it.
#[inline(never)]
fn counted_submission(
    queue: &mut IoQueue,
    of: &Namespace,
    buffers: &mut [Option<DmaBuffer>; DEPTH],
) {
    for (tag, buffer) in buffers.iter_mut().enumerate() {
        let Some(buffer) = buffer.take() else { continue };
        // Apart, so that blocks are not consecutive.
        let block = (tag as u64).wrapping_mul(0x9e37_79b9) % of.block_count();
        queue.read(of, block, buffer, tag as u64).unwrap();
    }
    queue.ring();
}

/// What is counted: a batch is taken.
#[inline(never)]
fn counted_completion(queue: &mut IoQueue, buffers: &mut [Option<DmaBuffer>; DEPTH]) {
    for _ in 0..DEPTH {
        let Some(Completion { tag, status, buffer, .. }) = queue.pop() else { return };
        assert!(status.is_success());
        buffers[tag as usize] = buffer;
    }
}

/// Reads, in batches; how many allocations there were meanwhile.
fn reads(batches: u64) -> u64 {
    let (controller, model) = controller();
    let (mut queue, namespace, mut rest) = with_model(&model, || {
        let buffer = controller.buffer(DEPTH * SIZE).unwrap();
        (controller.queue().unwrap(), controller.namespace(1).unwrap(), Some(buffer))
    });
    let mut buffers: [Option<DmaBuffer>; DEPTH] =
        std::array::from_fn(|_| match rest.take().unwrap().split_at(SIZE) {
            Ok((first, others)) => {
                rest = Some(others);
                Some(first)
            }
            Err(last) => Some(last.into_buffer()),
        });
    let mut allocations = 0;
    for _ in 0..batches {
        allocations +=
            measure(|| counted_submission(&mut queue, &namespace, &mut buffers)).count_total;
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
    assert_eq!(reads(100), 0);
}

/// What callgrind runs; nothing where it was not told how many batches.
#[test]
#[ignore = "run by callgrind"]
fn counted() {
    if let Ok(batches) = std::env::var(BATCHES) {
        assert_eq!(reads(batches.parse().unwrap()), 0);
    }
}

/// Instructions, and system calls, of that many batches.
fn cost(batches: u64) -> (u64, u64) {
    let file = std::env::temp_dir().join(format!("vfio-remap-callgrind-{}", std::process::id()));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-systime=yes", "--collect-atstart=no"])
        .args(["--toggle-collect=*counted_submission*", "--toggle-collect=*counted_completion*"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "counted", "--test-threads=1"])
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

#[test]
#[ignore = "needs an optimised build, and valgrind"]
fn a_read_takes_at_most_208_instructions_and_no_system_call() {
    let ((once, _), (twice, calls)) = (cost(200), cost(400));
    let reads = 200 * DEPTH as u64;
    let each = (twice - once) as f64 / reads as f64;
    println!("{each:.1} instructions for each read of {SIZE} bytes, {calls} system calls");
    assert!(once >= reads, "something was counted");
    assert!(twice - once <= MOST * reads);
    assert_eq!(calls, 0);
}
