//! `cargo lab matrix`: which strategy each verb takes for each backing, and what it costs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};
use vfio_remap::space::{Attempt, Outcome, Request};
use vfio_remap::transport::MemoryDevice;
use vfio_remap::{Device, Placement, Report, Strategy, Window};

use crate::device::address;
use crate::raw::{PAGE, peek};

/// Of each way, for windows that are not large.
const RUNS: usize = 31;

/// For large ones, which take long to fill on old kernels.
const LARGE_RUNS: usize = 9;

/// Above this size a word in every 2 MiB is touched, not one in every page.
const LARGE: usize = 64 << 20;

/// One run of a verb on a window that has been touched all over.
struct Run {
    report: Report,
    /// The verb alone.
    verb: Duration,
    /// The verb, and touching all over what is live after it.
    ready: Duration,
    /// Page faults of touching the new side, then the source.
    faults: (i64, i64),
}

/// Touches a window all over, and counts the page faults of that.
fn touch(window: &Window) -> i64 {
    let faults = || getrusage(UsageWho::RUSAGE_SELF).unwrap().minor_page_faults();
    let before = faults();
    let stride = if window.size() > LARGE { 2 << 20 } else { PAGE };
    for offset in (0..window.size()).step_by(stride) {
        // SAFETY: the window is mapped; reading the lab's devices so is harmless.
        unsafe { peek(window.as_ptr() as usize + offset) };
    }
    faults() - before
}

/// How a verb is asked for.
type By = fn(Placement) -> Request;

fn duplicate(window: Window, by: By) -> Run {
    touch(&window);
    let started = Instant::now();
    let (new, report) = window.duplicate(by(Placement::Anywhere)).unwrap();
    let verb = started.elapsed();
    let faults = (touch(&new), touch(&window));
    Run { report, verb, ready: started.elapsed(), faults }
}

fn relocate(mut window: Window, by: By) -> Run {
    touch(&window);
    let started = Instant::now();
    let report = window.relocate(by(Placement::Anywhere)).unwrap().report;
    let verb = started.elapsed();
    let faults = (touch(&window), 0);
    Run { report, verb, ready: started.elapsed(), faults }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// The verb in the default order, in the order of cost, and by `MapAgain` alone, in turns: other load on
/// the machine then affects all alike.
fn row(backing: &str, name: &str, window: impl Fn() -> Window, verb: fn(Window, By) -> Run) {
    let ways: [By; 3] =
        [Request::from, Placement::cheapest, |placement| placement.only(Strategy::MapAgain)];
    let mut runs = ways.map(|_| Vec::new());
    let turns = if window().size() > LARGE { LARGE_RUNS } else { RUNS };
    for _ in 0..turns {
        for (by, runs) in ways.iter().zip(&mut runs) {
            runs.push(verb(window(), *by));
        }
    }
    let medians = |of: fn(&Run) -> Duration| {
        runs.each_ref().map(|runs| median(runs.iter().map(of).collect()))
    };
    let (verb, ready) = (medians(|run| run.verb), medians(|run| run.ready));
    let [usual, cheapest, _] = &runs;
    let Run { report, faults: (new, source), .. } = usual.last().unwrap();
    let cheapest = cheapest.last().unwrap().report.strategy;
    let refusals: Vec<_> = report.attempts.iter().map(refusal).collect();
    println!(
        "row\t{backing}\t{name}\t{}\t{}\t{new}\t{source}\t{:.1}\t{:.2}\t{:.1}\t{:.2}\t{cheapest}\t{:.2}",
        report.strategy,
        refusals.join(", "),
        verb[0],
        verb[0] / verb[2],
        ready[0],
        ready[0] / ready[2],
        ready[1] / ready[2],
    );
}

fn refusal(attempt: &Attempt) -> String {
    let why = match attempt.outcome {
        Outcome::Refused { errno, .. } => format!("{:?}", Errno::from_raw(errno)),
        Outcome::Hazard(hazard) => format!("{hazard:?}"),
        other => format!("{other:?}"),
    };
    format!("{}: {why}", attempt.strategy)
}

fn rows(backing: &str, device: &Device, bar: u32) {
    let bar = device.bar(bar).unwrap();
    let range = bar.layout().mappable().next().unwrap();
    let window = || bar.map(range.clone(), Placement::Anywhere).unwrap();
    row(backing, "duplicate", window, duplicate);
    row(backing, "relocate", window, relocate);
}

#[test]
#[ignore = "run by `cargo lab matrix`"]
fn matrix_rows() {
    // libtest leaves the line that names the test open.
    println!();
    for (name, bar) in [("nvme", 0), ("e1000e", 0), ("edu", 0), ("ivshmem64m", 2), ("ivshmem4g", 2)]
    {
        let device = Device::open(address(name)).unwrap();
        device.config().unwrap().set_memory_decoding(true).unwrap();
        rows(&format!("{name} BAR{bar}"), &device, bar);
    }
    rows("memfd", &Device::new(Arc::new(MemoryDevice::new(LARGE as u64).unwrap())), 0);
}
