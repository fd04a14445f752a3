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

/// The backing that is no BAR.
const MEMORY: &str = "memfd";

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

/// Duplicates or relocates a window as requested. `None` if that is refused.
type Verb = fn(Window, Request) -> Option<Run>;

fn duplicate(window: Window, request: Request) -> Option<Run> {
    touch(&window);
    let started = Instant::now();
    let (new, report) = window.duplicate(request).ok()?;
    let verb = started.elapsed();
    let faults = (touch(&new), touch(&window));
    Some(Run { report, verb, ready: started.elapsed(), faults })
}

fn relocate(mut window: Window, request: Request) -> Option<Run> {
    touch(&window);
    let started = Instant::now();
    let report = window.relocate(request).ok()?.report;
    let verb = started.elapsed();
    let faults = (touch(&window), 0);
    Some(Run { report, verb, ready: started.elapsed(), faults })
}

/// The medians of a strategy, in microseconds.
struct Cost {
    strategy: Strategy,
    verb: f64,
    ready: f64,
}

fn median(times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// The strategies in turns: other load on the machine then affects all alike. Those that are refused are left out.
fn costs(window: &impl Fn() -> Window, verb: Verb) -> Vec<Cost> {
    let by = |strategy: &Strategy| verb(window(), Placement::Anywhere.by(&[*strategy]));
    let strategies: Vec<_> =
        Strategy::DEFAULT_ORDER.iter().filter(|strategy| by(strategy).is_some()).collect();
    let turns = if window().size() > LARGE { LARGE_RUNS } else { RUNS };
    let turn = |_| strategies.iter().map(|strategy| by(strategy).unwrap()).collect::<Vec<_>>();
    let turns: Vec<_> = (0..turns).map(turn).collect();
    let of = |index: usize, what: fn(&Run) -> Duration| {
        median(turns.iter().map(|turn| what(&turn[index])))
    };
    strategies
        .iter()
        .enumerate()
        .map(|(index, strategy)| Cost {
            strategy: **strategy,
            verb: of(index, |run| run.verb),
            ready: of(index, |run| run.ready),
        })
        .collect()
}

/// What each strategy costs, and which of them three orders choose: the default order, that of
/// `Placement::cheapest`, and the default without `OldLenZero`. The last has also no way to know that a kernel moves
/// entries of 1 GiB.
fn row(backing: &str, name: &str, window: impl Fn() -> Window, verb: Verb) {
    let costs = costs(&window, verb);
    let cost = |strategy| costs.iter().find(|it| it.strategy == strategy).unwrap();
    let choice = |request: Request| verb(window(), request).unwrap();
    let Run { report, faults: (new, source), .. } = choice(Placement::Anywhere.into());
    let cheapest = choice(Placement::Anywhere.cheapest()).report.strategy;
    let may_hold_gib_entries = backing != MEMORY && window().size() >= 1 << 30;
    let without: &[_] = match may_hold_gib_entries {
        true => &[Strategy::MapAgain],
        false => &[Strategy::DontUnmap, Strategy::MapAgain],
    };
    let without = choice(Placement::Anywhere.by(without)).report.strategy;
    let ready = |strategy| cost(strategy).ready;
    let refusals: Vec<_> = report.attempts.iter().map(refusal).collect();
    let cell = |strategy: &Strategy| {
        let cost = costs.iter().find(|it| it.strategy == *strategy);
        cost.map_or(String::new(), |it| format!("{:.1} / {:.1}", it.verb, it.ready))
    };
    let cells: Vec<_> = Strategy::DEFAULT_ORDER.iter().map(cell).collect();
    println!(
        "row\t{backing}\t{name}\t{}\t{}\t{new}\t{source}\t{}\t{cheapest}\t{:.2}\t{without}\t{:.2}",
        report.strategy,
        refusals.join(", "),
        cells.join("\t"),
        ready(cheapest) / ready(report.strategy),
        ready(report.strategy) / ready(without),
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
    rows(MEMORY, &Device::new(Arc::new(MemoryDevice::new(LARGE as u64).unwrap())), 0);
}
