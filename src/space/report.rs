//! The report of a verb: which strategy was used, and why the ones before it were not.

use std::fmt;
use std::ops::{Deref, Range};

use arrayvec::ArrayVec;
use nix::errno::Errno;

use super::{Hazard, Strategy};
use crate::error::describe;

/// What was done with a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verb {
    /// A second window over the same bytes.
    Duplicate,
    /// The same window at another address.
    Relocate,
}

/// Why a strategy was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The kernel refused, with this error number.
    Refused {
        /// The error number of `mmap` or `mremap`.
        errno: i32,
        /// Whether an earlier probe of the same backing gave this error, and the call was not made again.
        remembered: bool,
    },
    /// The kernel would accept the call, but a hazard makes it unsafe.
    Hazard(Hazard),
    /// The strategy can only relocate, not duplicate.
    OnlyMoves,
    /// The strategy can only duplicate, not relocate.
    OnlyDuplicates,
}

/// A strategy before the one that worked, and why it was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Attempt {
    /// The strategy.
    pub strategy: Strategy,
    /// Why it was not used.
    pub outcome: Outcome,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { strategy, outcome } = self;
        match outcome {
            Outcome::Refused { errno, remembered } => {
                let when = if *remembered { " (remembered)" } else { "" };
                write!(f, "{strategy} was refused with {}{when}", describe(Errno::from_raw(*errno)))
            }
            Outcome::Hazard(hazard) => write!(f, "{strategy} was not used: {hazard}"),
            Outcome::OnlyMoves => write!(f, "{strategy} cannot duplicate"),
            Outcome::OnlyDuplicates => write!(f, "{strategy} cannot relocate"),
        }
    }
}

/// The strategies before the one that worked, in order: a slice.
///
/// Stored in place and not on the heap, because on stock kernels every verb on a BAR reports one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempts(ArrayVec<Attempt, { Strategy::COUNT }>);

impl Attempts {
    /// Adds one. There is room, because each strategy is tried once.
    pub(super) fn push(&mut self, attempt: Attempt) {
        self.0.push(attempt);
    }
}

impl Deref for Attempts {
    type Target = [Attempt];

    fn deref(&self) -> &[Attempt] {
        &self.0
    }
}

/// What happened to the addresses that a verb started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// Still mapped, with its page tables unchanged.
    Warm,
    /// Still mapped; the next access to each page faults again.
    Cold,
    /// Reserved, and reaches nothing. It was never a hole.
    Released,
    /// Reserved, and reaches nothing. It was a hole for an instant (`gap`).
    ReleasedWithGap,
    /// No longer ours: it was, or may have been, a hole for an instant (`gap`), and what is mapped there
    /// now may belong to other code. The crate does not touch it.
    Lost,
}

/// Which strategy a verb used, and why. Its `Display` is a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What was done.
    pub verb: Verb,
    /// The strategy that was used.
    pub strategy: Strategy,
    /// The strategies before it.
    pub attempts: Attempts,
    /// The addresses of the window that the verb started from.
    pub from: Range<usize>,
    /// The addresses of the window that it made.
    pub to: Range<usize>,
    /// What happened to the addresses `from`.
    pub source: Source,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.verb {
            Verb::Duplicate => "duplicated",
            Verb::Relocate => "relocated",
        };
        let Self { strategy, from, to, .. } = self;
        write!(f, "{verb} {:#x}..{:#x} to {:#x} by {strategy}", from.start, from.end, to.start)?;
        for attempt in self.attempts.iter() {
            write!(f, "; {attempt}")?;
        }
        f.write_str(match self.source {
            Source::Warm => "; the source is still mapped",
            Source::Cold => "; the source is still mapped, and its next accesses fault again",
            Source::Released => "; the old range is reserved and reaches nothing",
            Source::ReleasedWithGap => {
                "; the old range is reserved and reaches nothing, but was a hole for an instant (gap)"
            }
            Source::Lost => {
                "; the old range was lost: after a failed call, what is mapped there may belong to other code"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_sentence() {
        let report = Report {
            verb: Verb::Duplicate,
            strategy: Strategy::MapAgain,
            attempts: Attempts(ArrayVec::from_iter([Attempt {
                strategy: Strategy::DontUnmap,
                outcome: Outcome::Refused { errno: Errno::EINVAL as i32, remembered: true },
            }])),
            from: 0x1000..0x3000,
            to: 0x8000..0xa000,
            source: Source::Warm,
        };
        assert_eq!(
            report.to_string(),
            "duplicated 0x1000..0x3000 to 0x8000 by MapAgain; DontUnmap was refused with EINVAL \
             (Invalid argument) (remembered); the source is still mapped"
        );
    }

    #[test]
    fn the_sentence_ends_with_what_happened_to_the_source() {
        let attempt = |outcome| Attempt { strategy: Strategy::Move, outcome };
        let attempts = [
            attempt(Outcome::OnlyMoves),
            attempt(Outcome::Hazard(Hazard::UnknownBacking)),
            attempt(Outcome::Refused { errno: Errno::EIO as i32, remembered: false }),
        ];
        for (source, end) in [
            (Source::Warm, "; the source is still mapped"),
            (Source::Cold, "; the source is still mapped, and its next accesses fault again"),
            (Source::Released, "; the old range is reserved and reaches nothing"),
            (Source::ReleasedWithGap, "was a hole for an instant (gap)"),
            (Source::Lost, "may belong to other code"),
        ] {
            let report = Report {
                verb: Verb::Relocate,
                strategy: Strategy::MapAgain,
                attempts: Attempts(ArrayVec::from_iter(attempts)),
                from: 0x1000..0x3000,
                to: 0x8000..0xa000,
                source,
            };
            let sentence = report.to_string();
            let start = "relocated 0x1000..0x3000 to 0x8000 by MapAgain; Move cannot duplicate; Move was \
                         not used: it is not known whether faults fill the old side again for this \
                         kind of file; Move was refused with EIO (I/O error); ";
            assert!(sentence.starts_with(start) && sentence.ends_with(end), "{sentence}");
        }
    }
}
