//! `VFIO_DEVICE_FEATURE` (`linux/vfio.h`, Linux 5.7): optional features of a device.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, VFIO_DEVICE_FEATURE_SET, VFIO_TYPE, vfio_device_feature,
};

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

fn set(device: BorrowedFd<'_>, feature: u32, data: &[u32]) -> Result<()> {
    let size = (size_of::<vfio_device_feature>() + size_of_val(data)) as u32;
    let mut words = vec![size, VFIO_DEVICE_FEATURE_SET | feature];
    words.extend_from_slice(data);
    // SAFETY: the buffer holds a vfio_device_feature of two words and the data behind it, and is as long as
    // its argsz says. When a feature is set, the kernel only reads it.
    unsafe { raw::feature(device.as_raw_fd(), words.as_ptr().cast()) }.map(drop)
}
