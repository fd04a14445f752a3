//! I/O virtual addresses, and the allocator for them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::ParseIntError;
use std::ops::{Add, RangeInclusive, Sub};
use std::str::FromStr;

/// An I/O virtual address: the address by which a device reaches memory.
///
/// ```
/// use vfio_remap::device::Iova;
///
/// let iova = Iova(0x1000) + 0x20;
/// assert_eq!(format!("{iova} {iova:x} {iova:#010x} {iova:?}"), "0x1020 1020 0x00001020 Iova(0x1020)");
/// assert_eq!((iova - 0x20, iova - Iova(0x1000)), (Iova(0x1000), 0x20));
/// assert_eq!(iova.checked_add(u64::MAX), None);
/// assert_eq!("0x1020".parse(), Ok(iova));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Iova {
    /// This address plus `bytes`; `None` on overflow.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

/// Overflow panics as for integers.
impl Add<u64> for Iova {
    type Output = Self;

    #[inline]
    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// Overflow panics as for integers.
impl Sub<u64> for Iova {
    type Output = Self;

    #[inline]
    fn sub(self, bytes: u64) -> Self {
        Self(self.0 - bytes)
    }
}

/// The distance in bytes. Overflow panics as for integers.
impl Sub for Iova {
    type Output = u64;

    #[inline]
    fn sub(self, other: Self) -> u64 {
        self.0 - other.0
    }
}

/// Hexadecimal digits after `0x` or `0X`, otherwise decimal ones.
impl FromStr for Iova {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => u64::from_str_radix(digits, 16).map(Self),
            None => text.parse().map(Self),
        }
    }
}

impl From<u64> for Iova {
    fn from(address: u64) -> Self {
        Self(address)
    }
}

impl From<Iova> for u64 {
    fn from(iova: Iova) -> Self {
        iova.0
    }
}

impl fmt::LowerHex for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::UpperHex for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::UpperHex::fmt(&self.0, f)
    }
}

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iova({:#x})", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The first address of more than 32 bits.
const HIGH: u64 = 1 << 32;

/// An allocator of address ranges: best fit, aligned or at a fixed address. Freed ranges are merged.
///
/// Addresses of more than 32 bits come first: lower ones are left to devices that have no others.
///
/// Ranges are kept by their first and last address, so that all 2^64 addresses can be free. The range that was
/// freed last is not merged until the next other operation: a driver that maps, unmaps and maps again gets it
/// back without a search.
#[derive(Debug, Default)]
pub(super) struct IovaAllocator {
    /// First address to last.
    free: BTreeMap<u64, u64>,
    /// Free ranges that end below [`HIGH`], by size: (last - first, first).
    low: BTreeSet<(u64, u64)>,
    /// All other free ranges. At most one of them begins below [`HIGH`].
    high: BTreeSet<(u64, u64)>,
    /// First and last address of the range that was freed last, not merged yet.
    recent: Option<(u64, u64)>,
}

impl IovaAllocator {
    /// All of `ranges` is free. Ranges that overlap or are adjacent are merged, empty ones are left out.
    pub(super) fn new(ranges: &[RangeInclusive<u64>]) -> Self {
        let mut ranges: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| *range.start());
        let mut allocator = Self::default();
        let mut pending: Option<(u64, u64)> = None;
        for range in ranges {
            let (first, last) = (*range.start(), *range.end());
            pending = match pending {
                Some((start, end)) if first <= end.saturating_add(1) => {
                    Some((start, end.max(last)))
                }
                done => {
                    done.into_iter().for_each(|(first, last)| allocator.insert(first, last));
                    Some((first, last))
                }
            };
        }
        pending.into_iter().for_each(|(first, last)| allocator.insert(first, last));
        allocator
    }

    /// Takes `size` bytes at a multiple of `alignment`, not at 0, with no byte above `limit`. Addresses from
    /// [`HIGH`] upwards come first. The lowest addresses of the smallest range that is large enough are taken;
    /// the range that was freed last comes first if it fits exactly. `size` is not 0, `alignment` is a power of
    /// two.
    #[inline]
    pub(super) fn allocate(&mut self, size: u64, alignment: u64, limit: u64) -> Option<u64> {
        let extent = size.checked_sub(1)?;
        if let Some((first, last)) = self.recent
            && last - first == extent
            && first != 0
            && first & (alignment - 1) == 0
            && last <= limit
            && (first >= HIGH || limit < HIGH)
        {
            self.recent = None;
            return Some(first);
        }
        self.search(extent, alignment, limit)
    }

    /// [`allocate`](Self::allocate) from merged ranges. `extent` is the size minus one.
    fn search(&mut self, extent: u64, alignment: u64, limit: u64) -> Option<u64> {
        self.settle();
        let fit = |first: u64, last: u64, lowest: u64| {
            let start = first.max(lowest).checked_next_multiple_of(alignment)?;
            let end = start.checked_add(extent)?;
            (end <= last.min(limit)).then_some((first, last, start))
        };
        let smallest = |ranges: &BTreeSet<(u64, u64)>, lowest: u64| {
            ranges.range((extent, 0)..).find_map(|&(free, first)| fit(first, first + free, lowest))
        };
        let high = || if limit < HIGH { None } else { smallest(&self.high, HIGH) };
        let low = || smallest(&self.low, 1);
        let across = || {
            let (&first, &last) = self.free.range(..HIGH).next_back()?;
            if last < HIGH { None } else { fit(first, last, 1) }
        };
        let (first, last, start) = high().or_else(low).or_else(across)?;
        self.take(first, last, start, start + extent);
        Some(start)
    }

    /// Takes exactly `[start, start + size)`; false if a byte of it is not free.
    #[inline]
    pub(super) fn allocate_at(&mut self, start: u64, size: u64) -> bool {
        let Some(end) = size.checked_sub(1).and_then(|extent| start.checked_add(extent)) else {
            return false;
        };
        if self.recent == Some((start, end)) {
            self.recent = None;
            return true;
        }
        self.split(start, end)
    }

    /// [`allocate_at`](Self::allocate_at) from merged ranges.
    fn split(&mut self, start: u64, end: u64) -> bool {
        self.settle();
        match self.free.range(..=start).next_back() {
            Some((&first, &last)) if end <= last => {
                self.take(first, last, start, end);
                true
            }
            _ => false,
        }
    }

    /// Frees a range that was taken.
    #[inline]
    pub(super) fn free(&mut self, start: u64, size: u64) {
        let Some(extent) = size.checked_sub(1) else { return };
        if self.recent.is_some() {
            self.settle();
        }
        self.recent = Some((start, start.saturating_add(extent)));
    }

    /// Merges the range that was freed last with its neighbours.
    fn settle(&mut self) {
        let Some((mut first, mut last)) = self.recent.take() else { return };
        if let Some((&before, &end)) = self.free.range(..first).next_back()
            && end.checked_add(1) == Some(first)
        {
            self.remove(before, end);
            first = before;
        }
        if let Some(next) = last.checked_add(1)
            && let Some(&end) = self.free.get(&next)
        {
            self.remove(next, end);
            last = end;
        }
        self.insert(first, last);
    }

    /// Takes the free parts of `[start, end]`.
    pub(super) fn exclude(&mut self, start: u64, end: u64) {
        self.settle();
        while let Some((&first, &last)) = self.free.range(..=end).next_back()
            && last >= start
        {
            self.take(first, last, first.max(start), last.min(end));
        }
    }

    /// The free ranges, in order.
    pub(super) fn ranges(&mut self) -> impl Iterator<Item = RangeInclusive<u64>> + '_ {
        self.settle();
        self.free.iter().map(|(&first, &last)| first..=last)
    }

    /// The taken parts of `ranges`, in order; adjacent ones are merged. `ranges` are those passed to
    /// [`new`](Self::new).
    pub(super) fn taken(&mut self, ranges: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
        self.settle();
        let mut taken = Vec::new();
        for (first, last) in Self::new(ranges).free {
            // The first address that was not looked at; `None` past the last address of all.
            let mut from = Some(first);
            for (&free, &end) in self.free.range(first..=last) {
                taken.extend(from.filter(|&from| from < free).map(|from| from..=free - 1));
                from = end.checked_add(1);
            }
            taken.extend(from.filter(|&from| from <= last).map(|from| from..=last));
        }
        taken
    }

    fn take(&mut self, first: u64, last: u64, start: u64, end: u64) {
        self.remove(first, last);
        if first < start {
            self.insert(first, start - 1);
        }
        if end < last {
            self.insert(end + 1, last);
        }
    }

    fn insert(&mut self, first: u64, last: u64) {
        self.free.insert(first, last);
        self.by_size(last).insert((last - first, first));
    }

    fn remove(&mut self, first: u64, last: u64) {
        self.free.remove(&first);
        self.by_size(last).remove(&(last - first, first));
    }

    /// The set by size that has the ranges with this last address.
    fn by_size(&mut self, last: u64) -> &mut BTreeSet<(u64, u64)> {
        if last < HIGH { &mut self.low } else { &mut self.high }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_written_in_both_cases() {
        for text in ["0xfee00000", "0XFEE00000", "4276092928"] {
            assert_eq!(text.parse(), Ok(Iova::from(0xfee0_0000)), "{text}");
        }
        for text in ["", "0x", "fee00000", "-1", "0x10000000000000000"] {
            assert!(text.parse::<Iova>().is_err(), "{text}");
        }
        let iova = Iova(0xfee0_0000);
        assert_eq!(format!("{iova:X} {iova:?}"), "FEE00000 Iova(0xfee00000)");
    }

    #[test]
    fn the_smallest_range_that_fits_is_taken_and_its_neighbours_joined_again() {
        let made_of = [0x10_0000..=0x10_ffff, 0x12_0000..=0x12_1fff, 0x12_2000..=0x12_2fff];
        let mut iova = IovaAllocator::new(&made_of);
        assert_eq!(iova.ranges().count(), 2, "touching ranges are one");
        assert_eq!(iova.allocate(0x1000, 0x1000, u64::MAX), Some(0x12_0000), "best fit");
        let next = iova.allocate(0x4000, 0x8000, u64::MAX);
        assert_eq!(next, Some(0x10_0000), "the other is too small");
        assert_eq!(iova.allocate(0x4000, 0x8000, u64::MAX), Some(0x10_8000), "aligned");
        assert!(!iova.allocate_at(0x10_3000, 0x2000), "half of it is taken");
        assert!(iova.allocate_at(0x10_4000, 0x1000));
        let taken = [0x10_0000..=0x10_4fff, 0x10_8000..=0x10_bfff, 0x12_0000..=0x12_0fff];
        assert_eq!(iova.taken(&made_of), taken);
        for (start, size) in
            [(0x10_4000, 0x1000), (0x10_0000, 0x4000), (0x10_8000, 0x4000), (0x12_0000, 0x1000)]
        {
            iova.free(start, size);
        }
        let all = [0x10_0000..=0x10_ffff, 0x12_0000..=0x12_2fff];
        assert_eq!(iova.ranges().collect::<Vec<_>>(), all);
    }

    #[test]
    fn the_range_freed_last_comes_back_first_and_is_never_lost() {
        let mut iova = IovaAllocator::new(&[0x1000..=0x1_0fff]);
        let (first, second) =
            (iova.allocate(0x1000, 1, u64::MAX), iova.allocate(0x1000, 1, u64::MAX));
        assert_eq!((first, second), (Some(0x1000), Some(0x2000)));
        iova.free(0x1000, 0x1000);
        assert_eq!(iova.allocate(0x1000, 0x4000, u64::MAX), Some(0x4000), "it is not aligned");
        iova.free(0x2000, 0x1000);
        assert_eq!(iova.allocate(0x1000, 1, 0x1ffe), None, "its last byte is above the limit");
        assert!(iova.allocate_at(0x2000, 0x800), "a part of it");
        iova.free(0x2000, 0x800);
        assert_eq!(iova.allocate(0x3000, 1, u64::MAX), Some(0x1000), "joined");
        iova.free(0x1000, 0x3000);
        iova.free(0x4000, 0x1000);
        assert_eq!(iova.ranges().collect::<Vec<_>>(), [0x1000..=0x1_0fff]);
    }

    #[test]
    fn limits_wrapping_and_all_addresses_are_understood() {
        let mut iova = IovaAllocator::new(&[0..=u64::MAX]);
        assert!(!iova.allocate_at(u64::MAX, 2), "it wraps");
        assert!(!iova.allocate_at(0, 0) && iova.allocate(0, 1, u64::MAX).is_none(), "nothing");
        assert!(iova.allocate_at(u64::MAX, 1));
        assert_eq!(iova.allocate(0x1000, 0x1000, 0x1ffe), None, "the last byte is above the limit");
        assert_eq!(iova.allocate(0x1000, 0x1000, 0x1fff), Some(0x1000), "not 0");
        assert_eq!(iova.allocate(0x1000, 0x1000, 0x1fff), None, "only 0 is left");
        assert!(iova.allocate_at(0, 0x1000), "it can be had by name");
        iova.free(0, 0x1000);
        assert_eq!(iova.allocate(0x1000, 0x1000, 0x1fff), None, "and does not come back either");
        assert!(iova.allocate_at(0, 0x1000));
        assert_eq!(iova.taken(&[0..=u64::MAX]), [0..=0x1fff, u64::MAX..=u64::MAX]);
        iova.free(u64::MAX, 1);
        iova.free(0, 0x1000);
        iova.free(0x1000, 0x1000);
        assert_eq!(iova.ranges().collect::<Vec<_>>(), [0..=u64::MAX]);
    }

    #[test]
    fn addresses_of_32_bits_are_left_to_devices_without_others() {
        let mut iova = IovaAllocator::new(&[0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1]);
        let all = iova.ranges().collect::<Vec<_>>();
        assert_eq!(iova.allocate(0x1000, 1, u64::MAX), Some(HIGH));
        assert_eq!(iova.allocate(0x1000, 1, u64::MAX), Some(HIGH + 0x1000));
        assert_eq!(iova.allocate(0x1000, 1, HIGH - 1), Some(0xfef0_0000), "the smallest that fits");
        assert_eq!(iova.allocate(0x1000, 1, 0xffff), Some(1), "not 0");
        iova.free(1, 0x1000);
        assert_eq!(iova.allocate(0x1000, 1, u64::MAX), Some(HIGH + 0x2000), "freed last, but low");
        iova.free(HIGH, 0x1000);
        assert_eq!(iova.allocate(0x1000, 1, u64::MAX), Some(HIGH), "freed last");
        // Everything above is taken, so lower addresses are used.
        let most = (1 << 39) - 1 - (HIGH + 0x3000);
        assert_eq!(iova.allocate(most, 0x1000, u64::MAX), Some(HIGH + 0x3000));
        assert_eq!(iova.allocate(0x10_0000, 0x10_0000, u64::MAX), Some(0xfef0_0000 + 0x10_0000));
        iova.free(0xfef0_0000 + 0x10_0000, 0x10_0000);
        iova.free(HIGH + 0x3000, most);
        for (start, size) in [(0xfef0_0000, 0x1000), (HIGH + 0x1000, 0x2000), (HIGH, 0x1000)] {
            iova.free(start, size);
        }
        // This size fits only across `HIGH`.
        assert_eq!(iova.allocate((1 << 39) - HIGH + 0x1000, 0x1000, u64::MAX), Some(0xfef0_0000));
        iova.free(0xfef0_0000, (1 << 39) - HIGH + 0x1000);
        assert_eq!(iova.ranges().collect::<Vec<_>>(), all);
    }

    /// A million random operations against a map of which page is taken. Half of the pages have addresses
    /// of more than 32 bits.
    #[test]
    fn a_million_operations_agree_with_a_naive_model() {
        agrees_with_a_naive_model(0);
        agrees_with_a_naive_model(HIGH - 256);
    }

    fn agrees_with_a_naive_model(base: u64) {
        const PAGES: usize = 512;
        let mut iova = IovaAllocator::new(&[base..=base + PAGES as u64 - 1]);
        let mut taken = [false; PAGES];
        let mut live: Vec<(u64, u64)> = Vec::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            // xorshift64
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for operation in 0..500_000 {
            let size = 1 + random(16);
            let fits = |start: usize, taken: &[bool; PAGES]| {
                taken.get(start..start + size as usize).is_some_and(|run| !run.contains(&true))
            };
            match random(3) {
                0 => {
                    let (alignment, limit) = (1 << random(4), base + random(PAGES as u64));
                    // Not at 0.
                    let possible = |from: u64| {
                        let pages = (0..PAGES as u64).map(|page| base + page);
                        pages.filter(|start| *start >= from && start % alignment == 0).any(
                            |start| {
                                start + size - 1 <= limit && fits((start - base) as usize, &taken)
                            },
                        )
                    };
                    match iova.allocate(size, alignment, limit) {
                        Some(start) => {
                            assert!(fits((start - base) as usize, &taken));
                            assert!(start != 0 && start % alignment == 0);
                            assert!(start + size - 1 <= limit);
                            assert!(start >= HIGH || !possible(HIGH), "operation {operation}");
                            live.push((start, size));
                        }
                        None => {
                            assert!(!possible(1), "operation {operation}");
                            continue;
                        }
                    }
                }
                1 => {
                    let start = random(PAGES as u64);
                    let possible = fits(start as usize, &taken);
                    let start = base + start;
                    assert_eq!(iova.allocate_at(start, size), possible, "operation {operation}");
                    if !possible {
                        continue;
                    }
                    live.push((start, size));
                }
                _ => {
                    if live.is_empty() {
                        continue;
                    }
                    let (start, size) = live.swap_remove(random(live.len() as u64) as usize);
                    iova.free(start, size);
                    let page = (start - base) as usize;
                    taken[page..page + size as usize].fill(false);
                    continue;
                }
            }
            if let Some(&(start, size)) = live.last() {
                let page = (start - base) as usize;
                taken[page..page + size as usize].fill(true);
            }
        }
        for (start, size) in live {
            iova.free(start, size);
        }
        assert_eq!(iova.ranges().collect::<Vec<_>>(), [base..=base + PAGES as u64 - 1]);
    }
}
