//! The processor time of turns: parts of a guest's run that its payload marks in its output.
//!
//! A payload that compares programs lets them run by turns, and writes `turn`, the number of the
//! turn, and `begins` or `ends`, separated by tabs. `benches/common/turn.rs` does so. The time is
//! that of all threads of the emulator, since they do the work of the guest and of its devices.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::block_stats::BlockStats;
use crate::boot::Watcher;
use crate::processors::{self, Threads};

/// What begins the names of the threads that run the guest's processors, with QEMU's option
/// `debug-threads`.
const PROCESSOR: &str = "CPU ";

/// Takes the times as the guest's output comes.
#[derive(Default)]
pub struct Turns {
    process: u32,
    /// The block node whose commands count.
    node: Option<&'static str>,
    stats: Option<BlockStats>,
    /// The beginning of a line that has not ended.
    line: Vec<u8>,
    begun: Option<(u32, Reading)>,
    /// By number.
    pub done: BTreeMap<u32, Used>,
}

/// What was used in one turn.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// By the threads that run the guest's processors, and for what its devices do meanwhile.
    pub guest: Duration,
    /// By the other threads of the emulator.
    pub emulator: Duration,
    /// By everybody on this machine, the emulator included.
    pub by_all: Duration,
    pub elapsed: Duration,
    /// How often the other threads of the emulator went to sleep.
    pub sleeps: u64,
    /// The commands of the counted block node.
    pub commands: u64,
}

impl Used {
    /// By all threads of the emulator.
    pub fn total(&self) -> Duration {
        self.guest + self.emulator
    }
}

struct Reading {
    at: Instant,
    threads: Threads,
    busy: Duration,
    commands: u64,
}

impl Reading {
    fn now(process: u32, commands: u64) -> Result<Self> {
        let (at, threads) = (Instant::now(), Threads::of(process)?);
        Ok(Self { at, threads, busy: processors::busy()?, commands })
    }

    fn since(&self, earlier: &Self) -> Used {
        let is_processor = |name: &str| name.starts_with(PROCESSOR);
        let guest = self.threads.since(&earlier.threads, is_processor);
        let emulator = self.threads.since(&earlier.threads, |name| !is_processor(name));
        Used {
            guest,
            emulator,
            by_all: self.busy.saturating_sub(earlier.busy),
            elapsed: self.at.duration_since(earlier.at),
            sleeps: self.threads.sleeps_since(&earlier.threads, |name| !is_processor(name)),
            commands: self.commands.saturating_sub(earlier.commands),
        }
    }
}

impl Turns {
    /// Counts the commands of a block node, too, and gives the emulator the highest priority.
    pub fn counting(node: &'static str) -> Self {
        Self { node: Some(node), ..Self::default() }
    }

    /// The share of this machine's processors that other processes used during the turns.
    pub fn share_of_others(&self) -> f64 {
        let sum = |time: fn(&Used) -> Duration| {
            self.done.values().map(time).sum::<Duration>().as_secs_f64()
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let others = sum(|used| used.by_all) - sum(Used::total);
        let all = sum(|used| used.elapsed) * processors;
        if all > 0.0 { (others / all).max(0.0) } else { 0.0 }
    }

    /// The commands of the counted block node so far.
    fn commands(&mut self) -> Result<u64> {
        let Some(node) = self.node else { return Ok(0) };
        if self.stats.is_none() {
            self.stats = Some(BlockStats::of(self.process)?);
            // Now all threads exist. If it may not be done, the turns are measured without.
            let _ = processors::prefer(self.process);
        }
        self.stats.as_mut().map_or(Ok(0), |stats| stats.completed(node))
    }

    fn mark(&mut self, number: u32, begins: bool) {
        // If QEMU has ended, the turn has no time.
        let Ok(now) = self.commands().and_then(|count| Reading::now(self.process, count)) else {
            return;
        };
        if begins {
            self.begun = Some((number, now));
        } else if let Some((begun, earlier)) = self.begun.take()
            && begun == number
        {
            self.done.insert(number, now.since(&earlier));
        }
    }
}

impl Watcher for Turns {
    fn started(&mut self, process: u32) {
        *self = Self { process, node: self.node, ..Self::default() };
    }

    fn output(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if let Some((number, begins)) = parse_mark(&line) {
                self.mark(number, begins);
            }
        }
    }
}

/// The number of a turn, and whether it begins or ends.
fn parse_mark(line: &[u8]) -> Option<(u32, bool)> {
    let line = std::str::from_utf8(line).ok()?.strip_prefix("turn\t")?;
    let (number, what) = line.trim_end().split_once('\t')?;
    let begins = match what {
        "begins" => true,
        "ends" => false,
        _ => return None,
    };
    Some((number.parse().ok()?, begins))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_has_the_time_that_its_process_used() {
        let mut turns = Turns::default();
        turns.started(std::process::id());
        turns.output(b"hello\nturn\t7\tbeg");
        turns.output(b"ins\r\n");
        let started = Instant::now();
        let mut number = 0_u64;
        while started.elapsed() < Duration::from_millis(50) {
            number = std::hint::black_box(number + 1);
        }
        turns.output(b"turn\t7\tends\nturn\t8\tends\n");
        assert_eq!(turns.done.keys().collect::<Vec<_>>(), [&7]);
        let used = turns.done[&7];
        assert!(used.emulator > Duration::ZERO && used.guest == Duration::ZERO, "{used:?}");
        assert!(used.elapsed >= Duration::from_millis(50), "{used:?}");
    }

    #[test]
    fn what_the_emulator_did_not_use_is_the_share_of_others() {
        let seconds = Duration::from_secs;
        let processors = std::thread::available_parallelism().unwrap().get() as u32;
        let used = |by_all| Used {
            guest: seconds(1),
            emulator: seconds(1),
            by_all: seconds(2) + by_all * processors,
            elapsed: seconds(10),
            ..Used::default()
        };
        let done = [(1, used(seconds(4))), (2, used(seconds(1)))].into();
        let share = Turns { done, ..Turns::default() }.share_of_others();
        assert!((share - 0.25).abs() < 1e-9, "{share}");
        assert_eq!(Turns::default().share_of_others(), 0.0);
    }

    #[test]
    fn a_boot_that_is_repeated_forgets_its_turns() {
        let mut turns = Turns::default();
        turns.started(std::process::id());
        turns.output(b"turn\t1\tbegins\nturn\t1\tends\nturn\t2\tbegins\n");
        turns.started(std::process::id());
        turns.output(b"turn\t2\tends\n");
        assert!(turns.done.is_empty());
    }

    #[test]
    fn only_marks_are_turns() {
        assert_eq!(parse_mark(b"turn\t12\tbegins\r"), Some((12, true)));
        assert_eq!(parse_mark(b"turn\t12\tends"), Some((12, false)));
        for other in ["turn\t12", "turn\tx\tends", "row\t12\tends", "turn\t1\tgoes on"] {
            assert_eq!(parse_mark(other.as_bytes()), None, "{other}");
        }
    }
}
