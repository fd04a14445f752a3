//! The ioctls that reset a device, its bus or its slot.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_pci_dependent_device, vfio_pci_hot_reset, vfio_pci_hot_reset_info,
};

type Result<T> = std::result::Result<T, Errno>;

/// More functions than a reset can affect: a bus has 256, and a bridge may have more buses below it.
const MAX_DEVICES: usize = 1 << 16;

mod raw {
    use super::*;

    nix::ioctl_none_bad!(reset, request_code_none!(VFIO_TYPE, VFIO_BASE + 11));
    nix::ioctl_readwrite_bad!(
        hot_reset_info,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 12),
        vfio_pci_hot_reset_info
    );
    nix::ioctl_write_ptr_bad!(
        hot_reset,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 13),
        vfio_pci_hot_reset
    );
}

/// `VFIO_DEVICE_RESET`
pub(crate) fn reset(device: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the ioctl takes no argument.
    unsafe { raw::reset(device.as_raw_fd()) }.map(drop)
}

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: the reply's bytes, a `vfio_pci_hot_reset_info` and its
/// devices. ENODEV if neither the bus nor the slot can be reset.
///
/// EOVERFLOW if the kernel claims more than [`MAX_DEVICES`].
pub(crate) fn hot_reset_info(device: BorrowedFd<'_>) -> Result<Vec<u8>> {
    const HEADER: usize = size_of::<vfio_pci_hot_reset_info>();
    let mut room = 16;
    loop {
        let size = HEADER + room * size_of::<vfio_pci_dependent_device>();
        let mut words = vec![0u32; size / 4];
        words[0] = size as u32;
        // SAFETY: the buffer is as long as its argsz says.
        let done = unsafe { raw::hot_reset_info(device.as_raw_fd(), words.as_mut_ptr().cast()) };
        let count = words[offset_of!(vfio_pci_hot_reset_info, count) / 4] as usize;
        match done {
            Ok(_) => return Ok(words.into_iter().flat_map(u32::to_ne_bytes).collect()),
            // The kernel returns the count. More devices may appear before the next call.
            Err(Errno::ENOSPC) if room < count && count <= MAX_DEVICES => room = count,
            Err(Errno::ENOSPC) => return Err(Errno::EOVERFLOW),
            Err(errno) => return Err(errno),
        }
    }
}

/// `VFIO_DEVICE_PCI_HOT_RESET`, with the groups of all affected devices. For a device that was opened by
/// its own file (Linux 6.6) there are no groups: its iommufd must own all affected devices.
pub(crate) fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> Result<()> {
    let size = size_of::<vfio_pci_hot_reset>() + size_of_val(groups);
    let mut words = vec![size as u32, 0, groups.len() as u32];
    words.extend(groups.iter().map(|group| group.as_raw_fd().cast_unsigned()));
    // SAFETY: the buffer holds a vfio_pci_hot_reset of three words, and as many descriptors as its count
    // says.
    unsafe { raw::hot_reset(device.as_raw_fd(), words.as_ptr().cast()) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The buffers above are arrays of 32-bit words: no structure has a larger alignment.
    #[test]
    fn the_structures_are_words() {
        assert_eq!(size_of::<vfio_pci_hot_reset_info>(), 12);
        assert_eq!(size_of::<vfio_pci_dependent_device>(), 8);
        assert_eq!(size_of::<vfio_pci_hot_reset>(), 12);
        assert_eq!(size_of::<BorrowedFd<'_>>(), 4);
    }
}
