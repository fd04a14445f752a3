//! Detects whether a guest still runs, independently of its payload.
//!
//! `guest/init` makes each processor write its letter, A for the first, to the fourth
//! serial port every five seconds. While the payload writes nothing, the letters show
//! whether the payload waits, or the emulator no longer runs the guest. With QEMU 10.0.2
//! processors sometimes stay halted, on several kernels, because some or all of the
//! timers that should wake them do not fire.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

/// The file in the directory of a boot that receives the letters.
pub const FILE: &str = "heartbeat";

/// A guest counts as stalled after this time without a sign of life. It is long, since
/// the host may be busy.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// The signs of life of a guest.
pub struct Pulse {
    /// For each processor that has started: the count of its letters, and when the last
    /// one arrived.
    beats: BTreeMap<u8, (usize, Instant)>,
    /// How much other output the guest has written, and when it last did.
    written: (usize, Instant),
}

/// Why a guest counts as stalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standstill {
    /// This processor has stopped writing its letter.
    Processor(u8),
    /// No letter has arrived yet, and the guest has stopped writing other output.
    Silence,
}

impl Pulse {
    pub fn new(now: Instant) -> Self {
        Self { beats: BTreeMap::new(), written: (0, now) }
    }

    /// Records all letters so far, and the amount of other output. Returns whether the
    /// guest has stalled.
    pub fn look(&mut self, letters: &[u8], written: usize, now: Instant) -> Option<Standstill> {
        if written > self.written.0 {
            self.written = (written, now);
        }
        // Opening a serial port may send a zero.
        for letter in letters.iter().copied().filter(u8::is_ascii_uppercase) {
            let count = letters.iter().filter(|&&other| other == letter).count();
            let beat = self.beats.entry(letter).or_insert((count, now));
            if count > beat.0 {
                *beat = (count, now);
            }
        }
        let is_over = |since: Instant| now.duration_since(since) >= TIME_LIMIT;
        if self.beats.is_empty() {
            return is_over(self.written.1).then_some(Standstill::Silence);
        }
        let mut dead = self.beats.iter().filter(|(_, (_, last))| is_over(*last));
        dead.next().map(|(letter, _)| Standstill::Processor(letter - b'A'))
    }
}

impl fmt::Display for Standstill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = TIME_LIMIT.as_secs();
        match self {
            Self::Processor(number) => {
                write!(f, "its processor {number} has not run for {seconds} s")
            }
            Self::Silence => write!(f, "it has written nothing for {seconds} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks a guest every five seconds. Returns when it was found to have stalled, and
    /// why.
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
    fn a_payload_that_writes_nothing_is_not_a_standstill() {
        assert_eq!(watch(1200, |second| beats("AB", second), |_| 0), None);
    }

    #[test]
    fn a_processor_that_stops_writing_its_letter_is_a_standstill() {
        let letters = |second: u64| beats("A", second) + &beats("B", second.min(20));
        // Other output does not matter.
        let found = watch(1200, letters, |second| second as usize);
        assert_eq!(found, Some((20 + TIME_LIMIT.as_secs(), Standstill::Processor(1))));
    }

    #[test]
    fn before_the_first_letter_only_silence_is_a_standstill() {
        assert_eq!(watch(1200, |_| String::new(), |second| second as usize), None);
        let found = watch(1200, |_| String::new(), |second| second.min(30) as usize);
        assert_eq!(found, Some((30 + TIME_LIMIT.as_secs(), Standstill::Silence)));
        // A processor that has not started has not stopped.
        assert_eq!(watch(1200, |second| beats("A", second), |_| 0), None);
    }

    #[test]
    fn other_bytes_do_not_count() {
        let found = watch(1200, |second| "\0".repeat(second as usize), |_| 0);
        assert_eq!(found, Some((TIME_LIMIT.as_secs(), Standstill::Silence)));
    }
}
