//! Data pointers of commands: PRP entries and lists (NVMe Base 1.4 §4.3).

use vfio_remap::device::DmaArray;

/// Most pages in the PRP list of a transfer, so that a list never leaves a page of 4 KiB.
pub const LIST: usize = 512;

/// The PRP lists of a queue, one for each slot.
#[derive(Debug)]
pub struct PrpLists {
    pages: DmaArray<u64, 1>,
    /// How many pages a list has.
    len: usize,
    /// The bits of an address that are the offset in its page: one less than the size of a page.
    offset_bits: u64,
}

impl PrpLists {
    /// How many pages the list for transfers of up to `max_transfer` bytes has.
    pub fn len(max_transfer: usize, page_shift: u32) -> usize {
        (max_transfer >> page_shift).clamp(1, LIST).next_power_of_two()
    }

    /// Lists of `len` pages each.
    pub fn new(pages: DmaArray<u64, 1>, len: usize, page_shift: u32) -> Self {
        Self { pages, len, offset_bits: (1 << page_shift) - 1 }
    }

    /// Whether one PRP entry describes the `size` bytes at `iova`, at least one: they lie in one page, and begin at
    /// a multiple of four.
    #[inline]
    pub fn is_one_entry(&self, iova: u64, size: usize) -> bool {
        let last_byte = size.wrapping_sub(1) as u64;
        iova & 3 == 0 && (iova & self.offset_bits) + last_byte <= self.offset_bits
    }

    /// The second PRP entry for the `size` bytes at `iova`, which is the first: zero, or the address of the second
    /// page, or of the list of this slot if there are more.
    pub fn second(&self, slot: usize, iova: u64, size: usize) -> u64 {
        let page = self.offset_bits + 1;
        let first = page - (iova & self.offset_bits);
        let (second, rest) = (iova + first, (size as u64).saturating_sub(first));
        if rest == 0 {
            return 0;
        }
        if rest <= page {
            return second;
        }
        let start = slot * self.len;
        let pages = (second..second + rest).step_by(page as usize);
        for (index, page) in pages.take(self.len).enumerate() {
            self.pages.store(start + index, 0, page);
        }
        self.pages.iova(start).0
    }
}
