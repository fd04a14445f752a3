//! DMA memory as a ring of entries, with the place where the driver is.
//!
//! `unsafe` is here because that place is a raw pointer. It points to an entry of the array at any time, so an access
//! needs no check.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::ptr::NonNull;

use super::dma_array::{DmaArray, DmaEntry};
use super::iova::Iova;
use super::register_access::Width;

/// A ring of entries of `N` words of `T`, and a position in it that goes from entry to entry: where the driver puts the
/// next command, or expects the next completion.
///
/// [`DmaArray::entry`] checks an index for each access. The position needs no check, because it never leaves the ring.
///
/// ```
/// # use std::sync::Arc;
/// # use vfio_remap::{Device, device::{DmaArray, DmaRing}, emulated::{Edu, Emulated}};
/// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
/// // Three entries of two words.
/// let mut ring = DmaRing::new(device.dma()?.array::<u64, 2>(3)?);
/// ring.entry().store::<0>(7);
/// assert!(!ring.advance() && !ring.advance());
/// assert_eq!(ring.position(), 2);
/// // From the last entry to the first.
/// assert!(ring.advance());
/// assert_eq!((ring.position(), ring.entry().load::<0>()), (0, 7));
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[must_use = "dropping it frees the memory"]
pub struct DmaRing<T: Width, const N: usize> {
    /// The first word of the entry at the position: one of the array.
    at: NonNull<T>,
    /// The first word of the last entry.
    last: NonNull<T>,
    array: DmaArray<T, N>,
}

// SAFETY: like its array, it is accessed by single accesses of `Width` only, which may race. Only `&mut self` changes
// the position.
unsafe impl<T: Width, const N: usize> Send for DmaRing<T, N> {}
// SAFETY: as above.
unsafe impl<T: Width, const N: usize> Sync for DmaRing<T, N> {}

impl<T: Width, const N: usize> DmaRing<T, N> {
    /// Makes a ring of all entries of the array, at the first one.
    pub fn new(array: DmaArray<T, N>) -> Self {
        let (first, last) = (array.entry(0).first(), array.entry(array.len() - 1).first());
        Self { at: first, last, array }
    }

    /// The number of entries, at least one.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.array.len()
    }

    /// The ring's address for the device.
    pub fn iova(&self) -> Iova {
        self.array.iova(0)
    }

    /// The entry at the position.
    #[inline(always)]
    pub fn entry(&self) -> DmaEntry<'_, T, N> {
        // SAFETY: `at` points to an entry of the array, which is borrowed as long as the result.
        unsafe { DmaEntry::new(self.at) }
    }

    /// Goes to the next entry; from the last one to the first. Returns whether it was the last.
    #[inline(always)]
    pub fn advance(&mut self) -> bool {
        if self.at == self.last {
            self.rewind();
            return true;
        }
        // SAFETY: this entry is not the last, so the next one lies in the array, too.
        self.at = unsafe { self.at.add(N) };
        false
    }

    /// The index of the entry at the position.
    #[inline]
    pub fn position(&self) -> usize {
        (self.at.addr().get() - self.array.entry(0).first().addr().get()) / (N * size_of::<T>())
    }

    /// Goes to the first entry.
    #[inline]
    pub fn rewind(&mut self) {
        self.at = self.array.entry(0).first();
    }

    /// Writes zero to all words of all entries, and goes to the first.
    pub fn clear(&mut self)
    where
        T: Default,
    {
        self.array.clear();
        self.rewind();
    }

    /// Returns the array.
    pub fn into_array(self) -> DmaArray<T, N> {
        self.array
    }
}

impl<T: Width, const N: usize> fmt::Debug for DmaRing<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaRing(at {} of {:?})", self.position(), self.array)
    }
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Device;
    use crate::emulated::{Edu, Emulated};

    fn ring(len: usize) -> DmaRing<u32, 4> {
        let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
        DmaRing::new(device.dma().unwrap().array(len).unwrap())
    }

    #[test]
    fn a_position_goes_through_all_entries_and_around() {
        for len in [1, 2, 3, 7] {
            let mut ring = ring(len);
            for round in 0..3 {
                for index in 0..len {
                    let entry = ring.entry();
                    assert_eq!((ring.position(), entry.load::<3>()), (index, round));
                    entry.store::<3>(round + 1);
                    assert_eq!(ring.array.load(index, 3), round + 1);
                    assert_eq!(ring.advance(), index + 1 == len);
                }
            }
        }
    }

    #[test]
    fn a_cleared_ring_is_as_a_new_one() {
        let mut ring = ring(3);
        for _ in 0..2 {
            ring.entry().store::<0>(5);
            ring.advance();
        }
        ring.clear();
        assert_eq!((ring.position(), ring.len()), (0, 3));
        assert!((0..3).all(|index| ring.array.load(index, 0) == 0));
        assert_eq!(ring.iova(), ring.array.iova(0));
        let iova = ring.iova();
        assert_eq!(ring.into_array().into_buffer().iova(), iova);
    }
}
