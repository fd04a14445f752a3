//! How a card is to be used.

use std::time::Duration;

use vfio_remap::{Error, ErrorKind, Result};

use super::hardware::Frames;
use super::model::Model;

/// The Ethernet header, a VLAN tag, and the checksum of Ethernet.
const HEADER: usize = 14;
const TAG: usize = 4;
const CHECKSUM: usize = 4;

/// How a card is to be used. Made from [`DEFAULT`](Self::DEFAULT):
///
/// ```
/// use vfio_remap_ethernet::Settings;
///
/// const SETTINGS: Settings = Settings::DEFAULT.with_queues(4).with_interrupts(true);
/// assert_eq!((SETTINGS.queues, SETTINGS.mtu), (4, 1500));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// Queues in each direction: one pair for each thread, [`Model::queues`] at most.
    pub queues: u16,
    /// Descriptors of a receive queue: a power of two from 8 to 4,096. All but one can be used at a time.
    pub receive_entries: u16,
    /// Descriptors of a transmit queue, likewise.
    pub transmit_entries: u16,
    /// The longest packet in bytes, without the Ethernet header: 68 to 9,000. It decides on the size of the
    /// buffers.
    pub mtu: usize,
    /// Whether queues can be waited for by interrupts (MSI-X), rather than by naps. A queue interrupts only
    /// while somebody waits for it.
    pub interrupts: bool,
    /// The shortest time between two interrupts of a queue: 8 ms at most, what is longer is taken for that
    /// (82576 datasheet §7.3.4, 82574 datasheet §7.4.4).
    pub moderation: Duration,
    /// How long a queue is polled before its thread sleeps, in [`Receiver::wait`](super::Receiver::wait) and
    /// [`Transmitter::wait`](super::Transmitter::wait).
    pub poll: Duration,
    /// After which the card is reset, if it has sent none of a queue's frames although it has a link: see
    /// [when something goes wrong](crate#when-something-goes-wrong).
    pub timeout: Duration,
}

impl Settings {
    /// One pair of queues of 256 descriptors each, an MTU of 1,500, no interrupts.
    pub const DEFAULT: Self = Self {
        queues: 1,
        receive_entries: 256,
        transmit_entries: 256,
        mtu: 1500,
        interrupts: false,
        moderation: Duration::from_micros(20),
        poll: Duration::from_micros(20),
        timeout: Duration::from_secs(2),
    };

    /// The same settings with this value of [`queues`](Self::queues).
    #[must_use]
    pub const fn with_queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The same settings with this value of [`receive_entries`](Self::receive_entries).
    #[must_use]
    pub const fn with_receive_entries(mut self, receive_entries: u16) -> Self {
        self.receive_entries = receive_entries;
        self
    }

    /// The same settings with this value of [`transmit_entries`](Self::transmit_entries).
    #[must_use]
    pub const fn with_transmit_entries(mut self, transmit_entries: u16) -> Self {
        self.transmit_entries = transmit_entries;
        self
    }

    /// The same settings with this value of [`mtu`](Self::mtu).
    #[must_use]
    pub const fn with_mtu(mut self, mtu: usize) -> Self {
        self.mtu = mtu;
        self
    }

    /// The same settings with this value of [`interrupts`](Self::interrupts).
    #[must_use]
    pub const fn with_interrupts(mut self, interrupts: bool) -> Self {
        self.interrupts = interrupts;
        self
    }

    /// The same settings with this value of [`moderation`](Self::moderation).
    #[must_use]
    pub const fn with_moderation(mut self, moderation: Duration) -> Self {
        self.moderation = moderation;
        self
    }

    /// The same settings with this value of [`poll`](Self::poll).
    #[must_use]
    pub const fn with_poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }

    /// The same settings with this value of [`timeout`](Self::timeout).
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The largest MTU of both cards.
    pub const MOST_MTU: usize = 9000;

    pub(crate) fn check(&self, model: Model, name: &str) -> Result<()> {
        let refuse = |reason: String, remedy: String| {
            Err(Error::new(ErrorKind::OutOfRange, "bring up", name)
                .with_reason(reason)
                .with_advice(remedy))
        };
        if self.queues == 0 || self.queues > model.queues() {
            let there = model.queues();
            return refuse(
                format!("{} queues were asked for, and an {model} has {there}", self.queues),
                format!("ask for 1 to {there} (Settings::queues)"),
            );
        }
        for entries in [self.receive_entries, self.transmit_entries] {
            if !entries.is_power_of_two() || !(8..=4096).contains(&entries) {
                return refuse(
                    format!("a queue cannot have {entries} descriptors"),
                    "ask for a power of two from 8 to 4096 (Settings::receive_entries, \
                     Settings::transmit_entries)"
                        .to_owned(),
                );
            }
        }
        if !(68..=Self::MOST_MTU).contains(&self.mtu) {
            return refuse(
                format!("an MTU of {} is not one of an {model}", self.mtu),
                format!("ask for 68 to {} (Settings::mtu)", Self::MOST_MTU),
            );
        }
        Ok(())
    }

    pub(crate) fn longest_frame(&self) -> usize {
        self.mtu + HEADER + TAG
    }

    pub(crate) fn frames(&self) -> Frames {
        let longest = self.longest_frame();
        // The card writes no checksum, and a buffer has whole KiB.
        let buffer_kib = longest.div_ceil(1024).max(2) as u8;
        Frames { longest: (longest + CHECKSUM) as u32, buffer_kib }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}
