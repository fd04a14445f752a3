//! What a verb did, which way it took, and why not another.

use std::fmt;
use std::ops::{Deref, Range};

use arrayvec::ArrayVec;
use nix::errno::Errno;

use super::{Hazard, Strategy};
use crate::error::describe;

/// What was asked of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verb {
    /// A second window over the same bytes.
    Duplicate,
    /// The same window elsewhere.
    Relocate,
}

/// Why a strategy was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The kernel refused, with this error number.
    Refused {
        /// The error number of `mmap` or `mremap`.
        errno: i32,
        /// Not asked this time: an earlier probe of the same backing was answered so.
        remembered: bool,
    },
    /// The kernel would accept, and cannot be trusted with it.
    Hazard(Hazard),
    /// A duplicate cannot be made this way.
    OnlyMoves,
}

/// A strategy that was tried, or known, before the one that worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Attempt {
    /// The strategy.
    pub strategy: Strategy,
    /// Why it was not taken.
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
            Outcome::Hazard(hazard) => write!(f, "{strategy} was not taken: {hazard}"),
            Outcome::OnlyMoves => write!(f, "{strategy} cannot duplicate"),
        }
    }
}

/// The strategies before the one that worked, in the order in which they were considered: a slice.
///
/// Kept in place and not on the heap: on stock kernels every verb on a BAR has one to report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempts(ArrayVec<Attempt, 3>);

impl Attempts {
    /// Adds one; each strategy is considered once, so there is room.
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

/// What became of the side that a verb started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// Live, with its page tables as they were.
    Warm,
    /// Live; its next accesses fault once more.
    Cold,
    /// Reserved memory that reaches nothing, without having been a hole for an instant.
    Released,
    /// Reserved memory that reaches nothing; for an instant it was a hole (`gap`).
    ReleasedWithGap,
    /// It was a hole for an instant (`gap`), and somebody took it; or nobody can tell whether it was, and
    /// what is mapped there is left alone.
    Lost,
}

/// Which way a verb took and why: its `Display` is a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What was asked.
    pub verb: Verb,
    /// The strategy that did it.
    pub strategy: Strategy,
    /// The strategies before it.
    pub attempts: Attempts,
    /// The addresses of the window that the verb started from.
    pub from: Range<usize>,
    /// The addresses of the window that it made.
    pub to: Range<usize>,
    /// What became of the addresses `from`.
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
            Source::Warm => "; the source is live and warm",
            Source::Cold => "; the source is live but cold: it faults in again when touched",
            Source::Released => "; the old range is reserved and reaches nothing",
            Source::ReleasedWithGap => {
                "; the old range is reserved and reaches nothing, but was a hole for an instant (gap)"
            }
            Source::Lost => {
                "; the old range was lost: after a failed call, what is mapped there is another's, or cannot \
                 be told from another's"
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
             (Invalid argument) (remembered); the source is live and warm"
        );
    }

    #[test]
    fn what_became_of_the_source_ends_the_sentence() {
        let attempt = |outcome| Attempt { strategy: Strategy::Move, outcome };
        let attempts = [
            attempt(Outcome::OnlyMoves),
            attempt(Outcome::Hazard(Hazard::UnknownBacking)),
            attempt(Outcome::Refused { errno: Errno::EIO as i32, remembered: false }),
        ];
        for (source, end) in [
            (Source::Warm, "; the source is live and warm"),
            (Source::Cold, "; the source is live but cold: it faults in again when touched"),
            (Source::Released, "; the old range is reserved and reaches nothing"),
            (Source::ReleasedWithGap, "was a hole for an instant (gap)"),
            (Source::Lost, "cannot be told from another's"),
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
                         not taken: nothing says that this backing fills the source again; Move was \
                         refused with EIO (I/O error); ";
            assert!(sentence.starts_with(start) && sentence.ends_with(end), "{sentence}");
        }
    }
}
