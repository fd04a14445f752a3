//! DMA, through a type 1 container or iommufd.

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
use super::locked::{self, Counter};
use super::{Confinement, noiommu};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::{self, vfio_dma};
use crate::transport::answer::Answer;
use crate::transport::refusal::refused;
use crate::transport::{AddressSpaceId, DmaLimits};

/// What a device's addresses are translated by.
pub(super) enum AddressSpace {
    /// The container of its group.
    Group(Arc<Group>),
    /// An address space of iommufd.
    Ioas(Arc<Ioas>),
    /// That of whoever opened the device.
    Elsewhere,
}

impl AddressSpace {
    /// What confines the device, where that is known.
    pub(super) fn confinement(&self) -> Option<Confinement> {
        match self {
            Self::Group(group) => Some(group.confinement()),
            Self::Ioas(ioas) => Some(ioas.confinement()),
            Self::Elsewhere => None,
        }
    }

    /// Which one it is; `None` where whoever opened it knows.
    pub(super) fn id(&self) -> Option<AddressSpaceId> {
        match self {
            Self::Group(group) => Some(group.address_space()),
            Self::Ioas(ioas) => Some(ioas.address_space()),
            Self::Elsewhere => None,
        }
    }

    /// What the IOMMU maps.
    pub(super) fn limits(&self, name: &str) -> Result<DmaLimits> {
        let failed = |errno| Error::os(errno, "query the IOMMU of", name);
        match self {
            Self::Group(group) => {
                let bytes = vfio_dma::info(container(group, name)?).map_err(failed)?;
                read(&Answer::new(&bytes, "IOMMU information"))
            }
            Self::Ioas(ioas) => {
                let (ranges, alignment) = ioas.ranges().map_err(failed)?;
                let limits = by_address(ranges, alignment.max(sys::page_size() as u64));
                Ok(DmaLimits { translated: ioas.confinement() == Confinement::Iommu, ..limits })
            }
            Self::Elsewhere => Err(elsewhere(name)),
        }
    }

    /// What counts against the limit on locked memory together with what it maps.
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
    ) -> Result<()> {
        let done = match self {
            Self::Group(group) => {
                vfio_dma::map(container(group, name)?, iova, memory.shareable(), access)
            }
            Self::Ioas(ioas) => ioas.map(iova, memory, access),
            Self::Elsewhere => return Err(elsewhere(name)),
        };
        done.map_err(|errno| self.refused(errno, object(iova, memory.size() as u64)))
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

    /// The address by which the device reaches the `size` bytes that are mapped at `iova`.
    pub(super) fn device_address(&self, iova: u64, size: u64) -> Result<u64> {
        let Self::Ioas(ioas) = self else { return Ok(iova) };
        if ioas.confinement() == Confinement::Iommu {
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
            .because(format!(
                "no IOMMU makes them contiguous for the device, and only the first {contiguous:#x} are"
            ))
            .remedy(
                "map each page by itself, or ask for huge pages: BufferRequest::huge_pages, \
                 vm.nr_hugepages",
            ))
    }

    #[cold]
    fn refused(&self, errno: Errno, object: String) -> Error {
        let error = refused(errno, object);
        match (errno, self) {
            // Why is said where what is locked is counted.
            (Errno::ENOMEM, _) => error
                .into_kind(ErrorKind::LockedMemory)
                .remedy("raise it: ulimit -l, or LimitMEMLOCK= of the unit"),
            (Errno::ENOSPC, Self::Group(_)) => {
                full(error).because("the container has no room for another mapping")
            }
            (Errno::EFAULT, Self::Ioas(_)) => error.because(
                "a part of the memory is not there, or is a device's, which iommufd does not map by address",
            ).remedy("for peer-to-peer, open both devices by their groups: Vfio::open_by_group"),
            (Errno::EFAULT, _) => {
                error.because("a part of the memory is not there, or cannot be pinned")
            }
            _ => error,
        }
    }
}

pub(super) fn object(iova: u64, size: u64) -> String {
    format!("{size:#x} bytes at IOVA {iova:#x}")
}

/// An unmap is done when the kernel has unmapped all that was asked for, and not less: what it has left
/// the device still reaches, and the next mapping there answers EEXIST.
#[inline]
fn whole(done: std::result::Result<u64, Errno>, iova: u64, size: u64) -> Result<()> {
    if done == Ok(size) { Ok(()) } else { Err(not_whole(done, object(iova, size))) }
}

#[cold]
fn not_whole(done: std::result::Result<u64, Errno>, object: String) -> Error {
    match done {
        Ok(done) => Error::new(ErrorKind::Os, "unmap from DMA", object)
            .because(format!("the kernel unmapped {done:#x} bytes")),
        Err(errno) => Error::os(errno, "unmap from DMA", object),
    }
}

/// There is no room for another mapping beside `mapped`.
pub(super) fn too_many(mapped: usize, size: usize, iova: u64) -> Error {
    full(Error::new(
        ErrorKind::TooManyMappings,
        "map for DMA",
        format!("{size:#x} bytes at IOVA {iova:#x}"),
    ))
    .because(format!("the container has {mapped} mappings, and no room for another"))
}

fn full(error: Error) -> Error {
    error.remedy(
        "unmap some; or, before it is opened, raise the limit: \
         /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
    )
}

fn container<'g>(group: &'g Group, name: &str) -> Result<&'g VfioContainer> {
    group.container().ok_or_else(|| noiommu::no_addresses(name))
}

#[cold]
fn elsewhere(name: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "do DMA with", name)
        .because("its device file was opened elsewhere, where its address space is")
        .remedy("map memory where the device was opened")
}

/// The kernel finds memory by its address in this process.
fn by_address(ranges: Vec<RangeInclusive<u64>>, page_size: u64) -> DmaLimits {
    DmaLimits { by_file: false, ..DmaLimits::new(ranges, page_size) }
}

fn read(answer: &Answer<'_>) -> Result<DmaLimits> {
    let flags = answer.u32(offset_of!(vfio_iommu_type1_info, flags))?;
    let page_sizes = answer.u64(offset_of!(vfio_iommu_type1_info, iova_pgsizes))?;
    let page_size = match page_sizes.trailing_zeros() {
        shift @ 0..64 if flags & VFIO_IOMMU_INFO_PGSIZES != 0 => 1 << shift,
        _ => sys::page_size() as u64,
    };
    // A kernel before 5.4 does not say which addresses can be mapped.
    let mut limits = by_address(vec![0..=u64::MAX], page_size);
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(limits);
    }
    let first = answer.u32(offset_of!(vfio_iommu_type1_info, cap_offset))?;
    for (id, at) in answer.capabilities(first, size_of::<vfio_iommu_type1_info>())? {
        match id {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                const HEADER: usize = size_of::<vfio_iommu_type1_info_cap_iova_range>();
                let count = offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas);
                let count = answer.u32(at + count)? as usize;
                limits.ranges = answer
                    .array(at + HEADER, size_of::<vfio_iova_range>(), count)?
                    .map(|range| Ok(answer.u64(range)?..=answer.u64(range + 8)?))
                    .collect::<Result<_>>()?;
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                let available = offset_of!(vfio_iommu_type1_info_dma_avail, avail);
                limits.mappings = Some(answer.u32(at + available)?);
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
    fn ranges_page_size_and_what_is_left_are_read() {
        // argsz, flags, page sizes, cap_offset, pad; then ranges at 24, mappings at 56.
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
        let limits = read(&Answer::new(&bytes, "test")).unwrap();
        assert_eq!(limits.ranges, [0x1000..=0xffff]);
        assert_eq!((limits.page_size, limits.mappings), (4096, Some(65535)));
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
    fn an_answer_that_counts_more_ranges_than_it_holds_is_malformed() {
        let bytes = words(&[40, 3, 0x1000, 0, 24, 0, 1, 0, u32::MAX, 0]);
        let error = read(&Answer::new(&bytes, "test")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }
}
