//! Dma-bufs of BARs: how a device's memory is named to iommufd, and to others in the kernel.

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::space::Access;
use crate::sys::{self, vfio_feature};
use crate::transport::RegionInfo;

/// How a window is reached by another device without a dma-buf.
pub(super) const BY_GROUP: &str =
    "open the device that is to reach it by its group: Vfio::options().by_group()";

/// A dma-buf of `range` of a region, which errors call `name`.
pub(super) fn export(
    device: BorrowedFd<'_>,
    index: u32,
    info: &RegionInfo,
    range: Range<u64>,
    access: Access,
    name: &str,
) -> Result<OwnedFd> {
    check(info, &range, sys::page_size() as u64, name)?;
    vfio_feature::dma_buf(device, index, range.clone(), access)
        .map_err(|errno| refused(errno, object(&range, name)))
}

fn object(range: &Range<u64>, name: &str) -> String {
    format!("{:#x}..{:#x} of {name}", range.start, range.end)
}

/// Checks what the kernel would answer EINVAL or ENODEV to.
fn check(info: &RegionInfo, range: &Range<u64>, page: u64, name: &str) -> Result<()> {
    let error = |kind| Error::new(kind, EXPORT, object(range, name));
    if !info.mappable {
        return Err(error(ErrorKind::NotMappable)
            .with_reason("the kernel does not allow mapping the region")
            .with_advice("choose a BAR that can be mapped: Region::layout"));
    }
    if range.is_empty() || range.end > info.size {
        return Err(error(ErrorKind::OutOfRange)
            .with_reason(format!(
                "a dma-buf consists of whole pages, and the region has {:#x} bytes",
                info.size
            ))
            .with_advice(format!(
                "choose a range that ends inside; or, for peer-to-peer, {BY_GROUP}"
            )));
    }
    if !(range.start | range.end).is_multiple_of(page) {
        return Err(error(ErrorKind::Unaligned)
            .with_reason("a dma-buf consists of whole pages")
            .with_advice(format!("choose multiples of {page:#x}")));
    }
    Ok(())
}

const EXPORT: &str = "make a dma-buf of";

#[cold]
fn refused(errno: Errno, object: String) -> Error {
    let error = Error::os(errno, EXPORT, object);
    match errno {
        Errno::ENOTTY => error
            .with_reason("the kernel makes none (Linux 6.19, CONFIG_VFIO_PCI_DMABUF)")
            .with_advice(BY_GROUP),
        Errno::EOPNOTSUPP => {
            error.with_reason("the device's driver makes none").with_advice(BY_GROUP)
        }
        // The caller can tell the two apart, and this cannot.
        Errno::ENODEV => error
            .into_kind(ErrorKind::Os)
            .with_reason("the device is being removed, or its driver could not claim the BAR")
            .with_advice(
                "if Device::gone says no, unload what has claimed the BAR: /proc/iomem names it",
            ),
        Errno::EINVAL => error
            .into_kind(ErrorKind::Unsupported)
            .with_reason("the BAR is no memory that other devices can reach")
            .with_advice(BY_GROUP),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_not_of_whole_pages_inside_is_refused() {
        let mut info = RegionInfo::trapped(0x4000);
        let check = |info: &RegionInfo, range: Range<u64>| {
            super::check(info, &range, 0x1000, "bar 2 of test").map_err(|error| {
                assert!(!error.advice().is_empty(), "{error}");
                assert!(error.to_string().contains("bar 2 of test"), "{error}");
                error.kind()
            })
        };
        assert_eq!(check(&info, 0..0x1000), Err(ErrorKind::NotMappable));
        info.mappable = true;
        assert_eq!(check(&info, 0..0x4000), Ok(()));
        assert_eq!(check(&info, 0x3000..0x4000), Ok(()));
        for range in [
            0..0x5000,
            0x4000..0x5000,
            0x1000..0x1000,
            Range { start: 0x2000, end: 0x1000 },
            0..u64::MAX,
        ] {
            assert_eq!(check(&info, range.clone()), Err(ErrorKind::OutOfRange), "{range:x?}");
        }
        for range in [0x800..0x1000, 0..0x800] {
            assert_eq!(check(&info, range.clone()), Err(ErrorKind::Unaligned), "{range:x?}");
        }
        // A BAR that is smaller than a page.
        info.size = 0x100;
        assert_eq!(check(&info, 0..0x1000), Err(ErrorKind::OutOfRange));
    }

    #[test]
    fn each_refusal_of_a_dma_buf_says_why() {
        for (errno, kind, advice) in [
            (Errno::ENOTTY, ErrorKind::Unsupported, "by_group()"),
            (Errno::EOPNOTSUPP, ErrorKind::Unsupported, "by_group()"),
            (Errno::EINVAL, ErrorKind::Unsupported, "by_group()"),
            // It is no proof that the device is gone: a BAR that is not claimed is refused likewise.
            (Errno::ENODEV, ErrorKind::Os, "Device::gone"),
            (Errno::ENOMEM, ErrorKind::Os, ""),
        ] {
            let error = refused(errno, "it".to_owned());
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(error.errno(), Some(errno as i32), "{error}");
            assert!(error.advice().contains(advice), "{error}");
        }
    }
}
