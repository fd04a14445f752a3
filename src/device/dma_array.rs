//! DMA memory as an array of entries of several words: rings, lists.
//!
//! `unsafe` is here because an entry is reached by a raw pointer. The proof was made once, when the array was
//! made: all of its entries lay in the buffer and were aligned. The array owns the buffer, which therefore
//! neither moves nor is unmapped while the array lives.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

use super::buffer_failed::BufferFailed;
use super::dma_buffer::DmaBuffer;
use super::iova::Iova;
use super::register_access::Width;
use crate::error::ErrorKind;

/// A [`DmaBuffer`] as entries of `N` words of `T`: a ring of commands, a list of pages.
///
/// [`DmaBuffer::store`] checks bounds for each word; this checks them once for an entry, which matters in a
/// driver's hot path: an entry of eight words is eight stores and one comparison. Words are little-endian.
///
/// ```
/// # use std::sync::Arc;
/// # use vfio_remap::{Device, device::DmaArray, emulated::{Edu, Emulated}};
/// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
/// let ring = DmaArray::<u64, 8>::new(device.dma()?.buffer(4096)?)?;
/// assert_eq!(ring.len(), 64);
/// ring.store_entry(3, [1, 2, 3, 4, 5, 6, 7, 8]);
/// assert_eq!(ring.load(3, 7), 8);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[must_use = "dropping it frees the memory"]
pub struct DmaArray<T: Width, const N: usize> {
    first: NonNull<T>,
    len: usize,
    buffer: DmaBuffer,
}

// SAFETY: like its buffer, it is accessed by single accesses of `Width` only, which may race.
unsafe impl<T: Width, const N: usize> Send for DmaArray<T, N> {}
// SAFETY: as above.
unsafe impl<T: Width, const N: usize> Sync for DmaArray<T, N> {}

impl<T: Width, const N: usize> DmaArray<T, N> {
    const ENTRY: usize = {
        assert!(N > 0, "an entry has at least one word");
        N * size_of::<T>()
    };

    /// Makes an array of the whole entries that fit into the buffer.
    ///
    /// # Errors
    /// The buffer, with `Unaligned` if it does not begin at a multiple of the word size, `OutOfRange` if it is
    /// shorter than an entry.
    pub fn new(buffer: DmaBuffer) -> std::result::Result<Self, BufferFailed> {
        let failed = |kind, buffer, reason, advice| {
            Err(BufferFailed::new(kind, "make an array of", buffer, reason, advice))
        };
        let len = buffer.size() / Self::ENTRY;
        if len == 0 {
            let reason = format!("an entry has {:#x} bytes", Self::ENTRY);
            return failed(ErrorKind::OutOfRange, buffer, reason, "use a larger buffer");
        }
        match NonNull::new(buffer.as_ptr().cast::<T>()) {
            Some(first) if first.is_aligned() => Ok(Self { first, len, buffer }),
            _ => {
                let width = size_of::<T>();
                let reason = format!("words of {width} bytes lie at multiples of {width}");
                failed(ErrorKind::Unaligned, buffer, reason, "split the buffer elsewhere")
            }
        }
    }

    /// The number of entries, at least one.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// An entry's address for the device.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[track_caller]
    pub fn iova(&self, index: usize) -> Iova {
        self.check(index);
        Iova(self.buffer.iova().0 + (index * Self::ENTRY) as u64)
    }

    /// Reads a word of an entry by one access. Later accesses happen after it (acquire order), as for
    /// [`DmaBuffer::load`].
    ///
    /// # Panics
    /// If `index` or `word` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub fn load(&self, index: usize, word: usize) -> T {
        // SAFETY: `at` points into the buffer, which is mapped while `self` lives.
        unsafe { T::load(self.at(index, word).as_ptr()) }
    }

    /// Writes a word of an entry by one access. It is ordered only before a later
    /// [`Register::write`](super::Register::write) or [`store_release`](Self::store_release).
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline(always)]
    #[track_caller]
    pub fn store(&self, index: usize, word: usize, value: T) {
        // SAFETY: `at` points into the buffer, which is mapped while `self` lives.
        unsafe { T::store_relaxed(self.at(index, word).as_ptr(), value) }
    }

    /// Writes a word of an entry by one access. Earlier accesses to memory happen before it (release order),
    /// as for [`DmaBuffer::store_release`]. Use it for the word that makes the entry valid for the device.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline(always)]
    #[track_caller]
    pub fn store_release(&self, index: usize, word: usize, value: T) {
        // SAFETY: `at` points into the buffer, which is mapped while `self` lives.
        unsafe { T::store(self.at(index, word).as_ptr(), value) }
    }

    /// Writes all words of an entry, each as by [`store`](Self::store).
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub fn store_entry(&self, index: usize, words: [T; N]) {
        let entry = self.at(index, 0).as_ptr();
        macro_rules! store {
            ($($word:literal)*) => {
                $(if $word < N {
                    // SAFETY: the entry lies in the buffer, as `at` found, and has this word.
                    unsafe { T::store_word::<$word>(entry, words[$word]) }
                })*
            };
        }
        // The offsets of these are parts of their instructions.
        store!(0 1 2 3 4 5 6 7);
        for (word, value) in words.into_iter().enumerate().skip(8) {
            // SAFETY: the entry lies in the buffer, as `at` found, and has this word.
            unsafe { T::store_relaxed(entry.add(word), value) }
        }
    }

    /// An entry, for accesses to its words without further checks.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub fn entry(&self, index: usize) -> DmaEntry<'_, T, N> {
        // SAFETY: `at` points to an entry of this array, which is borrowed as long as the result.
        unsafe { DmaEntry::new(self.at(index, 0)) }
    }

    /// Writes zero to all words of all entries.
    pub fn clear(&self)
    where
        T: Default,
    {
        for index in 0..self.len {
            self.store_entry(index, [T::default(); N]);
        }
    }

    /// Returns the buffer.
    pub fn into_buffer(self) -> DmaBuffer {
        self.buffer
    }

    #[inline(always)]
    #[track_caller]
    fn check(&self, index: usize) {
        if index >= self.len {
            past_the_last("entry", index, self.len);
        }
    }

    #[inline(always)]
    #[track_caller]
    fn at(&self, index: usize, word: usize) -> NonNull<T> {
        self.check(index);
        if word >= N {
            past_the_last("word", word, N);
        }
        // SAFETY: `len` entries of `N` words lie in the buffer, as `new` checked, and this is one of them. A
        // buffer is smaller than `isize::MAX`, so nothing overflows.
        unsafe { self.first.add(index * N + word) }
    }
}

/// An entry of a [`DmaArray`]. The compiler checks the numbers of its words, so that an access is one instruction.
///
/// ```
/// # use std::sync::Arc;
/// # use vfio_remap::{Device, device::DmaArray, emulated::{Edu, Emulated}};
/// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
/// let ring = DmaArray::<u64, 2>::new(device.dma()?.buffer(4096)?)?;
/// let entry = ring.entry(3);
/// entry.store::<1>(7);
/// assert_eq!((entry.load::<1>(), ring.load(3, 1)), (7, 7));
/// # Ok::<(), vfio_remap::Error>(())
/// ```
///
/// ```compile_fail
/// # use vfio_remap::device::DmaEntry;
/// fn past_the_last(entry: DmaEntry<'_, u64, 2>) -> u64 {
///     entry.load::<2>()
/// }
/// let _: fn(DmaEntry<'_, u64, 2>) -> u64 = past_the_last;
/// ```
#[derive(Clone, Copy)]
pub struct DmaEntry<'a, T: Width, const N: usize> {
    /// Points to `N` words in the buffer of the array.
    first: NonNull<T>,
    _array: PhantomData<&'a DmaArray<T, N>>,
}

// SAFETY: as its array, which is borrowed: it is accessed by single accesses of `Width` only, which may race.
unsafe impl<T: Width, const N: usize> Send for DmaEntry<'_, T, N> {}
// SAFETY: as above.
unsafe impl<T: Width, const N: usize> Sync for DmaEntry<'_, T, N> {}

impl<T: Width, const N: usize> DmaEntry<'_, T, N> {
    /// The entry whose first word this is.
    ///
    /// # Safety
    /// `first` points to an entry of an array that is borrowed for this lifetime.
    #[inline(always)]
    pub(super) unsafe fn new(first: NonNull<T>) -> Self {
        Self { first, _array: PhantomData }
    }

    /// Points to the first word.
    #[inline(always)]
    pub(super) fn first(self) -> NonNull<T> {
        self.first
    }

    /// Reads word number `WORD`, as [`DmaArray::load`].
    #[inline(always)]
    pub fn load<const WORD: usize>(self) -> T {
        const { assert!(WORD < N, "the entry has no such word") };
        // SAFETY: `first` points to `N` words in the buffer, which is mapped while the array is borrowed.
        unsafe { T::load_word::<WORD>(self.first.as_ptr()) }
    }

    /// Writes word number `WORD`, as [`DmaArray::store`].
    #[inline(always)]
    pub fn store<const WORD: usize>(self, value: T) {
        const { assert!(WORD < N, "the entry has no such word") };
        // SAFETY: `first` points to `N` words in the buffer, which is mapped while the array is borrowed.
        unsafe { T::store_word::<WORD>(self.first.as_ptr(), value) }
    }
}

impl<T: Width, const N: usize> fmt::Debug for DmaEntry<'_, T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaEntry({N} × {} bits at {:p})", 8 * size_of::<T>(), self.first)
    }
}

/// Out of line, so that its arguments cost the caller nothing on success.
#[cold]
#[inline(never)]
#[track_caller]
pub(super) fn past_the_last(what: &str, index: usize, count: usize) -> ! {
    panic!("{what} {index} of {count}");
}

impl<T: Width, const N: usize> fmt::Debug for DmaArray<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = 8 * size_of::<T>();
        write!(f, "DmaArray({} × {N} × {bits} bits at {})", self.len, self.buffer.iova())
    }
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Device;
    use crate::emulated::{Edu, Emulated};

    fn buffer() -> DmaBuffer {
        let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
        device.dma().unwrap().buffer(4096).unwrap()
    }

    #[test]
    fn entries_lie_where_the_device_is_told() {
        let buffer = buffer();
        let start = buffer.iova().0;
        let ring = DmaArray::<u32, 4>::new(buffer).unwrap();
        assert_eq!((ring.len(), ring.iova(255).0), (256, start + 255 * 16));
        ring.store_entry(1, [1, 2, 3, 0x0403_0201]);
        ring.store(255, 3, 9);
        assert_eq!((ring.load(1, 2), ring.load(255, 3)), (3, 9));
        let entry = ring.entry(2);
        entry.store::<0>(5);
        entry.store::<3>(6);
        assert_eq!([0, 1, 2, 3].map(|word| ring.load(2, word)), [5, 0, 0, 6]);
        assert_eq!((entry.load::<0>(), entry.load::<1>(), entry.load::<3>()), (5, 0, 6));
        let buffer = ring.into_buffer();
        assert_eq!(buffer.load::<u8>(16 + 12), 1, "the lowest byte comes first");
        assert_eq!(buffer.load::<u32>(4092), 9);
        let ring = DmaArray::<u32, 4>::new(buffer).unwrap();
        ring.clear();
        assert_eq!((ring.load(1, 3), ring.load(255, 3)), (0, 0));
    }

    #[test]
    fn another_thread_may_write_an_entry() {
        let ring = DmaArray::<u64, 2>::new(buffer()).unwrap();
        let entry = ring.entry(3);
        std::thread::scope(|scope| drop(scope.spawn(move || entry.store::<1>(7))));
        assert_eq!(ring.load(3, 1), 7);
    }

    #[test]
    fn an_entry_of_many_words_is_stored_whole() {
        let ring = DmaArray::<u16, 11>::new(buffer()).unwrap();
        ring.store_entry(1, std::array::from_fn(|word| word as u16 + 1));
        let words: Vec<_> = (0..33).map(|word| ring.load(word / 11, word % 11)).collect();
        let expected = (0..33).map(|word: u16| if word / 11 == 1 { word - 10 } else { 0 });
        assert_eq!(words, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_is_past_the_last_entry_or_word_is_not_reached() {
        let ring = DmaArray::<u64, 8>::new(buffer()).unwrap();
        let panics = |access: &dyn Fn()| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).is_err()
        };
        assert!(panics(&|| ring.store(64, 0, 0)));
        assert!(panics(&|| ring.store(63, 8, 0)));
        assert!(panics(&|| ring.store_release(63, 8, 0)));
        assert!(panics(&|| ring.store_release(64, 0, 0)));
        assert!(panics(&|| _ = ring.load(usize::MAX, 0)));
        assert!(panics(&|| ring.store_entry(64, [0; 8])));
        assert!(panics(&|| _ = ring.entry(64)));
        assert!(panics(&|| _ = ring.iova(64)));
    }

    #[test]
    fn a_part_that_is_not_aligned_or_too_short_comes_back() {
        let (odd, rest) = buffer().split_at(4).unwrap();
        let failed = DmaArray::<u64, 1>::new(odd).unwrap_err();
        assert_eq!(failed.error().kind(), ErrorKind::OutOfRange, "{failed}");
        assert_eq!(failed.into_buffer().size(), 4);
        let failed = DmaArray::<u64, 1>::new(rest).unwrap_err();
        assert_eq!(failed.error().kind(), ErrorKind::Unaligned, "{failed}");
        assert_eq!(failed.into_buffer().size(), 4092);
    }

    #[test]
    fn a_buffer_that_cannot_be_split_comes_back() {
        for size in [0, 4096, usize::MAX] {
            let failed = buffer().split_at(size).unwrap_err();
            assert_eq!(failed.error().kind(), ErrorKind::OutOfRange, "{failed}");
            assert_eq!(failed.into_buffer().size(), 4096);
        }
    }
}
