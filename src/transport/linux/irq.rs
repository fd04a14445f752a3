//! Interrupts of a VFIO device.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::vfio_irq::{self, Action};
use crate::transport::{IrqInfo, irq_index};

/// "MSI-X of 0000:00:03.0"
fn object(index: u32, name: &str) -> String {
    match index {
        irq_index::INTX => format!("INTx of {name}"),
        irq_index::MSI => format!("MSI of {name}"),
        irq_index::MSIX => format!("MSI-X of {name}"),
        irq_index::ERR => format!("the error event of {name}"),
        irq_index::REQ => format!("the release event of {name}"),
        other => format!("interrupt index {other} of {name}"),
    }
}

/// The vectors of an index. Some kernels return EINVAL if the device has none.
pub(super) fn info(device: BorrowedFd<'_>, index: u32, name: &str) -> Result<IrqInfo> {
    match vfio_irq::info(device, index) {
        Ok(reply) => {
            let flag = |bit| reply.flags & bit != 0;
            Ok(IrqInfo {
                count: reply.count,
                eventfd: flag(VFIO_IRQ_INFO_EVENTFD),
                maskable: flag(VFIO_IRQ_INFO_MASKABLE),
                automasked: flag(VFIO_IRQ_INFO_AUTOMASKED),
                noresize: flag(VFIO_IRQ_INFO_NORESIZE),
            })
        }
        Err(Errno::EINVAL) => Ok(IrqInfo::default()),
        Err(errno) => Err(Error::os(errno, "query", object(index, name))),
    }
}

pub(super) fn set(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    fds: &[Option<BorrowedFd<'_>>],
    name: &str,
) -> Result<()> {
    let vectors = start..start.saturating_add(fds.len() as u32);
    let done = if fds.is_empty() {
        vfio_irq::set_now(device, index, 0..0, Action::Trigger).map(|()| 0)
    } else {
        vfio_irq::set_eventfds(device, index, start, Action::Trigger, fds)
    };
    done.map_err(|errno| failed(errno, "connect", index, vectors.clone(), name))
        .and_then(|available| check_connected(available, index, vectors, name))
}

/// Checks that all vectors are connected. `available` is the result of the ioctl: 0, or how many vectors
/// the machine has available.
fn check_connected(available: u32, index: u32, vectors: Range<u32>, name: &str) -> Result<()> {
    if available == 0 {
        return Ok(());
    }
    let object = format!("vectors {}..{} of {}", vectors.start, vectors.end, object(index, name));
    Err(Error::new(ErrorKind::OutOfRange, "connect", object)
        .with_reason(format!("the machine has only {available} of these {} vectors available", vectors.end))
        .with_advice(format!(
            "ask for {available}; for more than one MSI vector, enable interrupt remapping (intremap, \
             and VT-d or AMD-Vi in the firmware)"
        )))
}

pub(super) fn act(
    device: BorrowedFd<'_>,
    index: u32,
    vectors: Range<u32>,
    action: Action,
    name: &str,
) -> Result<()> {
    let operation = match action {
        Action::Mask => "mask",
        Action::Unmask => "unmask",
        Action::Trigger => "trigger",
    };
    // The kernel takes an empty range as a request to disable the index.
    if vectors.is_empty() {
        return Ok(());
    }
    vfio_irq::set_now(device, index, vectors.clone(), action)
        .map_err(|errno| failed(errno, operation, index, vectors, name))
}

/// Unmasks a vector whenever `fd` is written.
pub(super) fn unmask_by(
    device: BorrowedFd<'_>,
    index: u32,
    vector: u32,
    fd: Option<BorrowedFd<'_>>,
    name: &str,
) -> Result<()> {
    let done = vfio_irq::set_eventfds(device, index, vector, Action::Unmask, &[fd]);
    done.map(drop).map_err(|errno| {
        failed(errno, "use an eventfd to unmask", index, vector..vector.saturating_add(1), name)
    })
}

fn failed(
    errno: Errno,
    operation: &'static str,
    index: u32,
    vectors: Range<u32>,
    name: &str,
) -> Error {
    let object = format!("vectors {}..{} of {}", vectors.start, vectors.end, object(index, name));
    let error = Error::os(errno, operation, object);
    match errno {
        Errno::EINVAL => error.with_reason(
            "the device has no such vectors, another kind of interrupt is in use, or vectors cannot be \
             added while others are enabled",
        ),
        Errno::ENOSPC => error
            .into_kind(ErrorKind::Refused)
            .with_reason("the machine has no more interrupt vectors available"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_available_vectors_are_an_error_that_names_their_count() {
        check_connected(0, irq_index::MSI, 0..4, "0000:00:03.0").unwrap();
        // The count includes all vectors up to the last, even if only some are added.
        let error = check_connected(3, irq_index::MSIX, 2..16, "0000:00:03.0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let words =
            "vectors 2..16 of MSI-X of 0000:00:03.0: the machine has only 3 of these 16 vectors";
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.advice().starts_with("ask for 3"), "{error}");
    }
}
