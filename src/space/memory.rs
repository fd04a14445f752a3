//! Memory that a device may be let into.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::sys::mm::Shareable;

/// Memory that a device may read and write at any time: mapped in this process, and known not to be
/// what Rust takes for its own.
///
/// Clones are the same memory, and keep it mapped.
#[derive(Clone)]
pub struct DmaMemory {
    /// One count for all of it: memory is cloned for every mapping.
    range: Arc<Range>,
    pages: Pages,
}

/// What becomes of the pages of memory when its owner goes, and what a kernel does that maps them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// Whatever the owner likes: they may be reused, so it is kept as long as a device reaches them.
    OfOwner,
    /// They are unmapped and given back to the kernel, which keeps those that it has pinned.
    Own,
    /// They are a device's. An IOMMU is told of them without locking or keeping anything.
    OfDevice,
}

struct Range {
    address: usize,
    size: usize,
    file: Option<(Arc<OwnedFd>, u64)>,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl DmaMemory {
    /// `size` bytes at `address`, which `owner` keeps mapped; where they are the pages of a file, that
    /// file and the offset in it, so that a device model in another process can map them, too.
    ///
    /// # Safety
    /// The range is mapped as long as `owner` lives. Nothing ever makes a reference to its contents,
    /// and what reads or writes it does so by atomic or volatile accesses: a device changes it at any
    /// time.
    pub unsafe fn new(
        address: usize,
        size: usize,
        file: Option<(Arc<OwnedFd>, u64)>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let range = Arc::new(Range { address, size, file, _owner: owner });
        Self { range, pages: Pages::OfOwner }
    }

    /// The same, where the pages are a device's.
    pub(crate) fn of_device(self) -> Self {
        Self { pages: Pages::OfDevice, ..self }
    }

    /// The same, where the owner unmaps the pages when it goes, and nobody gets them from it.
    pub(crate) fn own(self) -> Self {
        Self { pages: Pages::Own, ..self }
    }

    /// Whether a kernel that has mapped it keeps its pages, whatever becomes of its owner.
    #[inline]
    pub(crate) fn is_kept_by_kernel(&self) -> bool {
        self.pages == Pages::Own
    }

    /// How many bytes a kernel locks that maps it.
    #[inline]
    pub(crate) fn lockable(&self) -> u64 {
        if self.pages == Pages::OfDevice { 0 } else { self.size() as u64 }
    }

    /// What a kernel is told that maps it for DMA. Whoever tells it keeps this memory until it is unmapped,
    /// unless it [is kept by the kernel](Self::is_kept_by_kernel).
    #[inline]
    pub(crate) fn shareable(&self) -> Shareable {
        // SAFETY: by the contract of `new` nothing makes a reference to the contents as long as the owner
        // lives, and afterwards nobody has pages that the kernel keeps.
        unsafe { Shareable::new(self.address(), self.size()) }
    }

    /// The first address.
    pub fn address(&self) -> usize {
        self.range.address
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.range.size
    }

    /// The file whose pages it is, and the offset of its first byte there, in bytes.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.range.file.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }
}

impl fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMemory({:#x}..{:#x})", self.address(), self.address() + self.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file;

    #[test]
    fn whose_the_pages_are_says_what_is_locked_and_kept() {
        let file = Arc::new(file::memory_file("vfio-remap-test", 0x3000).unwrap());
        let part = Some((file, 0x1000));
        // SAFETY: nobody maps or reaches it.
        let memory = unsafe { DmaMemory::new(0x10_0000, 0x2000, part, Arc::new(())) };
        assert_eq!((memory.address(), memory.size()), (0x10_0000, 0x2000));
        assert_eq!(memory.file().map(|(_, offset)| offset), Some(0x1000));
        assert_eq!(format!("{memory:?}"), "DmaMemory(0x100000..0x102000)");
        let locked_and_kept = |memory: &DmaMemory| (memory.lockable(), memory.is_kept_by_kernel());
        assert_eq!(locked_and_kept(&memory), (0x2000, false));
        assert_eq!(locked_and_kept(&memory.clone().own()), (0x2000, true));
        assert_eq!(locked_and_kept(&memory.of_device()), (0, false));
    }
}
