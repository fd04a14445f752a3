//! The ioctls of a device's interrupts.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE, vfio_irq_info, vfio_irq_set,
};

type Result<T> = std::result::Result<T, Errno>;

mod raw {
    use super::*;

    nix::ioctl_readwrite_bad!(
        get_info,
        request_code_none!(VFIO_TYPE, VFIO_BASE + 9),
        vfio_irq_info
    );
    nix::ioctl_write_ptr_bad!(set, request_code_none!(VFIO_TYPE, VFIO_BASE + 10), vfio_irq_set);
}

/// What `VFIO_DEVICE_SET_IRQS` does to vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `VFIO_IRQ_SET_ACTION_MASK`
    Mask,
    /// `VFIO_IRQ_SET_ACTION_UNMASK`
    Unmask,
    /// `VFIO_IRQ_SET_ACTION_TRIGGER`
    Trigger,
}

impl Action {
    fn flag(self) -> u32 {
        match self {
            Self::Mask => VFIO_IRQ_SET_ACTION_MASK,
            Self::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            Self::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        }
    }
}

/// `VFIO_DEVICE_GET_IRQ_INFO`
pub(crate) fn info(device: BorrowedFd<'_>, index: u32) -> Result<vfio_irq_info> {
    let mut info = vfio_irq_info {
        argsz: size_of::<vfio_irq_info>() as u32,
        index,
        ..vfio_irq_info::default()
    };
    // SAFETY: the structure is as long as its argsz says.
    unsafe { raw::get_info(device.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// `VFIO_DEVICE_SET_IRQS` with eventfds (−1 for `None`). With `Trigger`, a vector that fires signals its
/// eventfd. With `Mask` or `Unmask`, a write to the eventfd masks or unmasks the vector.
///
/// Returns 0 on success. Any other number is how many vectors the machine has available, fewer than were
/// requested; none is then connected (vfio-pci, for MSI and MSI-X).
pub(crate) fn set_eventfds(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    action: Action,
    fds: &[Option<BorrowedFd<'_>>],
) -> Result<u32> {
    let fds: Vec<u32> =
        fds.iter().map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()).cast_unsigned()).collect();
    set(device, index, start, fds.len() as u32, VFIO_IRQ_SET_DATA_EVENTFD | action.flag(), &fds)
}

/// `VFIO_DEVICE_SET_IRQS` without data: does `action` to these vectors now. `Trigger` on an empty range
/// disables the whole index.
pub(crate) fn set_now(
    device: BorrowedFd<'_>,
    index: u32,
    vectors: Range<u32>,
    action: Action,
) -> Result<()> {
    let count = vectors.end.saturating_sub(vectors.start);
    set(device, index, vectors.start, count, VFIO_IRQ_SET_DATA_NONE | action.flag(), &[]).map(drop)
}

fn set(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    count: u32,
    flags: u32,
    data: &[u32],
) -> Result<u32> {
    let size = (size_of::<vfio_irq_set>() + size_of_val(data)) as u32;
    let mut words = vec![size, flags, index, start, count];
    words.extend_from_slice(data);
    // SAFETY: the buffer holds a vfio_irq_set of five words and the data behind it, and is as long as its
    // argsz says.
    let available = unsafe { raw::set(device.as_raw_fd(), words.as_ptr().cast()) }?;
    Ok(available.cast_unsigned())
}
