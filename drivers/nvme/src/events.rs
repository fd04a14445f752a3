//! Asynchronous events (NVMe Base 1.4 §5.2.1): what a controller tells unasked.

use std::fmt;

/// An event, of which the controller tells once until the log page that it names is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AsyncEvent {
    /// 0 an error, 1 its health, 2 a notice, 6 of the command set, 7 the vendor's.
    pub kind: u8,
    /// What has happened, depending on the kind.
    pub information: u8,
    /// Where there is more to be read.
    pub log_page: u8,
}

impl AsyncEvent {
    pub(super) fn new(result: u32) -> Self {
        Self {
            kind: (result & 7) as u8,
            information: (result >> 8) as u8,
            log_page: (result >> 16) as u8,
        }
    }
}

impl fmt::Display for AsyncEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match (self.kind, self.information) {
            (0, 0) => "a doorbell that does not exist was rung",
            (0, 1) => "a doorbell was rung with a value that makes no sense",
            (0, 2) => "a diagnostic failure",
            (0, 3) => "a persistent internal error",
            (0, 4) => "a transient internal error",
            (0, _) => "an error",
            (1, 0) => "its reliability is impaired",
            (1, 1) => "its temperature is too high or too low",
            (1, 2) => "it runs out of spare blocks",
            (1, _) => "its health has changed",
            (2, 0) => "its namespaces have changed",
            (2, 1) => "new firmware starts to be activated",
            (2, _) => "a notice",
            _ => "an event of another kind",
        };
        write!(f, "{text} (type {}, information {:#04x})", self.kind, self.information)
    }
}
