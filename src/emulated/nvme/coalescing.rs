//! Interrupt coalescing (NVMe 1.4 §5.21.1.8, §5.21.1.9).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The unit of the aggregation time.
const TIME_UNIT: Duration = Duration::from_micros(100);

/// Delays the interrupts of I/O completion queues.
#[derive(Debug, Default)]
pub(super) struct Coalescing {
    /// How many completions an interrupt reports.
    threshold: u32,
    /// The longest delay; zero for none.
    time: Duration,
    /// The vectors that are exempt.
    exempt: BTreeSet<u16>,
    waiting: BTreeMap<u16, Waiting>,
}

/// The completions of a vector that no interrupt has reported.
#[derive(Debug)]
struct Waiting {
    count: u32,
    since: Instant,
}

impl Coalescing {
    /// Sets the feature Interrupt Coalescing: the time in bits 15:8, the threshold, zero-based, in bits 7:0.
    pub(super) fn set(&mut self, value: u32) {
        self.threshold = (value & 0xff) + 1;
        self.time = TIME_UNIT * (value >> 8 & 0xff);
    }

    /// Whether a vector is exempt: the feature Interrupt Vector Configuration.
    pub(super) fn is_exempt(&self, vector: u16) -> bool {
        self.exempt.contains(&vector)
    }

    pub(super) fn set_exempt(&mut self, vector: u16, exempt: bool) {
        if exempt {
            self.exempt.insert(vector);
        } else {
            self.exempt.remove(&vector);
        }
    }

    /// Counts a completion. Returns whether the vector fires now. One that is `urgent` is not delayed.
    pub(super) fn count(&mut self, vector: u16, urgent: bool) -> bool {
        let waiting = self.waiting.entry(vector);
        let waiting = waiting.or_insert_with(|| Waiting { count: 0, since: Instant::now() });
        waiting.count += 1;
        let fires = urgent
            || self.time.is_zero()
            || waiting.count >= self.threshold
            || self.exempt.contains(&vector);
        if fires {
            self.waiting.remove(&vector);
        }
        fires
    }

    /// The vectors whose completions have waited long enough. They fire now.
    pub(super) fn due(&mut self) -> Vec<u16> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let now = Instant::now();
        let mut due = Vec::new();
        self.waiting.retain(|vector, waiting| {
            let is_due =
                waiting.count >= self.threshold || now.duration_since(waiting.since) >= self.time;
            if is_due {
                due.push(*vector);
            }
            !is_due
        });
        due
    }
}
