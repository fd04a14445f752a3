//! Plans of faults: which fault is injected at which event of a device.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Faults of the type `F` that a [`Model`](super::Model) injects at events with given numbers. If the driver always
/// causes the same events, the faults are reproducible.
///
/// The model says what its events are; they count from zero. Clones share one plan.
///
/// ```
/// use vfio_remap::emulated::FaultPlan;
///
/// #[derive(Clone, Copy, Debug, PartialEq)]
/// enum Fault {
///     LostInterrupt,
/// }
///
/// let plan = FaultPlan::new([(1, Fault::LostInterrupt)]);
/// // At each of its events, the model asks for a fault.
/// assert_eq!([plan.inject(), plan.inject(), plan.inject()], [None, Some(Fault::LostInterrupt), None]);
/// assert_eq!((plan.injected(), plan.remaining()), (vec![(1, Fault::LostInterrupt)], 0));
/// ```
#[derive(Debug)]
pub struct FaultPlan<F>(Arc<Mutex<State<F>>>);

#[derive(Debug)]
struct State<F> {
    plan: BTreeMap<u64, F>,
    injected: Vec<(u64, F)>,
    /// How many events there have been.
    count: u64,
    plug_in: bool,
}

impl<F> Clone for FaultPlan<F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<F: Copy> Default for FaultPlan<F> {
    fn default() -> Self {
        Self::new([])
    }
}

impl<F: Copy> FaultPlan<F> {
    /// Faults, each at the event of that number.
    pub fn new(plan: impl IntoIterator<Item = (u64, F)>) -> Self {
        let plan = plan.into_iter().collect();
        let state = State { plan, injected: Vec::new(), count: 0, plug_in: false };
        Self(Arc::new(Mutex::new(state)))
    }

    /// `count` pseudorandom faults of these kinds, with pseudorandom distances in `interval` events. The same
    /// arguments always give the same faults. No faults if there are no kinds.
    pub fn seeded(seed: u64, kinds: &[F], count: usize, interval: RangeInclusive<u64>) -> Self {
        let mut state = seed;
        let (low, high) = (*interval.start(), *interval.end());
        let span = high.saturating_sub(low).saturating_add(1);
        let mut event = 0u64;
        let plan = (0..count).map_while(|_| {
            event = event.saturating_add((low + next(&mut state) % span).max(1));
            let kind = next(&mut state).checked_rem(kinds.len() as u64)?;
            Some((event, *kinds.get(kind as usize)?))
        });
        Self::new(plan)
    }

    /// The faults that were injected, with the numbers of their events.
    pub fn injected(&self) -> Vec<(u64, F)> {
        self.state().injected.clone()
    }

    /// How many faults have not been injected yet.
    pub fn remaining(&self) -> usize {
        self.state().plan.len()
    }

    /// Counts an event and returns its fault, if any. For models.
    pub fn inject(&self) -> Option<F> {
        let mut state = self.state();
        let event = state.count;
        state.count += 1;
        let fault = state.plan.remove(&event)?;
        state.injected.push((event, fault));
        Some(fault)
    }

    /// Plugs a removed device in. It is as after power on before the next access. No effect if it is not removed.
    pub fn plug_in(&self) {
        self.state().plug_in = true;
    }

    /// Notes that the device is removed: an earlier [`plug_in`](Self::plug_in) does not count. For models.
    pub fn remove(&self) {
        self.state().plug_in = false;
    }

    /// Whether [`plug_in`](Self::plug_in) was called since the removal. For models.
    pub fn is_plugged_in(&self) -> bool {
        self.state().plug_in
    }

    fn state(&self) -> MutexGuard<'_, State<F>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl<F: Copy> FaultPlan<F> {
    /// The faults that remain.
    pub(super) fn plan(&self) -> BTreeMap<u64, F> {
        self.state().plan.clone()
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
