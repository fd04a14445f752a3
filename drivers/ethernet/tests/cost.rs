//! What a frame costs the driver: instructions to receive and to send one in a burst, counted by callgrind on a
//! model that is polled by hand, so that neither the model's work nor polling in vain counts.
//!
//! A program of its own: it needs an optimised build, and its allocator counts.
//!
//! `cargo test --release -p vfio-remap-ethernet --test cost -- --ignored --nocapture`

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use allocation_counter::measure;
use vfio_remap::Device;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::emulated::{Activity, Emulated};
use vfio_remap_ethernet::{Frame, Nic, Pool, Receiver, Settings, Transmitter};

const BURST: usize = 32;
const BUFFERS: usize = 1024;
const WHAT: &str = "VFIO_REMAP_TEST_COST";
/// The most instructions of a frame, in either direction.
const MOST: f64 = 80.0;
const US: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Runs `f` while another thread polls the model.
fn with_model<T>(model: &Emulated, f: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                model.poll().unwrap();
                std::thread::sleep(Duration::from_micros(50));
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

/// What is counted: a burst is received, and the card gets other buffers.
#[inline(never)]
fn counted_receive(receiver: &mut Receiver, pool: &mut Pool, frames: &mut Vec<Frame>) {
    assert_eq!(receiver.receive(pool, frames, BURST).unwrap(), BURST);
}

/// What is counted: a burst is sent, and buffers of earlier ones come back to the pool.
#[inline(never)]
fn counted_transmit(transmitter: &mut Transmitter, pool: &mut Pool, frames: &mut Vec<Frame>) {
    assert_eq!(transmitter.transmit(frames, pool).unwrap(), BURST);
}

/// Bursts, in one direction; how many allocations there were meanwhile.
fn bursts(count: u64, receives: bool) -> u64 {
    let (port, network) = Port::pair();
    let model = Emulated::polled(Igb::new(US).with_wire(port)).unwrap();
    let device = Device::new(Arc::new(model.clone()));
    let (nic, mut queues, mut pool) = with_model(&model, || {
        let nic = Nic::new(device, Settings::DEFAULT).unwrap();
        nic.wait_for_link(Duration::from_secs(60)).unwrap();
        let queues = nic.queue().unwrap();
        let pool = nic.pool(BUFFERS).unwrap();
        (nic, queues, pool)
    });
    let mut bytes = [0; 60];
    bytes[..6].copy_from_slice(&US);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    let mut frames = Vec::with_capacity(BURST);
    // The card gets buffers.
    assert_eq!(queues.receiver.receive(&mut pool, &mut frames, BURST).unwrap(), 0);
    let work = || while model.poll().unwrap() == Activity::Busy {};
    let mut allocations = 0;
    for _ in 0..count {
        if receives {
            (0..BURST).for_each(|_| network.send(&bytes));
            work();
            let receive = measure(|| counted_receive(&mut queues.receiver, &mut pool, &mut frames));
            allocations += receive.count_total;
            frames.drain(..).for_each(|frame| pool.put(frame).unwrap());
        } else {
            frames.extend((0..BURST).map(|_| pool.frame_of(&bytes).unwrap()));
            let transmit =
                measure(|| counted_transmit(&mut queues.transmitter, &mut pool, &mut frames));
            allocations += transmit.count_total;
            work();
            while network.receive().is_some() {}
        }
    }
    with_model(&model, || {
        assert_eq!(queues.transmitter.stop(&mut pool).unwrap(), 0);
        queues.receiver.stop(&mut pool).unwrap();
        assert_eq!(pool.len(), BUFFERS);
        drop((pool, frames));
        nic.close().unwrap();
    });
    allocations
}

#[test]
fn no_frame_needs_an_allocation() {
    assert_eq!(bursts(100, true), 0);
    assert_eq!(bursts(100, false), 0);
}

/// What callgrind runs; nothing if it was not told which and how many.
#[test]
#[ignore = "run by callgrind"]
fn counted() {
    if let Ok(what) = std::env::var(WHAT) {
        let (direction, count) = what.split_once(' ').unwrap();
        assert_eq!(bursts(count.parse().unwrap(), direction == "receive"), 0);
    }
}

/// Instructions, and system calls, of that many bursts.
fn cost(direction: &str, count: u64) -> (u64, u64) {
    let name = format!("vfio-remap-callgrind-{}-{direction}", std::process::id());
    let file = std::env::temp_dir().join(name);
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-systime=yes", "--collect-atstart=no"])
        .args(["--toggle-collect=*counted_receive*", "--toggle-collect=*counted_transmit*"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "counted", "--test-threads=1"])
        .env(WHAT, format!("{direction} {count}"))
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
            let counts: Vec<_> = counts.collect();
            // System calls are counted everywhere, instructions only in what is of interest.
            if counts.first() > Some(&0) {
                sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
        }
    }
    (sums[0], sums[1])
}

#[test]
#[ignore = "needs an optimised build, and valgrind"]
fn a_frame_takes_at_most_80_instructions_and_no_system_call() {
    let each = ["receive", "transmit"].map(|direction| {
        let ((once, _), (twice, calls)) = (cost(direction, 200), cost(direction, 400));
        let frames = 200 * BURST as u64;
        let each = (twice - once) as f64 / frames as f64;
        println!("{each:.1} instructions to {direction} a frame, {calls} system calls");
        assert!(once >= frames, "something was counted");
        assert_eq!(calls, 0);
        each
    });
    assert!(each.iter().all(|each| *each <= MOST), "{each:?}");
}
