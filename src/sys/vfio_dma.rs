//! The ioctls of a type 1 container: which memory its devices reach, and at which addresses.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
};
use vfio_ioctls::VfioContainer;

use super::mm::{Access, Shareable};

type Result<T> = std::result::Result<T, Errno>;

mod raw {
    use super::*;

    nix::ioctl_readwrite_bad!(
        get_info,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 12),
        vfio_iommu_type1_info
    );
    nix::ioctl_write_ptr_bad!(
        map,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 13),
        vfio_iommu_type1_dma_map
    );
    nix::ioctl_readwrite_bad!(
        unmap,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 14),
        vfio_iommu_type1_dma_unmap
    );
}

/// `VFIO_IOMMU_GET_INFO`: the reply's bytes, a `vfio_iommu_type1_info` and its capabilities.
pub(crate) fn info(container: &VfioContainer) -> Result<Vec<u8>> {
    super::vfio::info_reply(size_of::<vfio_iommu_type1_info>(), |words| {
        // SAFETY: the buffer is as long as its argsz says.
        unsafe { raw::get_info(container.as_raw_fd(), words.as_mut_ptr().cast()) }
    })
}

/// `VFIO_IOMMU_MAP_DMA`: pins the memory's pages and lets the container's devices reach them at
/// `iova`. Addresses and size are multiples of the IOMMU's page size.
pub(crate) fn map(
    container: &VfioContainer,
    iova: u64,
    memory: Shareable,
    access: Access,
) -> Result<()> {
    let flags = match access {
        Access::ReadOnly => VFIO_DMA_MAP_FLAG_READ,
        Access::ReadWrite => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
    };
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags,
        vaddr: memory.address as u64,
        iova,
        size: memory.size as u64,
    };
    // SAFETY: the kernel reads the structure; devices may reach the memory.
    unsafe { raw::map(container.as_raw_fd(), &map) }.map(drop)
}

/// `VFIO_IOMMU_UNMAP_DMA`: returns how many bytes were unmapped, which may be fewer than `size`.
pub(crate) fn unmap(container: &VfioContainer, iova: u64, size: u64) -> Result<u64> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
        flags: 0,
        iova,
        size,
        ..vfio_iommu_type1_dma_unmap::default()
    };
    // SAFETY: the structure is as long as its argsz says.
    unsafe { raw::unmap(container.as_raw_fd(), &mut unmap) }?;
    Ok(unmap.size)
}
