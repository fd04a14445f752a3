//! DMA memory as an array of typed descriptors: rings.

use std::fmt;
use std::marker::PhantomData;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::buffer_failed::BufferFailed;
use super::dma::DmaSpace;
use super::dma_array::{DmaArray, past_the_last};
use super::dma_buffer::DmaBuffer;
use super::iova::Iova;
use super::register_access::Width;
use crate::error::{Error, ErrorKind, Result};

/// A ring or table of descriptors of type `D` that a device reads and writes. They are loaded and stored by
/// single accesses of the width of `W`.
///
/// The last word of a descriptor holds the owner bit in the rings of most devices. So [`load`](Self::load)
/// reads it first, and [`store_release`](Self::store_release) writes it last.
///
/// `D` is a `repr(C)` structure without padding, for which all bit patterns are valid. The crate
/// [zerocopy](https://docs.rs/zerocopy) checks that, and has integers of fixed byte order for the fields.
///
/// ```
/// # use std::sync::Arc;
/// # use vfio_remap::{Device, emulated::{Edu, Emulated}};
/// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
/// use vfio_remap::device::Descriptors;
/// use zerocopy::little_endian::{U16, U32, U64};
/// use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};
///
/// /// A receive descriptor.
/// #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
/// #[repr(C)]
/// struct Receive {
///     address: U64,
///     length: U16,
///     checksum: U16,
///     status: U32,
/// }
///
/// let space = device.dma()?;
/// let ring: Descriptors<Receive> = space.descriptors(64)?;
/// let packet = space.buffer(2048)?;
/// let empty = Receive { address: packet.iova().0.into(), ..Receive::new_zeroed() };
/// ring.store_release(0, empty);
/// assert_eq!(ring.load(0).status.get(), 0);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[must_use = "dropping it frees the memory"]
pub struct Descriptors<D, W: Width = u64> {
    words: DmaArray<W, 1>,
    len: usize,
    _descriptors: PhantomData<fn() -> D>,
}

impl<D, W: Width> Descriptors<D, W> {
    /// How many words a descriptor has.
    const WORDS: usize = {
        assert!(size_of::<D>() > 0, "a descriptor has at least one word");
        assert!(
            size_of::<D>().is_multiple_of(size_of::<W>()),
            "a descriptor does not consist of whole words"
        );
        size_of::<D>() / size_of::<W>()
    };

    /// Makes an array of the whole descriptors that fit into the buffer.
    ///
    /// # Errors
    /// The buffer, with `Unaligned` if it does not begin at a multiple of the word size, `OutOfRange` if it is
    /// shorter than a descriptor.
    pub fn new(buffer: DmaBuffer) -> std::result::Result<Self, BufferFailed> {
        let len = buffer.size() / (Self::WORDS * size_of::<W>());
        if len == 0 {
            let reason = format!("a descriptor has {:#x} bytes", size_of::<D>());
            let (kind, advice) = (ErrorKind::OutOfRange, "use a larger buffer");
            return Err(BufferFailed::new(kind, "make descriptors of", buffer, reason, advice));
        }
        Ok(Self { words: DmaArray::new(buffer)?, len, _descriptors: PhantomData })
    }

    /// The number of descriptors, at least one.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A descriptor's address for the device. That of the first is the ring's.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[track_caller]
    pub fn iova(&self, index: usize) -> Iova {
        self.check(index);
        self.words.iova(index * Self::WORDS)
    }

    /// Reads a word of a descriptor by one access. Later accesses happen after it (acquire order).
    ///
    /// # Panics
    /// If `index` or `word` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub fn load_word(&self, index: usize, word: usize) -> W {
        self.words.load(self.at(index, word), 0)
    }

    /// Writes a word of a descriptor by one access. It is ordered only before a later
    /// [`Register::write`](super::Register::write) or store in release order.
    ///
    /// # Panics
    /// As [`load_word`](Self::load_word).
    #[inline(always)]
    #[track_caller]
    pub fn store_word(&self, index: usize, word: usize, value: W) {
        self.words.store(self.at(index, word), 0, value);
    }

    /// Writes a word of a descriptor by one access. Earlier accesses to memory happen before it (release
    /// order).
    ///
    /// # Panics
    /// As [`load_word`](Self::load_word).
    #[inline(always)]
    #[track_caller]
    pub fn store_word_release(&self, index: usize, word: usize, value: W) {
        self.words.store_release(self.at(index, word), 0, value);
    }

    /// Returns the buffer.
    pub fn into_buffer(self) -> DmaBuffer {
        self.words.into_buffer()
    }

    #[inline(always)]
    #[track_caller]
    fn check(&self, index: usize) {
        if index >= self.len {
            past_the_last("descriptor", index, self.len);
        }
    }

    #[inline(always)]
    #[track_caller]
    fn at(&self, index: usize, word: usize) -> usize {
        self.check(index);
        if word >= Self::WORDS {
            past_the_last("word", word, Self::WORDS);
        }
        index * Self::WORDS + word
    }
}

impl<D: FromBytes + IntoBytes + Immutable, W: Width> Descriptors<D, W> {
    /// Reads a descriptor, each word by one access, the last word first. The other words, and later accesses,
    /// are read after it (acquire order). So if the last word says that the device is done, the other words are
    /// what the device wrote before.
    ///
    /// # Panics
    /// If `index` is past the last, as for slices.
    #[inline(always)]
    #[track_caller]
    pub fn load(&self, index: usize) -> D {
        self.check(index);
        let mut descriptor = D::new_zeroed();
        let words = descriptor.as_mut_bytes().chunks_exact_mut(size_of::<W>());
        for (word, bytes) in words.enumerate().rev() {
            let value = self.words.load(index * Self::WORDS + word, 0);
            value.with_bytes(|value| bytes.copy_from_slice(value));
        }
        descriptor
    }

    /// Writes a descriptor, each word by one access, from the first to the last. They are ordered only before a
    /// later [`Register::write`](super::Register::write) or store in release order. Use it for a ring with a
    /// doorbell.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline(always)]
    #[track_caller]
    pub fn store(&self, index: usize, descriptor: D) {
        self.check(index);
        for (word, bytes) in descriptor.as_bytes().chunks_exact(size_of::<W>()).enumerate() {
            self.put(index, word, bytes, |at, value| self.words.store(at, 0, value));
        }
    }

    /// Writes a descriptor as [`store`](Self::store) does, but the last word after all earlier accesses to
    /// memory (release order). Use it for a ring whose device polls the descriptors.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline(always)]
    #[track_caller]
    pub fn store_release(&self, index: usize, descriptor: D) {
        self.check(index);
        let (front, last) = descriptor.as_bytes().split_at((Self::WORDS - 1) * size_of::<W>());
        for (word, bytes) in front.chunks_exact(size_of::<W>()).enumerate() {
            self.put(index, word, bytes, |at, value| self.words.store(at, 0, value));
        }
        self.put(index, Self::WORDS - 1, last, |at, value| self.words.store_release(at, 0, value));
    }

    /// Writes zero to all bytes of all descriptors.
    pub fn clear(&self) {
        (0..self.len).for_each(|index| self.store(index, D::new_zeroed()));
    }

    /// Stores a word of a descriptor, from these bytes.
    #[inline(always)]
    #[track_caller]
    fn put(&self, index: usize, word: usize, bytes: &[u8], store: impl FnOnce(usize, W)) {
        // The bytes are exactly one word.
        if let Some(value) = W::from_bytes(bytes) {
            store(index * Self::WORDS + word, value);
        }
    }
}

impl DmaSpace {
    /// Allocates a buffer for `len` entries of `N` words of `T`, all zero.
    ///
    /// # Address bits
    /// As for [`buffer`](Self::buffer). For a device with few address bits, make it of a buffer that has a low
    /// address: [`DmaArray::new`].
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn array<T: Width, const N: usize>(&self, len: usize) -> Result<DmaArray<T, N>> {
        Ok(DmaArray::new(self.exactly(len, N * size_of::<T>())?)?)
    }

    /// Allocates a buffer for `len` descriptors, all zero: see [`Descriptors`].
    ///
    /// # Address bits
    /// As for [`buffer`](Self::buffer). For a device with few address bits, make them of a buffer that has a
    /// low address: [`Descriptors::new`].
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn descriptors<D, W: Width>(&self, len: usize) -> Result<Descriptors<D, W>> {
        Ok(Descriptors::new(self.exactly(len, size_of::<D>())?)?)
    }

    /// A buffer of exactly `count` times `size` bytes, without the rest of its last page.
    fn exactly(&self, count: usize, size: usize) -> Result<DmaBuffer> {
        let Some(size) = count.checked_mul(size) else {
            return Err(Error::new(ErrorKind::OutOfRange, "allocate", format!("{count} entries"))
                .with_reason("no buffer can be that large")
                .with_advice("ask for fewer"));
        };
        Ok(self.buffer(size)?.slice(..size)?)
    }
}

impl<D, W: Width> fmt::Debug for Descriptors<D, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Descriptors({} × {:#x} bytes, {:?})", self.len, size_of::<D>(), self.words)
    }
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use zerocopy::little_endian::{U16, U32, U64};
    use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

    use super::*;
    use crate::Device;
    use crate::emulated::{Edu, Emulated};

    #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
    #[repr(C)]
    struct Descriptor {
        address: U64,
        length: U16,
        flags: U16,
        status: U32,
    }

    fn space() -> DmaSpace {
        Device::new(Arc::new(Emulated::new(Edu::new()).unwrap())).dma().unwrap()
    }

    const FILLED: Descriptor = Descriptor {
        address: U64::new(0x1122_3344_5566_7788),
        length: U16::new(0x99aa),
        flags: U16::new(0xbbcc),
        status: U32::new(0xddee_ff00),
    };

    fn layouts<W: Width>() {
        for store in [Descriptors::<Descriptor, W>::store, Descriptors::store_release] {
            let ring: Descriptors<Descriptor, W> = space().descriptors(3).unwrap();
            let start = ring.iova(0);
            assert_eq!((ring.len(), ring.iova(2)), (3, start + 32));
            store(&ring, 1, FILLED);
            assert_eq!(ring.load(1), FILLED);
            assert_eq!(ring.load(0), Descriptor::new_zeroed());
            assert_eq!(ring.load(2), Descriptor::new_zeroed());
            let buffer = ring.into_buffer();
            let mut bytes = [0; 16];
            buffer.read(16, &mut bytes);
            assert_eq!(
                bytes,
                [
                    0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xaa, 0x99, 0xcc, 0xbb, 0x00,
                    0xff, 0xee, 0xdd
                ]
            );
            let ring = Descriptors::<Descriptor, W>::new(buffer).unwrap();
            ring.clear();
            assert_eq!(ring.load(1), Descriptor::new_zeroed());
        }
    }

    #[test]
    fn descriptors_lie_as_their_type_says_at_every_width() {
        layouts::<u64>();
        layouts::<u32>();
        layouts::<u16>();
        layouts::<u8>();
    }

    #[test]
    fn a_word_of_a_descriptor_is_reached_alone() {
        let ring: Descriptors<Descriptor, u32> = space().descriptors(4).unwrap();
        ring.store(3, FILLED);
        assert_eq!(ring.load_word(3, 3), 0xddee_ff00);
        ring.store_word(3, 0, 1);
        ring.store_word_release(3, 3, 2);
        let changed = ring.load(3);
        assert_eq!((changed.address.get(), changed.status.get()), (0x1122_3344_0000_0001, 2));
        assert_eq!((changed.length, changed.flags), (FILLED.length, FILLED.flags));
    }

    #[test]
    fn what_is_past_the_last_descriptor_or_word_is_not_reached() {
        let ring: Descriptors<Descriptor> = space().descriptors(3).unwrap();
        let panics = |access: &dyn Fn()| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).is_err()
        };
        assert!(panics(&|| ring.store(3, FILLED)));
        assert!(panics(&|| ring.store_release(3, FILLED)));
        assert!(panics(&|| _ = ring.load(usize::MAX)));
        assert!(panics(&|| _ = ring.load_word(0, 2)));
        assert!(panics(&|| ring.store_word(3, 0, 0)));
        assert!(panics(&|| _ = ring.iova(3)));
    }

    #[test]
    fn a_buffer_that_is_no_descriptors_comes_back() {
        let (short, rest) = space().buffer(4096).unwrap().split_at(12).unwrap();
        let failed = Descriptors::<Descriptor>::new(short).unwrap_err();
        assert_eq!(failed.error().kind(), ErrorKind::OutOfRange, "{failed}");
        let failed = Descriptors::<Descriptor>::new(rest).unwrap_err();
        assert_eq!(failed.error().kind(), ErrorKind::Unaligned, "{failed}");
        let rest = failed.into_buffer();
        assert_eq!(Descriptors::<Descriptor, u32>::new(rest).unwrap().len(), 255);
        for len in [0, usize::MAX, usize::MAX / 16] {
            let error = space().descriptors::<Descriptor, u64>(len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        }
        let array: DmaArray<u32, 3> = space().array(5).unwrap();
        assert_eq!((array.len(), array.load(4, 2)), (5, 0));
    }

    /// A thread plays a device that writes descriptors. A reader that sees the last word sees the rest.
    #[test]
    fn a_descriptor_whose_last_word_is_there_is_there() {
        const LOADS: u32 = 500_000;
        let ring = space().descriptors::<Descriptor, u64>(1).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let (address, status) = (u64::from(round).into(), U32::new(round));
                    ring.store_release(0, Descriptor { address, status, ..FILLED });
                }
            });
            let late = (0..LOADS)
                .map(|_| ring.load(0))
                .find(|descriptor| descriptor.address.get() < u64::from(descriptor.status.get()));
            stop.store(true, Ordering::Relaxed);
            assert_eq!(late, None);
        });
    }
}
