//! Windows that may be revoked together, and what a signal handler is told of each.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;

use super::absent::Pages;
use super::sweeps::Sweeps;
use crate::sys::eventfd;
use crate::sys::mm::Access;

/// Windows that a fault in one of them may revoke together: those of a device. Aligned so that a pointer to it has
/// room for the rest of a [note](Group::note).
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Group {
    eventfd: OnceLock<OwnedFd>,
    /// The eventfd, for a signal handler; -1 if there is none.
    pub(super) fd: AtomicI32,
    pub(super) sweeps: Sweeps,
}

impl Default for Group {
    fn default() -> Self {
        Self { eventfd: OnceLock::new(), fd: AtomicI32::new(-1), sweeps: Sweeps::default() }
    }
}

impl Group {
    /// An eventfd that is signalled when a fault is contained in a window of the group.
    pub(crate) fn eventfd(&self) -> std::result::Result<BorrowedFd<'_>, Errno> {
        let fd = match self.eventfd.get() {
            Some(fd) => fd,
            None => {
                let fd = eventfd::new()?;
                self.eventfd.get_or_init(|| fd)
            }
        };
        // It is closed with the group, which the backings of its windows hold: no handler has it then.
        self.fd.store(fd.as_raw_fd(), Ordering::Release);
        Ok(fd.as_fd())
    }

    /// The bits of a note that are not the group.
    pub(super) const OTHERS: usize = align_of::<Self>() - 1;

    /// What a handler is told of a window: the group, whether the window can be written, and its pages.
    pub(super) fn note(self: &Arc<Self>, access: Access, pages: Pages) -> usize {
        const { assert!(2 << Pages::BITS <= align_of::<Group>()) };
        let others = usize::from(access == Access::ReadWrite) | pages.bits() << 1;
        ptr::from_ref::<Self>(self).expose_provenance() | others
    }

    pub(super) fn of_note(note: usize) -> (Access, Pages) {
        let access = if note & 1 == 1 { Access::ReadWrite } else { Access::ReadOnly };
        (access, Pages::from_bits((note & Self::OTHERS) >> 1))
    }
}
