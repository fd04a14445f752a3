//! Warnings that a guest can cause as often as it likes, for example by turning interrupts off and on.

use std::collections::BTreeSet;
use std::fmt;

use log::Level;

use crate::error::Error;

/// What a guest does not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    Intx,
    Msi,
    /// One MSI instead of several.
    FewVectors,
    /// A vector of MSI-X.
    Vector,
    BusMastering,
    Peers,
}

/// The causes that a device has had. Each is a warning once, and for debugging then, so that no guest fills the log.
#[derive(Debug)]
pub(super) struct Warnings {
    name: String,
    seen: BTreeSet<Cause>,
}

impl Warnings {
    /// For the device `name`.
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), seen: BTreeSet::new() }
    }

    pub(super) fn warn(&mut self, cause: Cause, error: &Error) {
        log::log!(self.level(cause), "{cause} {}: {error}", self.name);
    }

    fn level(&mut self, cause: Cause) -> Level {
        if self.seen.insert(cause) { Level::Warn } else { Level::Debug }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intx => "the guest gets no INTx of",
            Self::Msi => "the guest gets no MSI of",
            Self::FewVectors => "the guest gets a single MSI of",
            Self::Vector => "the guest does not get every vector of",
            Self::BusMastering => "the guest cannot change bus mastering of",
            Self::Peers => "other devices do not reach every BAR of",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_a_warning_once() {
        let mut warnings = Warnings::new("0000:00:03.0");
        let causes = [Cause::Intx, Cause::Vector, Cause::Intx, Cause::Vector, Cause::Peers];
        let levels = causes.map(|cause| warnings.level(cause));
        assert_eq!(levels, [Level::Warn, Level::Warn, Level::Debug, Level::Debug, Level::Warn]);
    }
}
