//! `VFIO_DEVICE_FEATURE` (`linux/vfio.h`, Linux 5.7): optional features of a device.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_DMA_BUF, VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, VFIO_DEVICE_FEATURE_SET,
    VFIO_TYPE, vfio_device_feature,
};

use super::mm::Access;

type Result<T> = std::result::Result<T, Errno>;

mod raw {
    use super::*;

    nix::ioctl_write_ptr_bad!(
        feature,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 17),
        vfio_device_feature
    );
}

/// `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY` (Linux 6.1). ENOTTY if the kernel does not know it, EINVAL if the
/// device is already in low power.
pub(crate) fn enter_low_power(device: BorrowedFd<'_>) -> Result<()> {
    set(device, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, &[])
}

/// `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP` (Linux 6.1): when something wakes the device, it
/// leaves low power and the kernel signals the eventfd.
pub(crate) fn enter_low_power_until_woken(
    device: BorrowedFd<'_>,
    eventfd: BorrowedFd<'_>,
) -> Result<()> {
    // A vfio_device_low_power_entry_with_wakeup: the descriptor, and a reserved word.
    let entry = [eventfd.as_raw_fd().cast_unsigned(), 0];
    set(device, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, &entry)
}

/// `VFIO_DEVICE_FEATURE_LOW_POWER_EXIT` (Linux 6.1). Does nothing if the device is not in low power.
pub(crate) fn exit_low_power(device: BorrowedFd<'_>) -> Result<()> {
    set(device, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, &[])
}

/// `VFIO_DEVICE_FEATURE_PCI_VF_TOKEN` (Linux 5.7): sets the UUID that opening a virtual function requires.
/// ENOTTY if the device is not a physical function.
pub(crate) fn set_vf_token(device: BorrowedFd<'_>, uuid: [u8; 16]) -> Result<()> {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(uuid.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    set(device, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, &words)
}

/// `VFIO_DEVICE_FEATURE_DMA_BUF` (Linux 6.19, `CONFIG_VFIO_PCI_DMABUF`): a dma-buf of a range of a BAR, in whole
/// pages. ENOTTY if the kernel does not have it, EOPNOTSUPP if the device's driver does not; ENODEV if the region is no
/// BAR that the driver has claimed; EINVAL if the range leaves the BAR.
pub(crate) fn dma_buf(
    device: BorrowedFd<'_>,
    region: u32,
    range: Range<u64>,
    access: Access,
) -> Result<OwnedFd> {
    let flags = match access {
        Access::ReadOnly => libc::O_RDONLY | libc::O_CLOEXEC,
        Access::ReadWrite => libc::O_RDWR | libc::O_CLOEXEC,
    };
    // A vfio_device_feature_dma_buf of four words, and one vfio_region_dma_range: offset and length.
    let mut data = vec![region, flags.cast_unsigned(), 0, 1];
    for value in [range.start, range.end.saturating_sub(range.start)] {
        let bytes = value.to_ne_bytes();
        let words =
            bytes.chunks_exact(4).map(|it| u32::from_ne_bytes([it[0], it[1], it[2], it[3]]));
        data.extend(words);
    }
    let fd = call(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF, &data)?;
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: the kernel has made the descriptor for this call, and nothing else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set(device: BorrowedFd<'_>, feature: u32, data: &[u32]) -> Result<()> {
    call(device, VFIO_DEVICE_FEATURE_SET | feature, data).map(drop)
}

/// Calls the ioctl with a feature that the kernel only reads the data of.
fn call(device: BorrowedFd<'_>, flags: u32, data: &[u32]) -> Result<i32> {
    let size = (size_of::<vfio_device_feature>() + size_of_val(data)) as u32;
    let mut words = vec![size, flags];
    words.extend_from_slice(data);
    // SAFETY: the buffer holds a vfio_device_feature of two words and the data behind it, and is as long as
    // its argsz says. The kernel only reads it: a feature is set, or its answer is the call's.
    unsafe { raw::feature(device.as_raw_fd(), words.as_ptr().cast()) }
}
