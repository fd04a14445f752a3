//! DMA through a type 1 container or iommufd.

use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::sync::Arc;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, vfio_iommu_type1_info, vfio_iommu_type1_info_cap_iova_range,
    vfio_iommu_type1_info_dma_avail, vfio_iova_range,
};
use vfio_ioctls::VfioContainer;

use super::cdev::Ioas;
use super::group::Group;
use super::ioas_map::FILES;
use super::locked::{self, Counter};
use super::{IommuMode, noiommu};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::{self, vfio_dma};
use crate::transport::dma_error::map_refused;
use crate::transport::info_reply::InfoReply;
use crate::transport::{AddressSpaceId, DmaLimits, MappedBy};

/// The address space of a device for DMA.
pub(super) enum AddressSpace {
    /// That of its group's container.
    Group(Arc<Group>),
    /// An address space of iommufd.
    Ioas(Arc<Ioas>),
    /// Not known: other code opened the device.
    Elsewhere,
}

impl AddressSpace {
    /// Whether an IOMMU confines the device, if that is known.
    pub(super) fn iommu_mode(&self) -> Option<IommuMode> {
        match self {
            Self::Group(group) => Some(group.iommu_mode()),
            Self::Ioas(ioas) => Some(ioas.iommu_mode()),
            Self::Elsewhere => None,
        }
    }

    /// Its ID; `None` if other code opened the device.
    pub(super) fn id(&self) -> Option<AddressSpaceId> {
        match self {
            Self::Group(group) => Some(group.address_space()),
            Self::Ioas(ioas) => Some(ioas.address_space()),
            Self::Elsewhere => None,
        }
    }

    /// What can be mapped.
    pub(super) fn limits(&self, name: &str) -> Result<DmaLimits> {
        let failed = |errno| Error::os(errno, "query the IOMMU of", name);
        match self {
            Self::Group(group) => {
                let bytes = vfio_dma::info(container(group, name)?).map_err(failed)?;
                read(&InfoReply::new(&bytes, "IOMMU information"))
            }
            Self::Ioas(ioas) => {
                let (ranges, alignment) = ioas.ranges().map_err(failed)?;
                let limits = by_address(ranges, alignment.max(sys::page_size() as u64));
                let translated = ioas.iommu_mode() == IommuMode::Iommu;
                Ok(DmaLimits { translated, maps_files: FILES.may_be_mapped(), ..limits })
            }
            Self::Elsewhere => Err(elsewhere(name)),
        }
    }

    /// The counter of locked memory that its mappings are added to.
    pub(super) fn counter(&self) -> &'static Counter {
        match self {
            Self::Group(_) | Self::Elsewhere => &locked::CONTAINERS,
            Self::Ioas(_) => &locked::IOMMUFD,
        }
    }

    /// Maps `memory` at `iova`.
    #[inline]
    pub(super) fn map(
        &self,
        iova: u64,
        memory: &DmaMemory,
        access: Access,
        name: &str,
    ) -> Result<MappedBy> {
        let refused = |errno| self.refused(errno, object(iova, memory.size() as u64));
        let done = match self {
            Self::Group(group) => {
                vfio_dma::map(container(group, name)?, iova, memory.shareable(), access)
                    .map(|()| MappedBy::Address)
            }
            Self::Ioas(ioas) => match memory.dma_buf(access) {
                None => ioas.map(iova, memory, access),
                Some(dma_buf) => return ioas.map_device(iova, memory, access, dma_buf, refused),
            },
            Self::Elsewhere => return Err(elsewhere(name)),
        };
        done.map_err(refused)
    }

    /// Unmaps exactly `size` bytes at `iova`.
    #[inline]
    pub(super) fn unmap(&self, iova: u64, size: u64, name: &str) -> Result<()> {
        let done = match self {
            Self::Group(group) => vfio_dma::unmap(container(group, name)?, iova, size),
            Self::Ioas(ioas) => ioas.unmap(iova, size),
            Self::Elsewhere => return Err(elsewhere(name)),
        };
        whole(done, iova, size)
    }

    /// The address that the device uses for the `size` bytes mapped at `iova`.
    pub(super) fn device_address(&self, iova: u64, size: u64) -> Result<u64> {
        let Self::Ioas(ioas) = self else { return Ok(iova) };
        if ioas.iommu_mode() == IommuMode::Iommu {
            return Ok(iova);
        }
        let object = || format!("{size:#x} bytes of memory");
        let (physical, contiguous) = ioas
            .physical(iova, size)
            .map_err(|errno| Error::os(errno, "find the physical address of", object()))?;
        if contiguous >= size {
            return Ok(physical);
        }
        Err(Error::new(ErrorKind::Unsupported, "map for DMA", object())
            .with_reason(format!(
                "no IOMMU makes them contiguous for the device, and only the first {contiguous:#x} bytes are \
                 physically contiguous"
            ))
            .with_advice(
                "map each page separately, or use huge pages: BufferRequest::huge_pages, sysctl \
                 vm.nr_hugepages",
            ))
    }

    #[cold]
    fn refused(&self, errno: Errno, object: String) -> Error {
        let error = map_refused(errno, object);
        match (errno, self) {
            // `Accounting` adds the reason.
            (Errno::ENOMEM, _) => error
                .into_kind(ErrorKind::LockedMemory)
                .with_advice("raise it: ulimit -l, or LimitMEMLOCK= of the unit"),
            (Errno::ENOSPC, Self::Group(_)) => {
                full(error).with_reason("the container has reached its limit on mappings")
            }
            (Errno::EFAULT, Self::Ioas(_)) => error.with_reason(
                "a part of the memory is not mapped, cannot be pinned, or is a device's, which iommufd does not \
                 map by address",
            ).with_advice("for peer-to-peer, map a window: Window::dma_memory"),
            (Errno::EFAULT, _) => {
                error.with_reason("a part of the memory is not mapped, or cannot be pinned")
            }
            _ => error,
        }
    }
}

pub(super) fn object(iova: u64, size: u64) -> String {
    format!("{size:#x} bytes at IOVA {iova:#x}")
}

/// Checks that the kernel has unmapped all bytes. If it has not, the device still reaches the rest, and
/// the next mapping there fails with EEXIST.
#[inline]
fn whole(done: std::result::Result<u64, Errno>, iova: u64, size: u64) -> Result<()> {
    if done == Ok(size) { Ok(()) } else { Err(not_whole(done, object(iova, size))) }
}

#[cold]
fn not_whole(done: std::result::Result<u64, Errno>, object: String) -> Error {
    match done {
        Ok(done) => Error::new(ErrorKind::Os, "unmap from DMA", object)
            .with_reason(format!("the kernel unmapped {done:#x} bytes")),
        Err(errno) => Error::os(errno, "unmap from DMA", object),
    }
}

/// The error if the container has reached its limit with `count` mappings.
pub(super) fn too_many(count: usize, size: usize, iova: u64) -> Error {
    full(Error::new(
        ErrorKind::TooManyMappings,
        "map for DMA",
        format!("{size:#x} bytes at IOVA {iova:#x}"),
    ))
    .with_reason(format!("the container has {count} mappings, which is its limit"))
}

fn full(error: Error) -> Error {
    error.with_advice(
        "unmap some; or raise the limit before the container is opened: \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
    )
}

fn container<'g>(group: &'g Group, name: &str) -> Result<&'g VfioContainer> {
    group.container().ok_or_else(|| noiommu::no_addresses(name))
}

#[cold]
fn elsewhere(name: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "do DMA with", name)
        .with_reason("other code opened its device file and has its address space")
        .with_advice("map memory in the program that opened the device")
}

/// Limits for the kernel's interfaces, which take memory by its address in this process, not by file.
fn by_address(ranges: Vec<RangeInclusive<u64>>, page_size: u64) -> DmaLimits {
    DmaLimits { by_file: false, ..DmaLimits::new(ranges, page_size) }
}

fn read(reply: &InfoReply<'_>) -> Result<DmaLimits> {
    let flags = reply.u32(offset_of!(vfio_iommu_type1_info, flags))?;
    let page_sizes = reply.u64(offset_of!(vfio_iommu_type1_info, iova_pgsizes))?;
    let page_size = match page_sizes.trailing_zeros() {
        shift @ 0..64 if flags & VFIO_IOMMU_INFO_PGSIZES != 0 => 1 << shift,
        _ => sys::page_size() as u64,
    };
    // A kernel before 5.4 does not report which IOVAs can be mapped.
    let mut limits = by_address(vec![0..=u64::MAX], page_size);
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(limits);
    }
    let first = reply.u32(offset_of!(vfio_iommu_type1_info, cap_offset))?;
    for (id, at) in reply.capabilities(first, size_of::<vfio_iommu_type1_info>())? {
        match id {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                const HEADER: usize = size_of::<vfio_iommu_type1_info_cap_iova_range>();
                let count = offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas);
                let count = reply.u32(at + count)? as usize;
                limits.ranges = reply
                    .array(at + HEADER, size_of::<vfio_iova_range>(), count)?
                    .map(|range| Ok(reply.u64(range)?..=reply.u64(range + 8)?))
                    .collect::<Result<_>>()?;
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                let available = offset_of!(vfio_iommu_type1_info_dma_avail, avail);
                limits.available_mappings = Some(reply.u32(at + available)?);
            }
            _ => {}
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn ranges_page_size_and_available_mappings_are_read() {
        // argsz, flags, page sizes, cap_offset, pad; then ranges at 24, available mappings at 56.
        let bytes = words(&[
            68,
            3,
            0x4020_1000,
            0,
            24,
            0, //
            1 | 1 << 16,
            56,
            1,
            0,
            0x1000,
            0,
            0xffff,
            0, //
            3 | 1 << 16,
            0,
            65535,
        ]);
        let limits = read(&InfoReply::new(&bytes, "test")).unwrap();
        assert_eq!(limits.ranges, [0x1000..=0xffff]);
        assert_eq!((limits.page_size, limits.available_mappings), (4096, Some(65535)));
    }

    #[test]
    fn an_unmap_of_fewer_bytes_than_were_mapped_is_an_error() {
        whole(Ok(0x2000), 0x1000, 0x2000).unwrap();
        for done in [0, 0x1000, 0x3000] {
            let error = whole(Ok(done), 0x1000, 0x2000).unwrap_err();
            let words = format!("0x2000 bytes at IOVA 0x1000: the kernel unmapped {done:#x} bytes");
            assert!(error.to_string().contains(&words), "{error}");
        }
        let error = whole(Err(Errno::EINVAL), 0x1000, 0x2000).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL));
    }

    #[test]
    fn a_reply_that_claims_more_ranges_than_it_holds_is_malformed() {
        let bytes = words(&[40, 3, 0x1000, 0, 24, 0, 1, 0, u32::MAX, 0]);
        let error = read(&InfoReply::new(&bytes, "test")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }
}
