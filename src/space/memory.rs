//! Memory that a device may be let into.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use vfio_ioctls::VfioContainer;

use crate::sys::mm::Access;
use crate::sys::{iommufd, vfio_dma};

/// Memory that a device may read and write at any time: mapped in this process, and known not to be
/// what Rust takes for its own.
///
/// Clones are the same memory, and keep it mapped.
#[derive(Clone)]
pub struct DmaMemory {
    /// One count for all of it: memory is cloned for every mapping.
    range: Arc<Range>,
    of_device: bool,
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
        Self { range, of_device: false }
    }

    /// The same, where the pages are a device's: an IOMMU is told of them without locking anything.
    pub(crate) fn of_device(self) -> Self {
        Self { of_device: true, ..self }
    }

    pub(crate) fn is_of_device(&self) -> bool {
        self.of_device
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

/// How an IOMMU is told of memory.
impl DmaMemory {
    /// Maps it in a type 1 container.
    pub(crate) fn map_in_container(
        &self,
        container: &VfioContainer,
        iova: u64,
        access: Access,
    ) -> Result<(), Errno> {
        // SAFETY: nothing makes a reference to the contents, by the contract of `new`; the pages are
        // pinned while they are mapped.
        unsafe { vfio_dma::map(container, iova, self.address(), self.size(), access) }
    }

    /// Maps it in an I/O address space of iommufd.
    pub(crate) fn map_in_ioas(
        &self,
        iommufd: BorrowedFd<'_>,
        ioas: u32,
        iova: u64,
        access: Access,
    ) -> Result<(), Errno> {
        // SAFETY: as above.
        unsafe { iommufd::map(iommufd, ioas, iova, self.address(), self.size(), access) }
    }
}

impl fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMemory({:#x}..{:#x})", self.address(), self.address() + self.size())
    }
}
