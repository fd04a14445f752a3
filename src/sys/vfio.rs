//! The VFIO ioctls, with the structures of `linux/vfio.h` (`vfio-bindings`).
//!
//! `vfio-ioctls` opens the container. The calls on groups and devices are made here: that crate attaches a
//! group only inside a device object of its own, whose errors lose errnos and whose `Drop` may panic when a
//! device is unplugged.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::ffi::CStr;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_NOIOMMU_IOMMU, VFIO_TYPE, VFIO_TYPE1v2_IOMMU,
    vfio_device_info, vfio_group_status, vfio_region_info,
};
use vfio_ioctls::VfioContainer;

type Result<T> = std::result::Result<T, Errno>;

/// The longest info reply that is accepted, in bytes: room for some 65,000 sparse areas of a region.
const MAX_REPLY: usize = 1 << 20;

mod raw {
    use super::*;

    nix::ioctl_none_bad!(get_api_version, request_code_none!(VFIO_TYPE, VFIO_BASE));
    nix::ioctl_write_int_bad!(set_iommu, request_code_none!(VFIO_TYPE, VFIO_BASE + 2));
    nix::ioctl_readwrite_bad!(
        group_get_status,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 3),
        vfio_group_status
    );
    nix::ioctl_write_ptr_bad!(
        group_set_container,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 4),
        libc::c_int
    );
    nix::ioctl_write_ptr_bad!(
        group_get_device_fd,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 6),
        libc::c_char
    );
    nix::ioctl_readwrite_bad!(
        device_get_info,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 7),
        vfio_device_info
    );
    nix::ioctl_readwrite_bad!(
        device_get_region_info,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 8),
        vfio_region_info
    );
}

fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// `VFIO_SET_IOMMU(VFIO_TYPE1v2_IOMMU)`: gives the container its address space.
pub(crate) fn set_iommu_type1v2(container: &VfioContainer) -> Result<()> {
    // SAFETY: the ioctl takes a number.
    unsafe { raw::set_iommu(container.as_raw_fd(), VFIO_TYPE1v2_IOMMU as libc::c_int) }.map(drop)
}

/// `VFIO_GET_API_VERSION`: whether the version is the only one so far (since Linux 3.6).
pub(crate) fn is_known_version(container: BorrowedFd<'_>) -> Result<bool> {
    // SAFETY: the ioctl takes no argument.
    let version = unsafe { raw::get_api_version(container.as_raw_fd()) }?;
    Ok(version.cast_unsigned() == VFIO_API_VERSION)
}

/// `VFIO_SET_IOMMU(VFIO_NOIOMMU_IOMMU)` (Linux 4.5): the container translates no addresses.
pub(crate) fn set_no_iommu(container: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the ioctl takes a number.
    unsafe { raw::set_iommu(container.as_raw_fd(), VFIO_NOIOMMU_IOMMU as libc::c_int) }.map(drop)
}

/// `VFIO_GROUP_GET_STATUS`: the flags of the group.
pub(crate) fn group_flags(group: BorrowedFd<'_>) -> Result<u32> {
    let mut status = vfio_group_status { argsz: argsz::<vfio_group_status>(), flags: 0 };
    // SAFETY: the structure is as long as its argsz says.
    unsafe { raw::group_get_status(group.as_raw_fd(), &mut status) }?;
    Ok(status.flags)
}

/// `VFIO_GROUP_SET_CONTAINER`
pub(crate) fn set_container(group: BorrowedFd<'_>, container: &impl AsRawFd) -> Result<()> {
    // SAFETY: the kernel reads one int.
    unsafe { raw::group_set_container(group.as_raw_fd(), &container.as_raw_fd()) }.map(drop)
}

/// `VFIO_GROUP_GET_DEVICE_FD`
pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    // SAFETY: the kernel reads a C string.
    let fd = unsafe { raw::group_get_device_fd(group.as_raw_fd(), name.as_ptr()) }?;
    // SAFETY: a successful call returns a new descriptor, which is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_GET_INFO`
pub(crate) fn device_info(device: BorrowedFd<'_>) -> Result<vfio_device_info> {
    let mut info =
        vfio_device_info { argsz: argsz::<vfio_device_info>(), ..vfio_device_info::default() };
    // SAFETY: the structure is as long as its argsz says.
    unsafe { raw::device_get_info(device.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// `VFIO_DEVICE_GET_REGION_INFO`: the reply's bytes, a `vfio_region_info` and its capabilities.
///
/// EOVERFLOW if the kernel claims more than [`MAX_REPLY`] bytes.
pub(crate) fn region_info(device: BorrowedFd<'_>, index: u32) -> Result<Vec<u8>> {
    info_reply(size_of::<vfio_region_info>(), |words| {
        words[offset_of!(vfio_region_info, index) / 4] = index;
        // SAFETY: the buffer is as long as its argsz says.
        unsafe { raw::device_get_region_info(device.as_raw_fd(), words.as_mut_ptr().cast()) }
    })
}

/// Runs an info ioctl until the buffer holds the whole reply. The structure begins with `argsz`: the caller
/// sets it to the size of the buffer, and the kernel to the size of the whole reply.
pub(super) fn info_reply(
    header: usize,
    mut ioctl: impl FnMut(&mut [u32]) -> Result<libc::c_int>,
) -> Result<Vec<u8>> {
    let mut len = header;
    loop {
        let mut words = vec![0u32; len.div_ceil(4)];
        let room = words.len() * 4;
        words[0] = room as u32;
        ioctl(&mut words)?;
        let wanted = words[0] as usize;
        if wanted > MAX_REPLY {
            return Err(Errno::EOVERFLOW);
        }
        if wanted <= room {
            return Ok(words.into_iter().flat_map(u32::to_ne_bytes).collect());
        }
        // The loop ends: `len` grows each time, and `MAX_REPLY` limits it.
        len = wanted;
    }
}
