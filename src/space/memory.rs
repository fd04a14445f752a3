//! Memory that can be mapped for DMA.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

#[cfg(feature = "vfio-user")]
use crate::sys::fork;
use crate::sys::mm::Shareable;

/// Memory that a device may read and write at any time. It is mapped in this process, and no Rust reference
/// points into it.
///
/// Clones are the same memory, and keep it mapped.
#[derive(Clone)]
pub struct DmaMemory {
    /// One `Arc` for all of it, because memory is cloned for every mapping.
    range: Arc<Range>,
    pages: Pages,
    /// The process that has it mapped, if children of `fork(2)` do not inherit it: see [`fork::generation`].
    #[cfg(feature = "vfio-user")]
    generation: Option<u32>,
}

/// What happens to the pages when the owner is dropped, and when the kernel maps them for DMA.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// The owner may reuse them, so the memory must be kept while a device reaches them.
    OfOwner,
    /// They are unmapped and returned to the kernel, which keeps the pages that it has pinned.
    Own,
    /// They are a device's. The kernel maps them for DMA without locking or keeping them.
    OfDevice,
}

struct Range {
    address: usize,
    size: usize,
    file: Option<(Arc<OwnedFd>, u64)>,
    owner: Arc<dyn Any + Send + Sync>,
}

impl DmaMemory {
    /// `size` bytes at `address`, which `owner` keeps mapped. If they are pages of a file, `file` is that
    /// file and the offset in it, so that a device model in another process can map them too.
    ///
    /// # Safety
    /// The range is mapped as long as `owner` lives. No reference to its contents ever exists, and every
    /// access to it is atomic or volatile, because a device may change it at any time.
    ///
    /// If `file` is given, another process may write the pages at any later time, even after the memory was
    /// unmapped from DMA and `owner` was dropped: a vfio-user server gets the file, and may keep it mapped for
    /// ever. So they never become Rust's again: no mapping of these pages of the file ever holds Rust values.
    pub unsafe fn new(
        address: usize,
        size: usize,
        file: Option<(Arc<OwnedFd>, u64)>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let range = Arc::new(Range { address, size, file, owner });
        Self {
            range,
            pages: Pages::OfOwner,
            #[cfg(feature = "vfio-user")]
            generation: None,
        }
    }

    /// The same memory, which is mapped in this process, and which children of `fork(2)` do not inherit.
    #[cfg(feature = "emulated")]
    pub(crate) fn not_inherited(self) -> Self {
        Self { generation: Some(fork::generation()), ..self }
    }

    /// Whether it is mapped in this process. In a child of `fork(2)` anything else may be at its address.
    #[cfg(feature = "vfio-user")]
    pub(crate) fn is_mapped(&self) -> bool {
        self.generation.is_none_or(|generation| generation == fork::generation())
    }

    /// The same memory, whose pages are a device's.
    pub(crate) fn of_device(self) -> Self {
        Self { pages: Pages::OfDevice, ..self }
    }

    /// The same memory, whose owner unmaps the pages when it is dropped, and gives them to no one else.
    pub(crate) fn own(self) -> Self {
        Self { pages: Pages::Own, ..self }
    }

    /// Whether the kernel keeps the pages that it has mapped for DMA after the owner is dropped.
    #[inline]
    pub(crate) fn is_kept_by_kernel(&self) -> bool {
        self.pages == Pages::Own
    }

    /// What keeps it mapped.
    #[inline]
    pub(crate) fn owner(&self) -> &(dyn Any + Send + Sync) {
        &*self.range.owner
    }

    /// How many bytes count as locked when the kernel maps it for DMA.
    #[inline]
    pub(crate) fn lockable(&self) -> u64 {
        if self.pages == Pages::OfDevice { 0 } else { self.size() as u64 }
    }

    /// The range to map for DMA. The caller keeps this memory until it is unmapped from DMA, unless the
    /// [kernel keeps it](Self::is_kept_by_kernel).
    #[inline]
    pub(crate) fn shareable(&self) -> Shareable {
        // SAFETY: by the contract of `new` no reference to the contents exists while the owner lives, and
        // the caller keeps the owner. Otherwise the kernel keeps the pages and gives them to no one else.
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

    /// The file that it maps, and the offset of its first byte in the file, in bytes.
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
    fn the_owner_of_the_pages_decides_what_is_locked_and_kept() {
        let file = Arc::new(file::memory_file("vfio-remap-test", 0x3000).unwrap());
        let part = Some((file, 0x1000));
        // SAFETY: the memory is never mapped or accessed.
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
