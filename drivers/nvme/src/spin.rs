//! Whether to poll before sleeping: as long as that is likely to be worth it.

use std::time::{Duration, Instant};

/// One wait of this many polls although the average says that it is not worth it.
const TRIAL: u32 = 64;
/// The average moves by one of so many parts of the difference.
const PARTS: u32 = 8;

/// How long the waits of a queue take, and how long to poll.
#[derive(Debug)]
pub struct Spin {
    /// The longest time to poll.
    limit: Duration,
    /// How long a wait takes on average; `None` before the first.
    average: Option<Duration>,
    waits: u32,
}

impl Spin {
    pub fn new(limit: Duration) -> Self {
        Self { limit, average: None, waits: 0 }
    }

    /// Begins a wait.
    pub fn begin(&mut self) -> Wait {
        Wait { begun: Instant::now(), budget: self.budget() }
    }

    /// Ends a wait, with a completion.
    pub fn end(&mut self, wait: &Wait) {
        self.note(wait.begun.elapsed());
    }

    /// How long the next wait polls.
    fn budget(&mut self) -> Duration {
        self.waits = self.waits.wrapping_add(1);
        match self.average {
            Some(average) if !self.waits.is_multiple_of(TRIAL) => {
                if average > self.limit {
                    Duration::ZERO
                } else {
                    self.limit.min(average.saturating_mul(2))
                }
            }
            _ => self.limit,
        }
    }

    fn note(&mut self, took: Duration) {
        let Some(average) = self.average else { return self.average = Some(took) };
        self.average = Some((average.saturating_mul(PARTS - 1)).saturating_add(took) / PARTS);
    }
}

/// A wait that has begun.
#[derive(Debug)]
pub struct Wait {
    begun: Instant,
    budget: Duration,
}

impl Wait {
    /// Whether to poll once more.
    pub fn polls(&self) -> bool {
        !self.budget.is_zero() && self.begun.elapsed() < self.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(20);

    fn after(waits: &[u64]) -> Spin {
        let mut spin = Spin::new(LIMIT);
        waits.iter().for_each(|took| spin.note(Duration::from_micros(*took)));
        spin
    }

    #[test]
    fn short_waits_are_polled_twice_as_long_as_they_take() {
        assert_eq!(Spin::new(LIMIT).budget(), LIMIT, "nothing is known yet");
        assert_eq!(after(&[4; 10]).budget(), Duration::from_micros(8));
        assert_eq!(after(&[15; 10]).budget(), LIMIT);
    }

    #[test]
    fn long_waits_are_polled_in_a_few_trials_only() {
        let mut spin = after(&[100]);
        let budgets: Vec<_> = (0..2 * TRIAL).map(|_| spin.budget()).collect();
        assert_eq!(budgets.iter().filter(|budget| **budget == LIMIT).count(), 2);
        assert_eq!(budgets.iter().filter(|budget| budget.is_zero()).count(), budgets.len() - 2);
    }

    #[test]
    fn the_average_follows_the_device() {
        let mut spin = after(&[100; 5]);
        let mut waits = 0;
        while spin.budget().is_zero() {
            spin.note(Duration::from_micros(5));
            waits += 1;
        }
        assert!((2..TRIAL).contains(&waits), "{waits} waits");
        for _ in 0..waits {
            spin.note(Duration::from_millis(50));
        }
        assert!(spin.budget().is_zero());
    }

    #[test]
    fn without_a_limit_no_wait_is_polled() {
        let mut spin = Spin::new(Duration::ZERO);
        assert!((0..2 * TRIAL).all(|_| spin.budget().is_zero()));
        assert!(!spin.begin().polls());
    }
}
