//! What an NVMe controller can be made to do wrong, for tests of drivers.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::command::Status;
use super::{BAR, DOORBELLS, FATAL, Namespace, Nvme};
use crate::emulated::{Bus, Model};
use crate::error::Result;

/// What goes wrong when the controller takes a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The controller sets CSTS.CFS (NVMe 1.4 §3.1.6) and takes no command until it is reset, this one
    /// included.
    FatalStatus,
    /// The command is carried out, and its completion is never posted.
    LostCompletion,
    /// The command's completion is posted after that of a later command, or when there is no other
    /// left to take.
    LateCompletion,
    /// Before the command's completion there is one of a command that was never submitted: its identifier
    /// is inverted.
    SpuriousCompletion,
    /// The command's completion is posted twice, one after the other.
    DuplicateCompletion,
    /// Somebody resets the function (PCIe 5.0 §6.6.2): registers, queues and configuration space are as
    /// after power on, this command and those that wait are lost, what was written stays.
    Reset,
    /// As [`Reset`](Self::Reset), but what was written and not flushed is lost: see [`Power`](super::Power).
    PowerLoss,
    /// The controller is pulled, with what [`PowerLoss`](Self::PowerLoss) loses: registers and
    /// configuration space read all ones, and nothing happens any more, until
    /// [`Faults::plug_in`].
    Removal,
}

impl Fault {
    /// Each of them.
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

/// Faults that strike an [`Nvme`] at commands that are known beforehand: with a driver that always
/// submits the same, all is repeatable.
///
/// Commands count from zero in the order in which the controller takes them from its queues, those of
/// the admin queue among them, so that a driver's recovery is struck as well. Clones are the same plan.
///
/// ```
/// use vfio_remap::emulated::{Emulated, Fault, Faults, Namespace, Nvme};
///
/// let faults = Faults::seeded(7, &Fault::ALL, 100, 10..=200);
/// let nvme = Nvme::new(vec![Namespace::memory(1 << 20, 512)?]).with_faults(&faults);
/// let device = Emulated::new(nvme)?;
/// // No driver, no commands, no faults.
/// assert_eq!((faults.struck().len(), faults.left()), (0, 100));
/// # drop(device);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    plan: BTreeMap<u64, Fault>,
    struck: Vec<(u64, Fault)>,
    /// How many commands the controller has taken.
    taken: u64,
    plug_in: bool,
}

impl Faults {
    /// Faults, each at the command of that number.
    pub fn new(plan: impl IntoIterator<Item = (u64, Fault)>) -> Self {
        let state = State { plan: plan.into_iter().collect(), ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// `count` faults of these kinds, as many commands `apart` as the generator says; the same ones for
    /// the same arguments, always. None where there are no kinds.
    pub fn seeded(seed: u64, kinds: &[Fault], count: usize, apart: RangeInclusive<u64>) -> Self {
        let mut state = seed;
        let (low, high) = (*apart.start(), *apart.end());
        let span = high.saturating_sub(low).saturating_add(1);
        let mut command = 0u64;
        let plan = (0..count).map_while(|_| {
            command = command.saturating_add((low + next(&mut state) % span).max(1));
            let kind = next(&mut state).checked_rem(kinds.len() as u64)?;
            Some((command, *kinds.get(kind as usize)?))
        });
        Self::new(plan)
    }

    /// The faults that have struck, with the numbers of their commands.
    pub fn struck(&self) -> Vec<(u64, Fault)> {
        self.state().struck.clone()
    }

    /// How many have not struck yet.
    pub fn left(&self) -> usize {
        self.state().plan.len()
    }

    /// Puts a controller that was pulled back in, as after power on, before it next answers. Nothing
    /// where it is in place.
    pub fn plug_in(&self) {
        self.state().plug_in = true;
    }

    /// Counts a command; what is to go wrong with it.
    fn strike(&self) -> Option<Fault> {
        let mut state = self.state();
        let command = state.taken;
        state.taken += 1;
        let fault = state.plan.remove(&command)?;
        state.struck.push((command, fault));
        Some(fault)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A completion that is to be posted, to the completion queue `to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) to: u16,
    pub(super) result: u32,
    pub(super) queue: u16,
    pub(super) id: u16,
    pub(super) status: Status,
}

/// What becomes of the completion of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Posted,
    Lost,
    Late,
    /// Posted, after one that is of no command.
    AfterSpurious,
    Twice,
    /// There is none, since the controller has stopped.
    Stopped,
}

impl Nvme {
    /// Lets faults strike this controller.
    #[must_use]
    pub fn with_faults(mut self, faults: &Faults) -> Self {
        self.faults = Some(faults.clone());
        self
    }

    /// Counts a command that was taken, and has the fault strike that is due.
    pub(super) fn strike(&mut self, bus: &Bus) -> Fate {
        let Some(faults) = &self.faults else { return Fate::Posted };
        match faults.strike() {
            None => return Fate::Posted,
            Some(Fault::LostCompletion) => return Fate::Lost,
            Some(Fault::LateCompletion) => return Fate::Late,
            Some(Fault::SpuriousCompletion) => return Fate::AfterSpurious,
            Some(Fault::DuplicateCompletion) => return Fate::Twice,
            Some(Fault::FatalStatus) => self.status |= FATAL,
            Some(Fault::Reset) => self.reset(bus),
            Some(Fault::PowerLoss) => self.lose_power(bus),
            Some(Fault::Removal) => self.pull(bus),
        }
        Fate::Stopped
    }

    pub(super) fn lose_power(&mut self, bus: &Bus) {
        self.namespaces.iter_mut().for_each(Namespace::lose_power);
        self.reset(bus);
    }

    fn pull(&mut self, bus: &Bus) {
        self.lose_power(bus);
        self.pulled = true;
        if let Some(memory) = bus.memory(BAR)
            && let Err(error) = memory.write(DOORBELLS, &[0xff; 0x1000])
        {
            log::error!("nvme: {error}");
        }
        if let Some(faults) = &self.faults {
            faults.state().plug_in = false;
        }
    }

    /// Whether it is pulled still.
    pub(super) fn is_pulled(&mut self, bus: &Bus) -> bool {
        if self.pulled && self.faults.as_ref().is_some_and(|faults| faults.state().plug_in) {
            self.pulled = false;
            self.reset(bus);
        }
        self.pulled
    }

    /// Posts the completions that are late, as far as their queues have room. Whether any was.
    pub(super) fn catch_up(&mut self, bus: &Bus) -> Result<bool> {
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
            faults.state().plan.clone()
        };
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
        // As they were when this test was written, and a kind was added last: seeds are told in bug reports.
        let first: Vec<_> = plan(1).into_iter().take(3).collect();
        let expected =
            [(5, Fault::Removal), (9, Fault::SpuriousCompletion), (17, Fault::FatalStatus)];
        assert_eq!(first, expected);
        let commands: Vec<_> = plan(3).into_keys().collect();
        assert!(commands.windows(2).all(|pair| (3..=9).contains(&(pair[1] - pair[0]))));
        let kinds: std::collections::HashSet<_> = plan(4).into_values().collect();
        assert_eq!(kinds.len(), Fault::ALL.len());
        assert_eq!(Faults::seeded(1, &[], 50, 3..=9).left(), 0);
        assert!(Faults::seeded(1, &Fault::ALL, 5, 0..=u64::MAX).left() > 0, "far, and no overflow");
    }
}
