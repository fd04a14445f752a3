//! Memory that can be mapped for DMA.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::Result;
use crate::sys::file;
#[cfg(feature = "vfio-user")]
use crate::sys::fork;
use crate::sys::mm::{self, Access, Shareable, ShareableFile};

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

/// Makes a dma-buf of memory that is a device's, from the memory's owner.
pub(crate) type Export = fn(&(dyn Any + Send + Sync), Access) -> Result<OwnedFd>;

/// What happens to the pages when the owner is dropped, and when the kernel maps them for DMA.
#[derive(Clone, Copy)]
enum Pages {
    /// The owner may reuse them, so the memory must be kept while a device reaches them.
    OfOwner,
    /// They are unmapped and returned to the kernel, which keeps the pages that it has pinned.
    Own,
    /// They are a device's. The kernel maps them for DMA without locking or keeping them.
    OfDevice(Export),
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
    pub(crate) fn of_device(self, export: Export) -> Self {
        Self { pages: Pages::OfDevice(export), ..self }
    }

    /// The same memory, whose owner unmaps the pages when it is dropped, and gives them to no one else.
    pub(crate) fn own(self) -> Self {
        Self { pages: Pages::Own, ..self }
    }

    /// Whether the kernel keeps the pages that it has mapped for DMA after the owner is dropped.
    #[inline]
    pub(crate) fn is_kept_by_kernel(&self) -> bool {
        matches!(self.pages, Pages::Own)
    }

    /// What keeps it mapped.
    #[inline]
    pub(crate) fn owner(&self) -> &(dyn Any + Send + Sync) {
        &*self.range.owner
    }

    /// How many bytes count as locked when the kernel maps it for DMA.
    #[inline]
    pub(crate) fn lockable(&self) -> u64 {
        if matches!(self.pages, Pages::OfDevice(_)) { 0 } else { self.size() as u64 }
    }

    /// The same memory without its file.
    pub(crate) fn without_file(self) -> Self {
        if self.range.file.is_none() {
            return self;
        }
        let Range { address, size, ref owner, .. } = *self.range;
        let range = Arc::new(Range { address, size, file: None, owner: owner.clone() });
        Self { range, ..self }
    }

    /// The range to map for DMA. The caller keeps this memory until it is unmapped from DMA, unless the
    /// [kernel keeps it](Self::is_kept_by_kernel).
    #[inline]
    pub(crate) fn shareable(&self) -> Shareable {
        // SAFETY: by the contract of `new` no reference to the contents exists while the owner lives, and
        // the caller keeps the owner. Otherwise the kernel keeps the pages and gives them to no one else.
        unsafe { Shareable::new(self.address(), self.size()) }
    }

    /// Allocates its pages through its mapping in this process, as mapping it by its address for DMA would.
    ///
    /// `IOMMU_IOAS_MAP_FILE` knows no mapping: `memfd_alloc_folio` (Linux 6.13) allocates missing pages of hugetlbfs
    /// where its caller may allocate, and those of tmpfs without regard to `MADV_HUGEPAGE`. Own memory has no such rules.
    /// Whether the memory can be mapped does not depend on this, so the call that maps it reports what is wrong.
    pub(crate) fn allocate(&self) {
        if !self.is_kept_by_kernel() {
            let _ = mm::populate(self.shareable());
        }
    }

    /// The pages of its file to map for DMA, with the same duty as [`shareable`](Self::shareable). `None` if it has
    /// no file, or may not be written through it.
    #[inline]
    pub(crate) fn shareable_file(&self, access: Access) -> Option<ShareableFile<'_>> {
        let (file, start) = self.file()?;
        // The kernel does not check it. Own memory was made for devices to write.
        if access == Access::ReadWrite && !self.is_kept_by_kernel() && !file::is_writable(file) {
            return None;
        }
        // SAFETY: by the contract of `new` they are the pages at the address, and if they are not this memory any
        // more, they never become Rust's again.
        Some(unsafe { ShareableFile::new(file, start, self.size()) })
    }

    /// The pages of a dma-buf that [`dma_buf`](Self::dma_buf) has made, for iommufd to map. `None` for any other file,
    /// or if it may not be written: a transport may have been written by anyone, and iommufd would map the pages of an
    /// ordinary file, too, without a check that the process may write them.
    pub(crate) fn shareable_dma_buf<'f>(
        &self,
        dma_buf: &'f OwnedFd,
        access: Access,
    ) -> Option<ShareableFile<'f>> {
        if !file::is_dma_buf(dma_buf) || access == Access::ReadWrite && !file::is_writable(dma_buf)
        {
            return None;
        }
        // SAFETY: iommufd maps no dma-bufs but those of vfio-pci (`vfio_pci_dma_buf_iommufd_map`, Linux 6.19). So the
        // pages are a device's, and no reference to device memory is ever made.
        Some(unsafe { ShareableFile::new(dma_buf.as_fd(), 0, self.size()) })
    }

    /// The first address.
    pub fn address(&self) -> usize {
        self.range.address
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.range.size
    }

    /// A dma-buf of the memory, if it is a device's: a new one at each call. `None` for other memory. Its first byte
    /// is the memory's. See [`Window::dma_buf`](crate::Window::dma_buf).
    ///
    /// It is for a [`Transport`](crate::Transport) that maps memory for DMA, and cannot map a device's by address.
    ///
    /// # Errors
    /// Those of [`Transport::dma_buf`](crate::Transport::dma_buf); `ReadOnly` if the memory may not be written.
    pub fn dma_buf(&self, access: Access) -> Option<Result<OwnedFd>> {
        match self.pages {
            Pages::OfDevice(export) => Some(export(&*self.range.owner, access)),
            Pages::OfOwner | Pages::Own => None,
        }
    }

    /// The file that it maps, and the offset of its first byte in the file, in bytes.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.range.file.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }
}

#[cfg(test)]
impl DmaMemory {
    /// Memory with a file, for tests that neither map it for DMA nor access it.
    pub(crate) fn never_mapped(file: Arc<OwnedFd>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        // SAFETY: nothing is ever mapped there, and no test accesses it.
        unsafe { Self::new(0x10_0000, 0x1000, Some((file, 0)), owner) }
    }
}

impl fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMemory({:#x}..{:#x})", self.address(), self.address() + self.size())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::os::fd::AsRawFd;

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::space::KernelVersion;

    fn no_dma_buf(_: &(dyn Any + Send + Sync), access: Access) -> Result<OwnedFd> {
        Err(Error::new(ErrorKind::Unsupported, format!("export {access:?}"), "it"))
    }

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
        assert!(memory.dma_buf(Access::ReadOnly).is_none());
        let of_device = memory.clone().of_device(no_dma_buf);
        assert_eq!(locked_and_kept(&of_device), (0, false));
        let refused = of_device.dma_buf(Access::ReadOnly).unwrap().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        let own = memory.own().without_file();
        assert_eq!((locked_and_kept(&own), own.file().is_none()), ((0x2000, true), true));
    }

    /// Its mapping says where the pages lie and how large they are; the file does not.
    #[test]
    fn memory_of_others_is_allocated_through_its_mapping() {
        const SIZE: usize = 0x10_0000;
        let allocated = |file: &OwnedFd| nix::sys::stat::fstat(file).unwrap().st_blocks * 512;
        // What can only be read is allocated, too.
        for prot in [ProtFlags::PROT_READ, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE] {
            let file = Arc::new(file::memory_file("vfio-remap-test", SIZE as u64).unwrap());
            let size = NonZeroUsize::new(SIZE).unwrap();
            // SAFETY: the kernel chooses an unused range.
            let at = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
            let part = Some((file.clone(), 0));
            // SAFETY: the range stays mapped until the end of the test, and nothing accesses it.
            let memory = unsafe { DmaMemory::new(at.addr().get(), SIZE, part, Arc::new(())) };
            memory.clone().own().allocate();
            assert_eq!(allocated(&file), 0, "own memory has no such rules");
            memory.allocate();
            // A kernel before 5.14 allocates nothing, and maps no files for DMA.
            let allocates = KernelVersion::running() >= KernelVersion::new(5, 14);
            assert_eq!(allocated(&file), if allocates { SIZE as i64 } else { 0 });
            // SAFETY: the test made it, and nothing uses it any more.
            unsafe { munmap(at, SIZE) }.unwrap();
        }
    }

    /// iommufd would map the pages of the file, and let the device write them.
    #[test]
    fn a_file_that_is_no_dma_buf_is_not_mapped_as_one() {
        let file = file::memory_file("vfio-remap-test", 0x1000).unwrap();
        // SAFETY: the memory is never mapped or accessed.
        let memory = unsafe { DmaMemory::new(0x10_0000, 0x1000, None, Arc::new(())) };
        let memory = memory.of_device(no_dma_buf);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            assert!(memory.shareable_dma_buf(&file, access).is_none());
        }
    }

    /// The kernel would let a device write to a file that this process may only read.
    #[test]
    fn a_file_is_written_by_a_device_only_if_the_process_may() {
        let sealable = || {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let file = memfd_create("vfio-remap-test", flags).unwrap();
            nix::unistd::ftruncate(&file, 0x1000).unwrap();
            file
        };
        let plain = sealable();
        let read_only: OwnedFd =
            std::fs::File::open(format!("/proc/self/fd/{}", plain.as_raw_fd())).unwrap().into();
        let sealed = [SealFlag::F_SEAL_WRITE, SealFlag::F_SEAL_FUTURE_WRITE].map(|seal| {
            let file = sealable();
            fcntl(&file, FcntlArg::F_ADD_SEALS(seal)).unwrap();
            (file, false)
        });
        let all = [(plain, true), (read_only, false)].into_iter().chain(sealed);
        for (file, is_writable) in all {
            // SAFETY: the memory is never mapped or accessed.
            let memory = unsafe {
                DmaMemory::new(0x10_0000, 0x1000, Some((Arc::new(file), 0)), Arc::new(()))
            };
            assert!(memory.shareable_file(Access::ReadOnly).is_some());
            assert_eq!(memory.shareable_file(Access::ReadWrite).is_some(), is_writable);
            assert!(memory.clone().own().shareable_file(Access::ReadWrite).is_some());
            assert!(memory.without_file().shareable_file(Access::ReadOnly).is_none());
        }
    }
}
