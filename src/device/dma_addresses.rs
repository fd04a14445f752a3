//! The addresses of an address space, from which all of its devices allocate.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::iova::{Iova, IovaAllocator};
use crate::transport::AddressSpaceId;

/// The free addresses of an address space.
#[derive(Debug)]
pub(super) struct Addresses {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: IovaAllocator,
    /// All addresses, free or taken.
    ranges: Vec<RangeInclusive<u64>>,
}

/// The address spaces of this process that several devices may share.
static SHARED: Mutex<BTreeMap<AddressSpaceId, Weak<Addresses>>> = Mutex::new(BTreeMap::new());

impl Addresses {
    /// The addresses of the address space `id`, which now consists of `ranges`. Without an `id` the space is
    /// not shared.
    pub(super) fn of(id: Option<AddressSpaceId>, ranges: &[RangeInclusive<u64>]) -> Arc<Self> {
        let Some(id) = id else { return Arc::new(Self::new(ranges)) };
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(addresses) = shared.get(&id).and_then(Weak::upgrade) {
            addresses.state().change_ranges(ranges);
            return addresses;
        }
        shared.retain(|_, addresses| addresses.strong_count() > 0);
        let addresses = Arc::new(Self::new(ranges));
        shared.insert(id, Arc::downgrade(&addresses));
        addresses
    }

    fn new(ranges: &[RangeInclusive<u64>]) -> Self {
        let state = State { free: IovaAllocator::new(ranges), ranges: ranges.to_vec() };
        Self { state: Mutex::new(state) }
    }

    /// See [`IovaAllocator::allocate`].
    #[inline]
    pub(super) fn allocate(&self, size: u64, alignment: u64, limit: u64) -> Option<Iova> {
        self.state().free.allocate(size, alignment, limit).map(Iova)
    }

    /// See [`IovaAllocator::allocate_at`].
    #[inline]
    pub(super) fn allocate_at(&self, start: Iova, size: u64) -> bool {
        self.state().free.allocate_at(start.0, size)
    }

    #[inline]
    pub(super) fn free(&self, start: Iova, size: u64) {
        self.state().free.free(start.0, size);
    }

    /// All addresses of the space, free or taken, in order.
    pub(super) fn ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.state().ranges.clone()
    }

    /// Whether the space has these addresses, free or taken. `size` is not 0.
    pub(super) fn contain(&self, start: u64, size: u64) -> bool {
        let end = start.checked_add(size - 1);
        let within =
            |range: &RangeInclusive<u64>, end| *range.start() <= start && end <= *range.end();
        end.is_some_and(|end| self.state().ranges.iter().any(|range| within(range, end)))
    }

    /// The taken ranges, in order. Adjacent ones are merged.
    pub(super) fn taken(&self) -> Vec<RangeInclusive<u64>> {
        let State { free, ranges } = &mut *self.state();
        free.taken(ranges)
    }

    pub(super) fn free_range_count(&self) -> usize {
        self.state().free.ranges().count()
    }

    #[inline]
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A new device may narrow the ranges, and one that leaves may widen them. What is taken remains in range:
    /// the kernel does not add a device that cannot reach it.
    fn change_ranges(&mut self, ranges: &[RangeInclusive<u64>]) {
        if self.ranges == ranges {
            return;
        }
        let taken = self.free.taken(&self.ranges);
        self.free = IovaAllocator::new(ranges);
        self.ranges = ranges.to_vec();
        for range in taken {
            self.free.exclude(*range.start(), *range.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_one_space_take_from_one_stock() {
        let id = AddressSpaceId::unique();
        let ranges = [0x1000..=0x4fff];
        let (one, other) = (Addresses::of(Some(id), &ranges), Addresses::of(Some(id), &ranges));
        let taken = [&one, &other, &one].map(|stock| stock.allocate(0x1000, 0x1000, u64::MAX));
        assert_eq!(taken, [0x1000, 0x2000, 0x3000].map(|start| Some(Iova(start))));
        assert!(!other.allocate_at(Iova(0x3000), 0x1000));
        other.free(Iova(0x1000), 0x1000);
        assert_eq!(one.taken(), [0x2000..=0x3fff]);
        for apart in [None, Some(AddressSpaceId::unique())] {
            assert_eq!(Addresses::of(apart, &ranges).taken(), []);
        }
        assert_eq!(Addresses::of(Some(id), &ranges).taken(), [0x2000..=0x3fff], "still that one");
        assert!(one.contain(0x4000, 0x1000) && one.contain(0x2000, 0x1000), "free or taken");
        assert!(!one.contain(0x4000, 0x1001) && !one.contain(u64::MAX, 2));
        drop((one, other));
        assert_eq!(Addresses::of(Some(id), &ranges).taken(), [], "all have left");
    }

    #[test]
    fn ranges_that_change_keep_what_is_taken() {
        let id = Some(AddressSpaceId::unique());
        let wide = Addresses::of(id, &[0x1000..=0xffff]);
        assert!(wide.allocate_at(Iova(0x2000), 0x2000));
        let narrow = Addresses::of(id, &[0x1000..=0x2fff, 0x3000..=0x4fff]);
        assert_eq!(narrow.taken(), [0x2000..=0x3fff]);
        let more = [0x1000, 0x4000].map(Iova).map(Some);
        assert_eq!([(); 2].map(|()| wide.allocate(0x1000, 1, u64::MAX)), more);
        assert_eq!(
            wide.allocate(0x1000, 1, u64::MAX),
            None,
            "no device is given what one cannot reach"
        );
        let wide_again = Addresses::of(id, &[0..=0xffff]);
        assert_eq!(wide_again.taken(), [0x1000..=0x4fff]);
        assert_eq!(wide.allocate(0x1000, 0x1000, u64::MAX), Some(Iova(0x5000)));
    }
}
