//! How long a server may take.

use std::time::Duration;

use super::protocol::channel::within_reason;
use super::protocol::wire::command;

/// How long a vfio-user server may take to answer, by what it is asked for.
///
/// A server that ends outstanding work before it answers takes its time for `DMA_MAP`, `DMA_UNMAP` and
/// `DEVICE_RESET`: SPDK was seen to take 8 seconds. The protocol sets no limit.
///
/// ```
/// use std::time::Duration;
/// use vfio_remap::transport::TimeLimits;
///
/// let mut limits = TimeLimits::default();
/// limits.reset = Duration::from_secs(300);
/// assert_eq!(TimeLimits::from(Duration::from_secs(1)).reset, Duration::from_secs(1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TimeLimits {
    /// For everything but the following.
    pub answer: Duration,
    /// For a mapping for DMA.
    pub map: Duration,
    /// For the end of a mapping for DMA.
    pub unmap: Duration,
    /// For a reset.
    pub reset: Duration,
}

impl Default for TimeLimits {
    /// Five seconds; a minute to map, to unmap and to reset.
    fn default() -> Self {
        let long = Duration::from_secs(60);
        Self { answer: Duration::from_secs(5), map: long, unmap: long, reset: long }
    }
}

impl From<Duration> for TimeLimits {
    /// The same for all.
    fn from(time: Duration) -> Self {
        Self { answer: time, map: time, unmap: time, reset: time }
    }
}

impl TimeLimits {
    /// As sockets and clocks can hold them.
    pub(super) fn within_reason(self) -> Self {
        Self {
            answer: within_reason(self.answer),
            map: within_reason(self.map),
            unmap: within_reason(self.unmap),
            reset: within_reason(self.reset),
        }
    }

    /// For the answer to a command.
    pub(super) fn of(&self, command: u16) -> Duration {
        match command {
            command::DMA_MAP => self.map,
            command::DMA_UNMAP => self.unmap,
            command::DEVICE_RESET => self.reset,
            _ => self.answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_its_limit() {
        let [answer, map, unmap, reset] = [1, 2, 3, 4].map(Duration::from_secs);
        let limits = TimeLimits { answer, map, unmap, reset };
        let of =
            [command::REGION_READ, command::DMA_MAP, command::DMA_UNMAP, command::DEVICE_RESET]
                .map(|command| limits.of(command));
        assert_eq!(of, [answer, map, unmap, reset]);
        let none = TimeLimits::from(Duration::ZERO).within_reason();
        assert!(none.answer > Duration::ZERO && none.reset > Duration::ZERO);
    }
}
