//! Copies between a window and memory, for BARs that hold memory.
//!
//! `unsafe` is here because a copy is a series of accesses by raw pointer. The whole range is checked against
//! the window before the first access, and the window, which is borrowed, keeps it mapped.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::ptr::NonNull;

use super::dma_buffer::split;
use super::register::Width;
use super::window::Window;
use crate::error::Result;
use crate::space::Access;

/// Bulk copies. Each access costs as much as that of a register: reading takes a round trip to the device for
/// every eight bytes. A device with a DMA engine copies much faster by DMA.
///
/// Accesses go from the lowest address to the highest, unordered with other accesses to memory. To notify the
/// device of the copied bytes, use [`Register::write`](super::Register::write) afterwards.
impl Window {
    /// Copies bytes out of the window, starting at `offset`: eight at a time by aligned accesses, and one by
    /// one at an unaligned begin or end.
    ///
    /// ```
    /// # use vfio_remap::{Device, Placement, transport::MemoryDevice};
    /// # let device = Device::new(std::sync::Arc::new(MemoryDevice::new(0x4000)?));
    /// let window = device.bar(0)?.map(.., Placement::Anywhere)?;
    /// window.write_bytes(0x101, b"a bitstream")?;
    /// let mut bytes = [0; 11];
    /// window.read_bytes(0x101, &mut bytes)?;
    /// assert_eq!(&bytes, b"a bitstream");
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// `OutOfRange` if they leave the window; nothing is copied then.
    pub fn read_bytes(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let at = self.place_aligned(offset, bytes.len(), 1, Access::ReadOnly)?;
        let (head, words, _) = split(at.as_ptr().addr(), bytes.len());
        let (head, rest) = bytes.split_at_mut(head);
        let (words, tail) = rest.split_at_mut(words);
        // SAFETY: the three parts are adjacent and make up the checked range. The second, unless it is empty,
        // begins at a multiple of 8, by `split`.
        unsafe {
            let at = load_all(at, head.iter_mut(), |byte, value: u8| *byte = value);
            let at = load_all(at, words.chunks_exact_mut(8), |bytes, value: u64| {
                bytes.copy_from_slice(&value.to_le_bytes());
            });
            load_all(at, tail.iter_mut(), |byte, value: u8| *byte = value);
        }
        Ok(())
    }

    /// Copies bytes into the window, starting at `offset`, by the same accesses as
    /// [`read_bytes`](Self::read_bytes).
    ///
    /// # Errors
    /// `OutOfRange` if they leave the window, `ReadOnly` for a read-only window; nothing is copied then.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let at = self.place_aligned(offset, bytes.len(), 1, Access::ReadWrite)?;
        // SAFETY: `place_aligned` checked the range.
        unsafe { store_bytes(at, bytes) };
        Ok(())
    }

    /// Copies words out of the window, starting at `offset`, each by one access: for a device that supports one
    /// access width only.
    ///
    /// # Errors
    /// `OutOfRange` if they leave the window, `Unaligned` if they are not naturally aligned; nothing is
    /// copied then.
    pub fn read_words<T: Width>(&self, offset: usize, words: &mut [T]) -> Result<()> {
        let at =
            self.place_aligned(offset, size_of_val(words), size_of::<T>(), Access::ReadOnly)?;
        // SAFETY: `place_aligned` checked the range and its alignment.
        unsafe { load_all(at, words.iter_mut(), |word, value: T| *word = value) };
        Ok(())
    }

    /// Copies words into the window, starting at `offset`, each by one access.
    ///
    /// # Errors
    /// As [`read_words`](Self::read_words); `ReadOnly` for a read-only window.
    pub fn write_words<T: Width>(&self, offset: usize, words: &[T]) -> Result<()> {
        let at =
            self.place_aligned(offset, size_of_val(words), size_of::<T>(), Access::ReadWrite)?;
        // SAFETY: `place_aligned` checked the range and its alignment.
        unsafe { store_all(at, words.iter().copied()) };
        Ok(())
    }
}

/// Stores bytes, starting at `at`: eight at a time by aligned accesses, and one by one at an unaligned begin or
/// end.
///
/// # Safety
/// That many bytes are mapped for writing at `at`.
pub(super) unsafe fn store_bytes(at: NonNull<u8>, bytes: &[u8]) {
    let (head, words, _) = split(at.as_ptr().addr(), bytes.len());
    let (head, rest) = bytes.split_at(head);
    let (words, tail) = rest.split_at(words);
    // SAFETY: the three parts are adjacent and make up the range that the caller guarantees. The second, unless
    // it is empty, begins at a multiple of 8, by `split`.
    unsafe {
        let at = store_all(at, head.iter().copied());
        let at = store_all(at, words.chunks_exact(8).map(word));
        store_all(at, tail.iter().copied());
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// Loads a word for each of `places`, starting at `at`. Returns the address after the last one.
///
/// # Safety
/// That many words are mapped at `at`. It is aligned unless there are none.
#[inline(always)]
unsafe fn load_all<T: Width, I: Iterator>(
    mut at: NonNull<u8>,
    places: I,
    put: impl Fn(I::Item, T),
) -> NonNull<u8> {
    for place in places {
        debug_assert!(at.cast::<T>().is_aligned());
        // SAFETY: one of the words that the caller guarantees; the next word begins where this one ends.
        unsafe {
            put(place, T::load_relaxed(at.cast().as_ptr()));
            at = at.byte_add(size_of::<T>());
        }
    }
    at
}

/// Stores words, starting at `at`. Returns the address after the last one.
///
/// # Safety
/// That many words are mapped for writing at `at`. It is aligned unless there are none.
#[inline(always)]
unsafe fn store_all<T: Width>(mut at: NonNull<u8>, words: impl Iterator<Item = T>) -> NonNull<u8> {
    for word in words {
        debug_assert!(at.cast::<T>().is_aligned());
        // SAFETY: one of the words that the caller guarantees; the next word begins where this one ends.
        unsafe {
            T::store_relaxed(at.cast().as_ptr(), word);
            at = at.byte_add(size_of::<T>());
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transport::MemoryDevice;
    use crate::{Device, ErrorKind, Placement};

    /// A window over bytes 0x10 to 0x1010 of a device.
    fn window() -> (Device, Window) {
        let device = Device::new(Arc::new(MemoryDevice::new(0x2000).unwrap()));
        let window = device.bar(0).unwrap().map(0x10..0x1010, Placement::Anywhere).unwrap();
        (device, window)
    }

    fn contents(device: &Device, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        device.transport().read_at(0, 0x10 + offset, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn bytes_are_copied_at_every_offset_and_length() {
        let (device, window) = window();
        let pattern: Vec<u8> = (1..=40).collect();
        for offset in 0..17 {
            for len in 0..=40 {
                device.transport().write_at(0, 0, &[0xee; 0x80]).unwrap();
                window.write_bytes(offset, &pattern[..len]).unwrap();
                let mut expected = vec![0xee; 64];
                expected[offset..offset + len].copy_from_slice(&pattern[..len]);
                assert_eq!(contents(&device, 0, 64), expected, "{len} bytes at {offset}");
                let mut read = vec![0; len];
                window.read_bytes(offset, &mut read).unwrap();
                assert_eq!(read, pattern[..len], "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn words_are_copied_little_endian() {
        let (device, window) = window();
        window.write_words(4, &[0x0403_0201u32, 0x0807_0605]).unwrap();
        assert_eq!(contents(&device, 4, 9), [1, 2, 3, 4, 5, 6, 7, 8, 0]);
        let mut words = [0u16; 3];
        window.read_words(6, &mut words).unwrap();
        assert_eq!(words, [0x0403, 0x0605, 0x0807]);
    }

    #[test]
    fn what_leaves_the_window_is_not_copied_at_all() {
        let (device, window) = window();
        window.write_bytes(0xff0, &[1; 16]).unwrap();
        assert_eq!(contents(&device, 0xff0, 17), [&[1; 16][..], &[0]].concat());
        let kind = |result: Result<()>| result.unwrap_err().kind();
        for offset in [0xff1, 0x1001, usize::MAX] {
            assert_eq!(kind(window.write_bytes(offset, &[2; 16])), ErrorKind::OutOfRange);
            assert_eq!(kind(window.read_bytes(offset, &mut [2; 16])), ErrorKind::OutOfRange);
        }
        assert_eq!(kind(window.write_words(0xff8, &[2u64; 2])), ErrorKind::OutOfRange);
        assert_eq!(kind(window.read_words(0xff8, &mut [2u64; 2])), ErrorKind::OutOfRange);
        assert_eq!(kind(window.write_words(4, &[2u64; 2])), ErrorKind::Unaligned);
        assert_eq!(kind(window.read_words(2, &mut [2u32; 2])), ErrorKind::Unaligned);
        assert_eq!(contents(&device, 0xff0, 16), [1; 16]);
        assert_eq!(contents(&device, 4, 16), [0; 16]);
        window.write_bytes(0x1000, &[]).unwrap();
        assert_eq!(kind(window.write_bytes(0x1001, &[])), ErrorKind::OutOfRange);
    }

    #[test]
    fn a_read_only_window_is_not_written() {
        let (_device, window) = window();
        let (window, _) = window.duplicate_read_only(Placement::Anywhere).unwrap();
        assert_eq!(window.write_bytes(0, &[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(window.write_words(0, &[1u64]).unwrap_err().kind(), ErrorKind::ReadOnly);
        window.read_bytes(0, &mut [1]).unwrap();
    }
}
