//! Interrupts through VFIO.

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

/// What the index offers; EINVAL is how some kernels say that the device has none of it.
pub(super) fn info(device: BorrowedFd<'_>, index: u32, name: &str) -> Result<IrqInfo> {
    match vfio_irq::info(device, index) {
        Ok(answer) => {
            let flag = |bit| answer.flags & bit != 0;
            Ok(IrqInfo {
                count: answer.count,
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
        .and_then(|available| given(available, index, vectors, name))
}

/// Whether all vectors are connected; `available` is what the kernel answers: 0, or how many there are.
fn given(available: u32, index: u32, vectors: Range<u32>, name: &str) -> Result<()> {
    if available == 0 {
        return Ok(());
    }
    let object = format!("vectors {}..{} of {}", vectors.start, vectors.end, object(index, name));
    Err(Error::new(ErrorKind::OutOfRange, "connect", object)
        .because(format!("the machine has {available} of these {} vectors to give", vectors.end))
        .remedy(format!(
            "ask for {available}; for more MSI than one, switch on interrupt remapping (intremap, in \
             the firmware: VT-d or AMD-Vi)"
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
    // To the kernel no vectors at all mean that the index is to be taken out of use.
    if vectors.is_empty() {
        return Ok(());
    }
    vfio_irq::set_now(device, index, vectors.clone(), action)
        .map_err(|errno| failed(errno, operation, index, vectors, name))
}

/// Has a vector unmasked whenever `fd` is written.
pub(super) fn unmask_by(
    device: BorrowedFd<'_>,
    index: u32,
    vector: u32,
    fd: Option<BorrowedFd<'_>>,
    name: &str,
) -> Result<()> {
    let done = vfio_irq::set_eventfds(device, index, vector, Action::Unmask, &[fd]);
    done.map(drop).map_err(|errno| {
        failed(errno, "unmask by an eventfd", index, vector..vector.saturating_add(1), name)
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
        Errno::EINVAL => error.because(
            "the device has no such vectors, another kind of interrupt is in use, or they cannot be \
             added while others are enabled",
        ),
        Errno::ENOSPC => error
            .into_kind(ErrorKind::Refused)
            .because("the machine has no more interrupt vectors to give"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_for_an_answer_is_an_error_that_names_it() {
        given(0, irq_index::MSI, 0..4, "0000:00:03.0").unwrap();
        // All vectors up to the last are meant, also where only some are added.
        let error = given(3, irq_index::MSIX, 2..16, "0000:00:03.0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let words = "vectors 2..16 of MSI-X of 0000:00:03.0: the machine has 3 of these 16 vectors";
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.advice().starts_with("ask for 3"), "{error}");
    }
}
