//! Whether a guest still runs, whatever its payload does.
//!
//! `guest/init` has each processor write a letter of its own, A for the first, to the
//! fourth serial port every five seconds. Letters that come while the payload says
//! nothing tell a payload that waits from a guest that the emulator no longer runs:
//! with QEMU 10.0.2 now and then, on several kernels, processors are halted, and the
//! timers that are to wake them do not, or not all of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

/// In the directory of a boot: what the guest's processors have written.
pub const FILE: &str = "heartbeat";

/// For how long nothing must have come: a machine that is busy elsewhere is no reason.
const PATIENCE: Duration = Duration::from_secs(120);

/// What has been seen of a guest's life.
pub struct Pulse {
    /// Of each processor that has begun: how many letters, and when the last came.
    beats: BTreeMap<u8, (usize, Instant)>,
    /// How much the guest has written elsewhere, and when it last did.
    written: (usize, Instant),
}

/// Why a guest counts as standing still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standstill {
    /// This processor's letter comes no more.
    Processor(u8),
    /// No letter has come yet, nor anything else any more.
    Silence,
}

impl Pulse {
    pub fn new(now: Instant) -> Self {
        Self { beats: BTreeMap::new(), written: (0, now) }
    }

    /// Takes note of all letters that have come by now, and of how much was written
    /// elsewhere. Whether the guest stands still.
    pub fn look(&mut self, letters: &[u8], written: usize, now: Instant) -> Option<Standstill> {
        if written > self.written.0 {
            self.written = (written, now);
        }
        // A serial port that is opened may send a zero.
        for letter in letters.iter().copied().filter(u8::is_ascii_uppercase) {
            let count = letters.iter().filter(|&&other| other == letter).count();
            let beat = self.beats.entry(letter).or_insert((count, now));
            if count > beat.0 {
                *beat = (count, now);
            }
        }
        let is_over = |since: Instant| now.duration_since(since) >= PATIENCE;
        if self.beats.is_empty() {
            return is_over(self.written.1).then_some(Standstill::Silence);
        }
        let mut dead = self.beats.iter().filter(|(_, (_, last))| is_over(*last));
        dead.next().map(|(letter, _)| Standstill::Processor(letter - b'A'))
    }
}

impl fmt::Display for Standstill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = PATIENCE.as_secs();
        match self {
            Self::Processor(number) => {
                write!(f, "nothing has run on its processor {number} for {seconds} s")
            }
            Self::Silence => write!(f, "nothing has come from it for {seconds} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a guest every five seconds; when it was found to stand still, and why.
    fn watch(
        seconds: u64,
        letters: impl Fn(u64) -> String,
        written: impl Fn(u64) -> usize,
    ) -> Option<(u64, Standstill)> {
        let start = Instant::now();
        let mut pulse = Pulse::new(start);
        (0..=seconds).step_by(5).find_map(|second| {
            let now = start + Duration::from_secs(second);
            let found = pulse.look(letters(second).as_bytes(), written(second), now)?;
            Some((second, found))
        })
    }

    fn beats(letter: &str, second: u64) -> String {
        letter.repeat(second as usize / 5)
    }

    #[test]
    fn a_payload_that_says_nothing_is_no_standstill() {
        assert_eq!(watch(1200, |second| beats("AB", second), |_| 0), None);
    }

    #[test]
    fn a_processor_whose_letter_comes_no_more_stands_still() {
        let letters = |second: u64| beats("A", second) + &beats("B", second.min(20));
        // However much is still written.
        let found = watch(1200, letters, |second| second as usize);
        assert_eq!(found, Some((20 + PATIENCE.as_secs(), Standstill::Processor(1))));
    }

    #[test]
    fn before_the_first_letter_only_silence_is_a_standstill() {
        assert_eq!(watch(1200, |_| String::new(), |second| second as usize), None);
        let found = watch(1200, |_| String::new(), |second| second.min(30) as usize);
        assert_eq!(found, Some((30 + PATIENCE.as_secs(), Standstill::Silence)));
        // A processor that has not begun is none that has ceased.
        assert_eq!(watch(1200, |second| beats("A", second), |_| 0), None);
    }

    #[test]
    fn other_bytes_are_no_heartbeat() {
        let found = watch(1200, |second| "\0".repeat(second as usize), |_| 0);
        assert_eq!(found, Some((PATIENCE.as_secs(), Standstill::Silence)));
    }
}
