//! How memory gets into iommufd: by a dma-buf if it is a device's, by its file if it has one, and otherwise by its
//! address.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::cdev::Ioas;
use super::dma_buf::BY_GROUP;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory, KernelVersion};
use crate::sys::file;
use crate::transport::MappedBy;

type Done<T = ()> = std::result::Result<T, Errno>;

/// Whether the kernel has `IOMMU_IOAS_MAP_FILE` (Linux 6.13), as far as is known: until it has answered ENOTTY.
pub(super) struct Files(AtomicBool);

/// What is known about the kernel that runs.
pub(super) static FILES: Files = Files::unknown();

impl Files {
    const fn unknown() -> Self {
        Self(AtomicBool::new(true))
    }

    pub(super) fn may_be_mapped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Maps memory by its file, or by its address if the kernel does not map files, or not this one: it maps those on
    /// tmpfs and hugetlbfs.
    fn map(
        &self,
        by_file: Option<impl FnOnce() -> Done>,
        by_address: impl FnOnce() -> Done,
    ) -> Done<MappedBy> {
        if let Some(by_file) = by_file.filter(|_| self.may_be_mapped()) {
            match by_file() {
                Ok(()) => return Ok(MappedBy::File),
                Err(Errno::ENOTTY) => self.0.store(false, Ordering::Relaxed),
                // By address it fails, too, if the IOVA is the reason.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {}
                Err(errno) => return Err(errno),
            }
        }
        by_address().map(|()| MappedBy::Address)
    }
}

/// Whether huge pages that `IOMMU_IOAS_MAP_FILE` allocates are zeroed: from Linux 6.18 on.
///
/// Pages of a file that nobody has touched are allocated when they are mapped for DMA. Up to 6.17
/// `memfd_alloc_folio` did not zero huge ones (de8798965fd0 does; not observed, found in the source): the process and
/// its device could read what others had left in them, and buffers would not be zero. A fault zeroes them, so on such
/// kernels files on hugetlbfs are mapped by address.
fn huge_pages_are_zeroed(kernel: KernelVersion) -> bool {
    kernel >= KernelVersion::new(6, 18)
}

impl Ioas {
    /// Maps memory that is not a device's.
    pub(super) fn map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Done<MappedBy> {
        let file = if FILES.may_be_mapped() { memory.shareable_file(access) } else { None };
        let huge = || memory.file().is_some_and(|(file, _)| file::is_hugetlb(file));
        let file = file.filter(|_| huge_pages_are_zeroed(KernelVersion::running()) || !huge());
        let by_file = file.map(|file| {
            move || {
                memory.allocate();
                self.map_file(iova, file, access)
            }
        });
        FILES.map(by_file, || self.map_address(iova, memory.shareable(), access))
    }

    /// Maps memory of a device by its dma-buf. `refused` is the error of an ioctl of iommufd.
    pub(super) fn map_device(
        &self,
        iova: u64,
        memory: &DmaMemory,
        access: Access,
        dma_buf: Result<OwnedFd>,
        refused: impl Fn(Errno) -> Error,
    ) -> Result<MappedBy> {
        let by_dma_buf = dma_buf.and_then(|dma_buf| {
            let pages =
                memory.shareable_dma_buf(&dma_buf, access).ok_or_else(|| no_dma_buf(iova))?;
            self.map_file(iova, pages, access)
                .map_err(|errno| dma_buf_refused(errno, refused(errno)))
        });
        choose(by_dma_buf, || self.map_address(iova, memory.shareable(), access), refused)
    }
}

/// Maps memory of a device by its address if there is no dma-buf: what a driver other than vfio-pci maps may be
/// ordinary pages.
fn choose(
    by_dma_buf: Result<()>,
    by_address: impl FnOnce() -> Done,
    refused: impl Fn(Errno) -> Error,
) -> Result<MappedBy> {
    match by_dma_buf {
        Ok(()) => Ok(MappedBy::DmaBuf),
        Err(error) if error.kind() == ErrorKind::Unsupported => match by_address() {
            Ok(()) => Ok(MappedBy::Address),
            // They are a device's.
            Err(Errno::EFAULT) => Err(error),
            Err(errno) => Err(refused(errno)),
        },
        Err(error) => Err(error),
    }
}

#[cold]
fn no_dma_buf(iova: u64) -> Error {
    Error::new(ErrorKind::Unsupported, "map for DMA", format!("a window at IOVA {iova:#x}"))
        .with_reason(
            "what the window's transport made of it is no dma-buf, or one that may only be read",
        )
        .with_advice(format!("make Transport::dma_buf answer that of Vfio; or, {BY_GROUP}"))
}

#[cold]
fn dma_buf_refused(errno: Errno, error: Error) -> Error {
    match errno {
        Errno::ENOTTY | Errno::EOPNOTSUPP => error
            .into_kind(ErrorKind::Unsupported)
            .with_reason("the kernel's iommufd maps no dma-bufs of BARs (Linux 6.19)")
            .with_advice(BY_GROUP),
        Errno::ENODEV => error
            .into_kind(ErrorKind::Os)
            .with_reason(
                "the device of the BAR has its memory decoding off, sleeps, or is being reset or closed",
            )
            .with_advice("enable it first: Config::set_memory_decoding"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn error(errno: Errno) -> Error {
        Error::os(errno, "map for DMA", "it")
    }

    #[test]
    fn a_kernel_that_maps_no_files_is_asked_once() {
        let (files, asked) = (Files::unknown(), Cell::new(0));
        for _ in 0..3 {
            let by_file = || {
                asked.set(asked.get() + 1);
                Err(Errno::ENOTTY)
            };
            assert_eq!(files.map(Some(by_file), || Ok(())), Ok(MappedBy::Address));
            assert!(!files.may_be_mapped());
        }
        assert_eq!(asked.get(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_mapped_is_mapped_by_its_address() {
        let files = Files::unknown();
        let never = || -> Done { panic!("it was mapped by its file") };
        for errno in [Errno::EINVAL, Errno::EOPNOTSUPP] {
            assert_eq!(files.map(Some(|| Err(errno)), || Ok(())), Ok(MappedBy::Address));
            assert_eq!(files.map(Some(|| Err(errno)), || Err(Errno::EFAULT)), Err(Errno::EFAULT));
            assert!(files.may_be_mapped());
        }
        assert_eq!(files.map(Some(|| Ok(())), never), Ok(MappedBy::File));
        // The address is taken, or no more memory can be locked.
        for errno in [Errno::EEXIST, Errno::ENOMEM] {
            assert_eq!(files.map(Some(|| Err(errno)), never), Err(errno));
        }
        assert_eq!(files.map(None::<fn() -> Done>, || Ok(())), Ok(MappedBy::Address));
    }

    #[test]
    fn huge_pages_are_mapped_by_file_where_they_are_zeroed() {
        for (major, minor, zeroed) in [(6, 13, false), (6, 17, false), (6, 18, true), (7, 3, true)]
        {
            assert_eq!(huge_pages_are_zeroed(KernelVersion::new(major, minor)), zeroed);
        }
    }

    #[test]
    fn memory_of_a_device_without_dma_buf_names_the_way_by_group() {
        let no_dma_buf = || Err(dma_buf_refused(Errno::ENOTTY, error(Errno::ENOTTY)));
        assert_eq!(choose(no_dma_buf(), || Ok(()), error).unwrap(), MappedBy::Address);
        let refused = choose(no_dma_buf(), || Err(Errno::EFAULT), error).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(refused.advice().contains("by_group()"), "{refused}");
        let taken = choose(no_dma_buf(), || Err(Errno::EEXIST), error).unwrap_err();
        assert_eq!(taken.errno(), Some(libc::EEXIST), "{taken}");
    }

    #[test]
    fn what_is_no_dma_buf_is_mapped_by_its_address_or_not_at_all() {
        assert_eq!(choose(Err(no_dma_buf(0x1000)), || Ok(()), error).unwrap(), MappedBy::Address);
        let refused = choose(Err(no_dma_buf(0x1000)), || Err(Errno::EFAULT), error).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(refused.advice().contains("by_group()"), "{refused}");
    }

    #[test]
    fn a_revoked_dma_buf_is_mapped_by_nothing_else() {
        let never = || -> Done { panic!("it was mapped by its address") };
        for errno in [Errno::ENODEV, Errno::EEXIST] {
            let revoked = choose(Err(dma_buf_refused(errno, error(errno))), never, error);
            assert_eq!(revoked.unwrap_err().errno(), Some(errno as i32));
        }
        let off = dma_buf_refused(Errno::ENODEV, error(Errno::ENODEV));
        assert_eq!(off.kind(), ErrorKind::Os);
        assert!(off.advice().contains("set_memory_decoding"), "{off}");
        assert_eq!(choose(Ok(()), never, error).unwrap(), MappedBy::DmaBuf);
    }
}
