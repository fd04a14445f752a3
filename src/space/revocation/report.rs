//! The reports of revoke, restore and seal.

use std::fmt;
use std::ops::Range;

/// What a window reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WindowState {
    /// Its device.
    Live,
    /// Private pages. A store changes only these, and may be read back until the window is restored.
    Revoked {
        /// Whether they read all ones. A window that is larger than
        /// [`revocable_size`](super::revocable_size) was when it was mapped reads zeros.
        reads_ones: bool,
    },
    /// Its device, until the process ends.
    Sealed,
}

/// What revoking, restoring or sealing did to a window. Its `Display` is a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StateReport {
    /// The addresses of the window. They have not changed.
    pub addresses: Range<usize>,
    /// What the window reached before.
    pub before: WindowState,
    /// What it reaches now.
    pub after: WindowState,
}

impl StateReport {
    /// Whether the verb has changed anything.
    pub fn has_changed(&self) -> bool {
        self.before != self.after
    }
}

impl fmt::Display for StateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.addresses;
        let shows = |reads_ones| if reads_ones { "reads all ones" } else { "reads zeros" };
        match (self.before, self.after) {
            (WindowState::Revoked { .. }, WindowState::Revoked { reads_ones }) => {
                let shows = shows(reads_ones);
                write!(f, "{start:#x}..{end:#x} stays revoked, and {shows}")
            }
            (_, WindowState::Revoked { reads_ones }) => {
                let shows = shows(reads_ones);
                write!(f, "revoked {start:#x}..{end:#x}, which {shows}; writes to it are dropped")
            }
            (WindowState::Revoked { .. }, WindowState::Live) => {
                write!(f, "restored {start:#x}..{end:#x} by a new mapping that was moved there")
            }
            (WindowState::Sealed, WindowState::Sealed) => {
                write!(f, "{start:#x}..{end:#x} stays sealed, and reaches its device")
            }
            (_, WindowState::Live) => write!(f, "{start:#x}..{end:#x} reaches its device"),
            (_, WindowState::Sealed) => write!(
                f,
                "sealed {start:#x}..{end:#x}, which reaches its device until the process ends"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_a_state_is_a_sentence() {
        use WindowState::{Live, Revoked, Sealed};
        let (ones, zeros) = (Revoked { reads_ones: true }, Revoked { reads_ones: false });
        for (before, after, sentence) in [
            (Live, ones, "revoked 0x1000..0x3000, which reads all ones; writes to it are dropped"),
            (Live, zeros, "revoked 0x1000..0x3000, which reads zeros; writes to it are dropped"),
            (ones, ones, "0x1000..0x3000 stays revoked, and reads all ones"),
            (ones, Live, "restored 0x1000..0x3000 by a new mapping that was moved there"),
            (Live, Live, "0x1000..0x3000 reaches its device"),
            (Sealed, Sealed, "0x1000..0x3000 stays sealed, and reaches its device"),
            (
                Live,
                Sealed,
                "sealed 0x1000..0x3000, which reaches its device until the process ends",
            ),
        ] {
            let report = StateReport { addresses: 0x1000..0x3000, before, after };
            assert_eq!(report.to_string(), sentence);
            assert_eq!(report.has_changed(), before != after);
        }
    }
}
