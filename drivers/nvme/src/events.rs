//! Asynchronous events (NVMe Base 1.4 §5.2.1).

use std::fmt;

/// An event. The controller reports it once, until the log page that it names is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AsyncEvent {
    /// The type: 0 error, 1 health, 2 notice, 6 command set, 7 vendor-specific.
    pub kind: u8,
    /// The event, depending on the type.
    pub information: u8,
    /// The log page with details.
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
            (0, 1) => "a doorbell was rung with an invalid value",
            (0, 2) => "a diagnostic failure",
            (0, 3) => "a persistent internal error",
            (0, 4) => "a transient internal error",
            (0, _) => "an error",
            (1, 0) => "its reliability is impaired",
            (1, 1) => "its temperature is too high or too low",
            (1, 2) => "few spare blocks are left",
            (1, _) => "its health has changed",
            (2, 0) => "its namespaces have changed",
            (2, 1) => "the activation of new firmware has started",
            (2, _) => "a notice",
            _ => "an event of another kind",
        };
        write!(f, "{text} (type {}, information {:#04x})", self.kind, self.information)
    }
}
