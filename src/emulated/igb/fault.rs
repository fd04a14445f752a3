//! What a network card can be made to do wrong, for tests of drivers.

use std::time::{Duration, Instant};

use super::packet::Headers;
use super::registers::VET;
use super::ring::{PAGE, RECEIVE, TRANSMIT};
use super::{BAR, Igb};
use crate::emulated::plan::FaultPlan;
use crate::emulated::{Bus, Model};

/// How long the link is down.
const FLAP: Duration = Duration::from_millis(10);

/// A fault at a packet that the card handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The card does not send its next interrupt. Causes are cleared and masked as if it had sent it.
    LostInterrupt,
    /// The transmit queue takes no descriptor of this packet, and none after it, until the driver disables the
    /// queue, writes its head, or resets the card. At a received packet, this happens to the next packet that
    /// is sent.
    StuckRing,
    /// A bit of a TCP or UDP payload flips, so that the checksum is wrong. Any other frame has a
    /// [`CrcError`](Self::CrcError).
    CorruptPayload,
    /// The check sequence of the frame is wrong. The receiver drops the frame and counts it in CRCERRS.
    CrcError,
    /// The link is down for ten milliseconds.
    LinkFlap,
    /// A function level reset (PCIe 5.0 §6.6.2): registers, queues and configuration space are as after power
    /// on. This packet and all that wait are lost.
    Reset,
    /// The card is removed: registers and configuration space read all ones, and nothing happens until
    /// [`Faults::plug_in`].
    Removal,
}

impl Fault {
    /// Each of them.
    pub const ALL: [Self; 7] = [
        Self::LostInterrupt,
        Self::StuckRing,
        Self::CorruptPayload,
        Self::CrcError,
        Self::LinkFlap,
        Self::Reset,
        Self::Removal,
    ];
}

/// Faults that are injected into an [`Igb`] at given packets.
///
/// Packets count from zero in the order in which the card handles them: packets from transmit queues, each of
/// one or more frames, and received frames that have passed the filters. Clones share one plan.
///
/// ```
/// use vfio_remap::emulated::Emulated;
/// use vfio_remap::emulated::igb::{Fault, Faults, Igb};
///
/// let faults = Faults::seeded(7, &Fault::ALL, 100, 10..=200);
/// let device = Emulated::new(Igb::new([2, 0, 0, 0, 0, 1]).with_faults(&faults))?;
/// // No driver, no packets, no faults.
/// assert_eq!((faults.injected().len(), faults.remaining()), (0, 100));
/// # drop(device);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub type Faults = FaultPlan<Fault>;

/// How a packet fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fate {
    #[default]
    Whole,
    /// A bit of its payload flips.
    Corrupt,
    /// It is lost on the wire.
    Lost,
    /// Its ring is stuck.
    Stuck,
    /// It is gone, because the card has stopped.
    Stopped,
}

/// The plan, and the effects of faults that last.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    plan: Option<Faults>,
    removed: bool,
    /// The ring of the next packet that is sent is stuck.
    stick: bool,
    down_until: Option<Instant>,
}

impl Trouble {
    /// Whether the link is down for a while.
    pub(super) fn is_down(&mut self) -> bool {
        let down = self.down_until.is_some_and(|until| Instant::now() < until);
        if !down {
            self.down_until = None;
        }
        down
    }
}

impl Igb {
    /// Injects faults into this card.
    #[must_use]
    pub fn with_faults(mut self, faults: &Faults) -> Self {
        self.trouble.plan = Some(faults.clone());
        self
    }

    /// Counts a packet and injects its fault, if any.
    pub(super) fn inject(&mut self, bus: &Bus, is_sent: bool) -> Fate {
        let Some(plan) = &self.trouble.plan else { return Fate::Whole };
        let fault = plan.inject();
        if is_sent && std::mem::take(&mut self.trouble.stick) {
            return Fate::Stuck;
        }
        match fault {
            None => Fate::Whole,
            Some(Fault::LostInterrupt) => {
                self.interrupts.lost += 1;
                Fate::Whole
            }
            Some(Fault::StuckRing) if is_sent => Fate::Stuck,
            Some(Fault::StuckRing) => {
                self.trouble.stick = true;
                Fate::Whole
            }
            Some(Fault::CorruptPayload) => Fate::Corrupt,
            Some(Fault::CrcError) => Fate::Lost,
            Some(Fault::LinkFlap) => {
                self.trouble.down_until = Instant::now().checked_add(FLAP);
                self.look_at_link(bus);
                Fate::Whole
            }
            Some(Fault::Reset) => {
                self.reset(bus);
                Fate::Stopped
            }
            Some(Fault::Removal) => {
                self.remove(bus);
                Fate::Stopped
            }
        }
    }

    fn remove(&mut self, bus: &Bus) {
        self.reset(bus);
        self.trouble.removed = true;
        if let Some(memory) = bus.memory(BAR) {
            for page in [RECEIVE, TRANSMIT] {
                if let Err(error) = memory.write(page.into(), &[0xff; PAGE as usize]) {
                    log::error!("igb: {error}");
                }
            }
        }
        if let Some(plan) = &self.trouble.plan {
            plan.remove();
        }
    }

    /// Whether the card is removed.
    pub(super) fn is_removed(&mut self, bus: &Bus) -> bool {
        let plan = self.trouble.plan.as_ref();
        if self.trouble.removed && plan.is_some_and(|plan| plan.is_plugged_in()) {
            self.trouble.removed = false;
            self.reset(bus);
        }
        self.trouble.removed
    }

    /// Flips a bit of a frame's payload. Returns whether a checksum covers it.
    pub(super) fn corrupt(&self, frame: &mut [u8]) -> bool {
        let headers = Headers::parse(frame, self.registers.get(VET) as u16);
        if headers.check_transport(frame) != Some(true) {
            return false;
        }
        // The last byte is payload, or the end of a header without one.
        let Some(last) = headers.end.checked_sub(1).and_then(|last| frame.get_mut(last)) else {
            return false;
        };
        *last ^= 0x10;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_faults() {
        let plan = |seed| Faults::seeded(seed, &Fault::ALL, 50, 3..=9).plan();
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        // These values must not change: bug reports name seeds.
        let first: Vec<_> = plan(1).into_iter().take(3).collect();
        assert_eq!(
            first,
            [(5, Fault::LostInterrupt), (9, Fault::LostInterrupt), (17, Fault::CorruptPayload)]
        );
        assert_eq!(plan(4).into_values().collect::<HashSet<_>>().len(), Fault::ALL.len());
    }
}
