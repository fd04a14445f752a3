//! The ioctls of `/dev/iommu` (`linux/iommufd.h`, Linux 6.2), and those that bind a device's own file to it
//! (`linux/vfio.h`, Linux 6.6).
//!
//! The structures are defined here because `vfio-bindings` has none of iommufd's. Each begins with its own
//! size; the kernel accepts shorter and longer ones.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_BIND_FLAG_TOKEN, VFIO_TYPE, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd,
};

use super::mm::{Access, Shareable, ShareableFile};

type Result<T> = std::result::Result<T, Errno>;

const FIXED_IOVA: u32 = 1;
const WRITEABLE: u32 = 2;
const READABLE: u32 = 4;

/// More ranges than any IOMMU has.
const MAX_RANGES: usize = 4096;

#[repr(C)]
#[derive(Default)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    id: u32,
}

#[repr(C)]
#[derive(Default)]
struct IovaRanges {
    size: u32,
    id: u32,
    count: u32,
    reserved: u32,
    ranges: u64,
    alignment: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasMap {
    size: u32,
    flags: u32,
    id: u32,
    reserved: u32,
    address: u64,
    length: u64,
    iova: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasMapFile {
    size: u32,
    flags: u32,
    id: u32,
    fd: i32,
    start: u64,
    length: u64,
    iova: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasUnmap {
    size: u32,
    id: u32,
    iova: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct NoIommuGetPa {
    size: u32,
    flags: u32,
    id: u32,
    reserved: u32,
    iova: u64,
    length: u64,
    physical: u64,
}

mod raw {
    use super::*;

    nix::ioctl_readwrite_bad!(ioas_alloc, request_code_none!(VFIO_TYPE, 0x81), IoasAlloc);
    nix::ioctl_readwrite_bad!(iova_ranges, request_code_none!(VFIO_TYPE, 0x84), IovaRanges);
    nix::ioctl_readwrite_bad!(ioas_map, request_code_none!(VFIO_TYPE, 0x85), IoasMap);
    nix::ioctl_readwrite_bad!(ioas_unmap, request_code_none!(VFIO_TYPE, 0x86), IoasUnmap);
    nix::ioctl_readwrite_bad!(ioas_map_file, request_code_none!(VFIO_TYPE, 0x8f), IoasMapFile);
    nix::ioctl_readwrite_bad!(noiommu_get_pa, request_code_none!(VFIO_TYPE, 0x95), NoIommuGetPa);
    nix::ioctl_readwrite_bad!(
        bind,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 18),
        vfio_device_bind_iommufd
    );
    nix::ioctl_readwrite_bad!(
        attach,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 19),
        vfio_device_attach_iommufd_pt
    );
}

/// `VFIO_DEVICE_BIND_IOMMUFD`, optionally with the VF token of an SR-IOV function (Linux 6.17; EINVAL
/// before).
pub(crate) fn bind(
    device: BorrowedFd<'_>,
    iommufd: BorrowedFd<'_>,
    token: Option<&[u8; 16]>,
) -> Result<()> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        flags: token.map_or(0, |_| VFIO_DEVICE_BIND_FLAG_TOKEN),
        iommufd: iommufd.as_raw_fd(),
        token_uuid_ptr: token.map_or(0, |token| token.as_ptr() as u64),
        ..vfio_device_bind_iommufd::default()
    };
    // SAFETY: the structure is as long as its argsz says; the kernel reads 16 bytes of the token.
    unsafe { raw::bind(device.as_raw_fd(), &mut bind) }.map(drop)
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: the device now uses the address space `ioas`.
pub(crate) fn attach(device: BorrowedFd<'_>, ioas: u32) -> Result<()> {
    // Later kernels extended the structure; this is its size in Linux 6.6.
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: (offset_of!(vfio_device_attach_iommufd_pt, pt_id) + size_of::<u32>()) as u32,
        pt_id: ioas,
        ..vfio_device_attach_iommufd_pt::default()
    };
    // SAFETY: the structure is at least as long as its argsz says.
    unsafe { raw::attach(device.as_raw_fd(), &mut attach) }.map(drop)
}

/// `IOMMU_IOAS_ALLOC`: allocates an I/O address space and returns its ID.
pub(crate) fn ioas_alloc(iommufd: BorrowedFd<'_>) -> Result<u32> {
    let mut alloc = IoasAlloc { size: size_of::<IoasAlloc>() as u32, ..IoasAlloc::default() };
    // SAFETY: the structure is as long as its size says.
    unsafe { raw::ioas_alloc(iommufd.as_raw_fd(), &mut alloc) }?;
    Ok(alloc.id)
}

/// `IOMMU_IOAS_IOVA_RANGES`: the IOVA ranges that can be mapped, and the alignment. Each attached device
/// may narrow the ranges.
pub(crate) fn iova_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
) -> Result<(Vec<RangeInclusive<u64>>, u64)> {
    let mut room = 16;
    loop {
        let mut pairs = vec![[0u64; 2]; room];
        let mut query = IovaRanges {
            size: size_of::<IovaRanges>() as u32,
            id: ioas,
            count: room as u32,
            ranges: pairs.as_mut_ptr() as u64,
            ..IovaRanges::default()
        };
        // SAFETY: the structure is as long as its size says, and the array has room for its count.
        let done = unsafe { raw::iova_ranges(iommufd.as_raw_fd(), &mut query) };
        let count = query.count as usize;
        match done {
            Ok(_) if count <= room => {
                let ranges = pairs[..count].iter().map(|[first, last]| *first..=*last).collect();
                return Ok((ranges, query.alignment));
            }
            Err(Errno::EMSGSIZE) if room < count && count <= MAX_RANGES => room = count,
            Err(errno) => return Err(errno),
            Ok(_) => return Err(Errno::EOVERFLOW),
        }
    }
}

/// `IOMMU_IOAS_MAP` at a fixed address.
pub(crate) fn map(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    memory: Shareable,
    access: Access,
) -> Result<()> {
    let mut map = IoasMap {
        size: size_of::<IoasMap>() as u32,
        flags: FIXED_IOVA | rights(access),
        id: ioas,
        reserved: 0,
        address: memory.address as u64,
        length: memory.size as u64,
        iova,
    };
    // SAFETY: the structure is as long as its size says; devices may reach the memory.
    unsafe { raw::ioas_map(iommufd.as_raw_fd(), &mut map) }.map(drop)
}

/// `IOMMU_IOAS_MAP_FILE` (Linux 6.13) at a fixed address: pages of a file on tmpfs or hugetlbfs, and from Linux
/// 6.19 those of a dma-buf that vfio-pci has made.
///
/// ENOTTY if the kernel does not have it; EINVAL for other files, and past the end of a file. For a dma-buf ENODEV
/// if it is revoked, and EOPNOTSUPP if it is not of vfio-pci. The kernel does not check whether the file is open for
/// writing.
pub(crate) fn map_file(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    memory: ShareableFile<'_>,
    access: Access,
) -> Result<()> {
    let mut map = IoasMapFile {
        size: size_of::<IoasMapFile>() as u32,
        flags: FIXED_IOVA | rights(access),
        id: ioas,
        fd: memory.file.as_raw_fd(),
        start: memory.start,
        length: memory.size as u64,
        iova,
    };
    // SAFETY: the structure is as long as its size says; devices may reach the pages.
    unsafe { raw::ioas_map_file(iommufd.as_raw_fd(), &mut map) }.map(drop)
}

fn rights(access: Access) -> u32 {
    match access {
        Access::ReadOnly => READABLE,
        Access::ReadWrite => READABLE | WRITEABLE,
    }
}

/// `IOMMU_IOAS_UNMAP`: returns how many bytes were unmapped.
pub(crate) fn unmap(iommufd: BorrowedFd<'_>, ioas: u32, iova: u64, size: u64) -> Result<u64> {
    let mut unmap = IoasUnmap { size: size_of::<IoasUnmap>() as u32, id: ioas, iova, length: size };
    // SAFETY: the structure is as long as its size says.
    unsafe { raw::ioas_unmap(iommufd.as_raw_fd(), &mut unmap) }?;
    Ok(unmap.length)
}

/// `IOMMU_IOAS_NOIOMMU_GET_PA` (Linux 7.3): the physical address of the memory mapped at `iova`, and how
/// many bytes from there, up to `size`, are contiguous.
pub(crate) fn physical_address(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    size: u64,
) -> Result<(u64, u64)> {
    let mut query = NoIommuGetPa {
        size: size_of::<NoIommuGetPa>() as u32,
        id: ioas,
        iova,
        length: size,
        ..NoIommuGetPa::default()
    };
    // SAFETY: the structure is as long as its size says.
    unsafe { raw::noiommu_get_pa(iommufd.as_raw_fd(), &mut query) }?;
    Ok((query.physical, query.length))
}
