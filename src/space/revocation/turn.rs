//! The right to do something to a window, one at a time.

use std::ptr;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::control::{Control, Held};
use super::reasons::Reasons;
use super::registry;
use super::registry::{Entry, State};
use crate::error::{Error, ErrorKind, Result};
use crate::space::Backing;
use crate::sys::maps::Origin;

/// The right to do something to a window.
pub(in crate::space) struct Turn<'a> {
    pub(super) control: &'a Control,
    pub(super) held: MutexGuard<'a, Held>,
    /// How often handlers had revoked all windows of the group when the turn began.
    pub(super) swept: u64,
}

impl<'a> Turn<'a> {
    pub(super) fn entry(&self, operation: &'static str) -> Result<&'static Entry> {
        match &self.held.slot {
            Some(slot) => Ok(slot.entry),
            None if self.is_sealed() => {
                Err(Error::new(ErrorKind::Sealed, operation, self.control.object())
                    .with_reason("a sealed window stays as it is until the process ends"))
            }
            None => Err(Error::new(ErrorKind::Gone, operation, self.control.object())
                .with_reason("the window was unmapped")),
        }
    }

    pub(super) fn reasons(&self) -> Reasons {
        match &self.held.slot {
            // No verb is about to revoke it: that would be its turn.
            Some(slot) if [State::Revoking, State::Revoked].contains(&slot.entry.state()) => {
                match self.held.reasons {
                    reasons if reasons.is_empty() => Reasons::FAULT,
                    reasons => reasons,
                }
            }
            _ => Reasons::default(),
        }
    }

    /// Keeps handlers from revoking the window until [`thaw`](Self::thaw), [`moved`](Self::moved) or
    /// [`retire`](Self::retire): accesses that fault meanwhile are repeated. Fails if the window is revoked
    /// or sealed.
    pub(in crate::space) fn freeze(&self, operation: &'static str) -> Result<()> {
        let entry = self.entry(operation)?;
        entry.stop_if(State::Live, State::Busy).map_err(|_| self.control.refused(operation))
    }

    /// Ends a [`freeze`](Self::freeze): the window is what it was. If a handler has revoked the group since the turn
    /// began, the window is revoked, too.
    pub(in crate::space) fn thaw(&self) {
        self.resume(Some(State::Live));
    }

    /// Ends a [`freeze`](Self::freeze) as [`thaw`](Self::thaw) does, with the window at `address` now.
    pub(in crate::space) fn moved(&self, address: usize) {
        if let Some(slot) = &self.held.slot {
            registry().relocate(slot, &(address..address + self.control.size));
            self.control.follow(slot.entry, self.swept);
        }
    }

    /// Removes the window from the registry. When this returns, no handler changes its range. Returns what the
    /// window shows, unless it was [suspended](Self::suspend).
    pub(in crate::space) fn retire(&mut self) -> Shown {
        self.control.entry.store(ptr::null_mut(), Ordering::Release);
        let before = self.held.slot.take().map(|slot| registry().remove(slot));
        self.shown(before)
    }

    /// Keeps handlers from the window, whether it is revoked or not, as [`retire`](Self::retire) does. Returns
    /// what [`resume`](Self::resume) takes.
    pub(in crate::space) fn suspend(&self) -> Option<State> {
        self.held.slot.as_ref().map(|slot| slot.entry.stop(State::Busy))
    }

    /// Ends [`suspend`](Self::suspend). If a handler has revoked the group since the turn began, so is the window.
    pub(in crate::space) fn resume(&self, before: Option<State>) {
        if let (Some(slot), Some(before)) = (&self.held.slot, before) {
            let _ = slot.entry.change(State::Busy, before);
            self.control.follow(slot.entry, self.swept);
        }
    }

    pub(in crate::space) fn is_sealed(&self) -> bool {
        self.held.sealed.is_some()
    }

    /// What the window shows in this state.
    pub(in crate::space) fn shown(&self, state: Option<State>) -> Shown {
        self.control.shown(state)
    }
}

/// What is mapped at the addresses of a window: the file, if it can be told from others, and the offset in it.
#[derive(Clone, Copy)]
pub(in crate::space) struct Shown {
    pub file: Option<Origin>,
    pub offset: u64,
    /// Whether it is the pages of a revoked window.
    pub is_revoked: bool,
}

impl Shown {
    /// A live mapping of `backing` from `offset` of the region on.
    pub(in crate::space) fn backing(backing: &Backing, offset: u64) -> Self {
        Self { file: backing.origin, offset: backing.file_offset(offset), is_revoked: false }
    }
}
