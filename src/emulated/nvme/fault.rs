//! Fault injection for the NVMe controller, for tests of drivers.

use super::command::Status;
use super::{BAR, DOORBELLS, FATAL, Namespace, Nvme};
use crate::emulated::plan::FaultPlan;
use crate::emulated::{Bus, Model};
use crate::error::Result;

/// A fault that happens when the controller takes a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The controller sets CSTS.CFS (NVMe 1.4 §3.1.6). It does not carry out this command, and takes no other
    /// until it is reset.
    FatalStatus,
    /// The command is carried out, but its completion is never posted.
    LostCompletion,
    /// The command's completion is posted after that of a later command, or when no command is left.
    LateCompletion,
    /// The command's completion follows one for a command that was never submitted: its identifier is inverted.
    SpuriousCompletion,
    /// The command's completion is posted twice, one after the other.
    DuplicateCompletion,
    /// A function level reset (PCIe 5.0 §6.6.2): registers, queues and configuration space are as after power
    /// on. This command and all pending ones are lost. Written data stays.
    Reset,
    /// As [`Reset`](Self::Reset), but data that was not flushed is lost: see [`Power`](super::Power).
    PowerLoss,
    /// The controller is removed, with the losses of [`PowerLoss`](Self::PowerLoss). Registers and
    /// configuration space read all ones, and commands do nothing, until [`Faults::plug_in`].
    Removal,
}

impl Fault {
    /// All faults.
    pub const ALL: [Self; 8] = [
        Self::FatalStatus,
        Self::LostCompletion,
        Self::LateCompletion,
        Self::SpuriousCompletion,
        Self::DuplicateCompletion,
        Self::Reset,
        Self::PowerLoss,
        Self::Removal,
    ];
}

/// Faults that are injected into an [`Nvme`] at commands with given numbers. If the driver always submits the
/// same commands, the faults are reproducible.
///
/// Commands are numbered from zero, in the order in which the controller takes them from all queues. Admin
/// commands count, too, so faults also happen during a driver's recovery. Clones share one plan.
///
/// ```
/// use vfio_remap::emulated::nvme::{Fault, Faults, Namespace};
/// use vfio_remap::emulated::{Emulated, Nvme};
///
/// let faults = Faults::seeded(7, &Fault::ALL, 100, 10..=200);
/// let nvme = Nvme::new(vec![Namespace::memory(1 << 20, 512)?]).with_faults(&faults);
/// let device = Emulated::new(nvme)?;
/// // No driver, no commands, no faults.
/// assert_eq!((faults.injected().len(), faults.remaining()), (0, 100));
/// # drop(device);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub type Faults = FaultPlan<Fault>;

/// A completion for the completion queue `to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) to: u16,
    pub(super) result: u32,
    pub(super) queue: u16,
    pub(super) id: u16,
    pub(super) status: Status,
}

/// How the completion of a command is posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Posted,
    Lost,
    Late,
    /// Posted after a completion for no command.
    AfterSpurious,
    Twice,
    /// Not posted, because the controller has stopped.
    Stopped,
}

impl Nvme {
    /// Injects faults into this controller.
    #[must_use]
    pub fn with_faults(mut self, faults: &Faults) -> Self {
        self.faults = Some(faults.clone());
        self
    }

    /// Counts a taken command and injects its fault, if any.
    pub(super) fn inject(&mut self, bus: &Bus) -> Delivery {
        let Some(faults) = &self.faults else { return Delivery::Posted };
        match faults.inject() {
            None => return Delivery::Posted,
            Some(Fault::LostCompletion) => return Delivery::Lost,
            Some(Fault::LateCompletion) => return Delivery::Late,
            Some(Fault::SpuriousCompletion) => return Delivery::AfterSpurious,
            Some(Fault::DuplicateCompletion) => return Delivery::Twice,
            Some(Fault::FatalStatus) => self.status |= FATAL,
            Some(Fault::Reset) => self.reset(bus),
            Some(Fault::PowerLoss) => self.lose_power(bus),
            Some(Fault::Removal) => self.remove(bus),
        }
        Delivery::Stopped
    }

    pub(super) fn lose_power(&mut self, bus: &Bus) {
        self.namespaces.iter_mut().for_each(Namespace::lose_power);
        self.reset(bus);
    }

    fn remove(&mut self, bus: &Bus) {
        self.lose_power(bus);
        self.removed = true;
        if let Some(memory) = bus.memory(BAR)
            && let Err(error) = memory.write(DOORBELLS, &[0xff; 0x1000])
        {
            log::error!("nvme: {error}");
        }
        if let Some(faults) = &self.faults {
            faults.remove();
        }
    }

    /// Whether the controller is removed.
    pub(super) fn is_removed(&mut self, bus: &Bus) -> bool {
        if self.removed && self.faults.as_ref().is_some_and(|faults| faults.is_plugged_in()) {
            self.removed = false;
            self.reset(bus);
        }
        self.removed
    }

    /// Posts late completions, as far as their queues have room. Returns whether there were any.
    pub(super) fn post_late(&mut self, bus: &Bus) -> Result<bool> {
        let late = std::mem::take(&mut self.late);
        let mut any = false;
        for completion in late {
            if self.is_full(completion.to) {
                self.late.push(completion);
            } else {
                self.complete(bus, completion)?;
                any = true;
            }
        }
        Ok(any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_faults() {
        let plan = |seed| {
            let faults = Faults::seeded(seed, &Fault::ALL, 50, 3..=9);
            faults.plan()
        };
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        // These values must not change: bug reports name seeds.
        let first: Vec<_> = plan(1).into_iter().take(3).collect();
        let expected =
            [(5, Fault::Removal), (9, Fault::SpuriousCompletion), (17, Fault::FatalStatus)];
        assert_eq!(first, expected);
        let commands: Vec<_> = plan(3).into_keys().collect();
        assert!(commands.windows(2).all(|pair| (3..=9).contains(&(pair[1] - pair[0]))));
        let kinds: std::collections::HashSet<_> = plan(4).into_values().collect();
        assert_eq!(kinds.len(), Fault::ALL.len());
        assert_eq!(Faults::seeded(1, &[], 50, 3..=9).remaining(), 0);
        assert!(
            Faults::seeded(1, &Fault::ALL, 5, 0..=u64::MAX).remaining() > 0,
            "far, and no overflow"
        );
    }
}
