//! Parts of a DMA buffer.

use std::ops::{Bound, RangeBounds};

use super::buffer_failed::BufferFailed;
use super::dma_buffer::DmaBuffer;
use crate::error::ErrorKind;

impl DmaBuffer {
    /// The part of the buffer in `range`, in bytes. The rest is unused until the memory is freed with this
    /// part; [`split_at`](Self::split_at) returns both parts.
    ///
    /// # Errors
    /// The buffer, with `OutOfRange` if the range is empty or leaves it.
    pub fn slice(self, range: impl RangeBounds<usize>) -> Result<Self, BufferFailed> {
        let size = self.size();
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => size,
        };
        if start >= end || end > size {
            let reason = format!("{start:#x}..{end:#x} is not a part of it");
            let advice = "use a range that is not empty and ends inside";
            return Err(BufferFailed::new(ErrorKind::OutOfRange, "slice", self, reason, advice));
        }
        let front = if end < size { self.split_at(end)?.0 } else { self };
        if start > 0 { Ok(front.split_at(start)?.1) } else { Ok(front) }
    }

    /// Splits the buffer into parts of `size` bytes; the last may be shorter. This makes, for example, packet
    /// buffers from one mapping.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use vfio_remap::{Device, emulated::{Edu, Emulated}};
    /// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
    /// let packets: Vec<_> = device.dma()?.buffer(8 * 2048)?.chunks(2048).collect();
    /// assert_eq!(packets.len(), 8);
    /// assert_eq!(packets[7].iova(), packets[0].iova() + 7 * 2048);
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Panics
    /// If `size` is 0, as for slices.
    #[track_caller]
    pub fn chunks(self, size: usize) -> impl Iterator<Item = Self> + use<> {
        assert!(size > 0, "the size of the parts is 0");
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let whole = rest.take()?;
            if whole.size() <= size {
                return Some(whole);
            }
            let (first, others) = whole.split_at(size).ok()?;
            rest = Some(others);
            Some(first)
        })
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
    fn a_slice_is_the_range_of_the_buffer() {
        for (range, start, size) in
            [(0..4096, 0, 4096), (0..1, 0, 1), (4095..4096, 4095, 1), (16..48, 16, 32)]
        {
            let buffer = buffer();
            (0..4096).for_each(|at| buffer.store(at, at as u8));
            let iova = buffer.iova();
            let part = buffer.slice(range).unwrap();
            assert_eq!((part.size(), part.iova()), (size, iova + start));
            assert_eq!(part.load::<u8>(0), start as u8);
        }
        assert_eq!(buffer().slice(..).unwrap().size(), 4096);
        assert_eq!(buffer().slice(..=15).unwrap().size(), 16);
    }

    #[test]
    #[expect(clippy::reversed_empty_ranges, reason = "the test is about them")]
    fn a_slice_that_is_empty_or_leaves_the_buffer_gives_it_back() {
        for range in [0..0, 4096..4096, 0..4097, 4096..4097, 5..4, 0..usize::MAX] {
            let failed = buffer().slice(range).unwrap_err();
            assert_eq!(failed.error().kind(), ErrorKind::OutOfRange, "{failed}");
            assert_eq!(failed.into_buffer().size(), 4096);
        }
    }

    #[test]
    fn chunks_are_all_of_the_buffer() {
        for (size, sizes) in
            [(4096, vec![4096]), (5000, vec![4096]), (1500, vec![1500, 1500, 1096])]
        {
            let buffer = buffer();
            let mut next = buffer.iova();
            let chunks: Vec<_> = buffer.chunks(size).collect();
            assert_eq!(chunks.iter().map(DmaBuffer::size).collect::<Vec<_>>(), sizes);
            for chunk in chunks {
                assert_eq!(chunk.iova(), next);
                next = next + chunk.size() as u64;
            }
        }
    }
}
