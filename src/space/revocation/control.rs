//! The verbs on one window: revoke, restore, seal.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::absent::{self, Left, Pages};
use super::reasons::Reasons;
use super::registry::{Entry, Slot, State};
use super::report::{StateReport, WindowState};
use super::turn::{Shown, Turn};
use super::{lost, registry};
use crate::error::{Error, ErrorKind, Result};
use crate::space::limits::out_of_memory;
use crate::space::mapping::{Object, prefer_huge};
use crate::space::{Backing, KernelVersion};
use crate::sys::async_safe::{self, SignalsBlocked};
use crate::sys::maps::Origin;
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{file, fork, maps};

/// What can be done to a window without owning it: to revoke and to restore it.
pub(crate) struct Control {
    pub(in crate::space) backing: Arc<Backing>,
    pub(super) offset: u64,
    pub(super) size: usize,
    pub(super) access: Access,
    /// What it shows when it is revoked.
    pub(super) pages: Pages,
    generation: u32,
    /// The entry in `held`; null if there is none.
    pub(super) entry: AtomicPtr<Entry>,
    held: Mutex<Held>,
}

pub(super) struct Held {
    /// `None` once the window is unmapped or sealed.
    pub(super) slot: Option<Slot>,
    /// Empty while the window is live, and if a handler has revoked it.
    pub(super) reasons: Reasons,
    /// Where it is, if it is sealed.
    pub(super) sealed: Option<Range<usize>>,
}

impl Control {
    /// Registers a window that was mapped at `address`.
    #[inline(always)]
    pub(in crate::space) fn new(
        backing: Arc<Backing>,
        offset: u64,
        size: usize,
        access: Access,
        address: usize,
    ) -> Arc<Self> {
        let range = address..address + size;
        let pages = Pages::of(size);
        let slot = registry().insert(&range, backing.group().note(access, pages));
        let entry = AtomicPtr::new(ptr::from_ref(slot.entry).cast_mut());
        let held = Mutex::new(Held { slot: Some(slot), reasons: Reasons::default(), sealed: None });
        let generation = fork::generation();
        Arc::new(Self { backing, offset, size, access, pages, generation, entry, held })
    }

    /// How often handlers have revoked all windows of the group.
    #[inline(always)]
    pub(in crate::space) fn swept(&self) -> u64 {
        self.backing.group().sweeps.swept()
    }

    /// Revokes a window that no other verb reaches yet, if a handler has revoked all windows of the group since
    /// [this many](Self::swept) had been done. For a duplicate, which was not one of them.
    #[inline(always)]
    pub(in crate::space) fn follow_sweeps(&self, swept: u64) {
        if let Some(entry) = self.entry() {
            self.follow(entry, swept);
        }
    }

    /// As [`follow_sweeps`](Self::follow_sweeps), during a turn.
    #[inline(always)]
    pub(super) fn follow(&self, entry: &Entry, swept: u64) {
        // One that had not ended may have passed over the window, which was busy or not there.
        if self.backing.group().sweeps.has_begun_more_than(swept) {
            self.revoke_with_group(entry);
        }
    }

    #[cold]
    fn revoke_with_group(&self, entry: &Entry) {
        let lock = MmapLock::take();
        if entry.mark() {
            // SAFETY: the window stays mapped at its range: this is a turn, or nobody else has the control yet. If it
            // is not revoked, it has its own fault later.
            let _ = unsafe { self.replace_marked(&lock, entry) };
        }
    }

    /// Waits for verbs on the same window to end. Not for a child of `fork(2)`.
    pub(in crate::space) fn turn(&self) -> Turn<'_> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        Turn { control: self, held, swept: self.swept() }
    }

    /// Whether the window is revoked.
    #[inline]
    pub(crate) fn is_revoked(&self) -> bool {
        self.entry().is_some_and(|entry| entry.state().is_revoked())
    }

    /// Whether the window is revoked, after handlers that were about to revoke it have done so. While the lock is
    /// held, no verb revokes or restores it.
    pub(in crate::space) fn is_revoked_now(&self, _: &MmapLock) -> bool {
        if let Some(entry) = self.entry() {
            entry.drain();
        }
        self.is_revoked()
    }

    /// The error of a verb that a revoked window refuses.
    pub(in crate::space) fn refused(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Revoked, operation, self.object())
            .with_reason("the window is revoked")
            .with_advice("restore it first: Window::restore")
    }

    /// Removes the window, which has no other user, from the registry, as [`Turn::retire`] does. `None` if it is
    /// sealed.
    #[inline(always)]
    pub(in crate::space) fn retire(self: &mut Arc<Self>) -> Option<Shown> {
        if let Some(control) = Arc::get_mut(self) {
            let Self { held, entry, .. } = control;
            let held = held.get_mut().unwrap_or_else(PoisonError::into_inner);
            if held.sealed.is_some() {
                return None;
            }
            *entry.get_mut() = ptr::null_mut();
            let before = held.slot.take().map(|slot| registry().remove(slot));
            return Some(control.shown(before));
        }
        let mut turn = self.turn();
        (!turn.is_sealed()).then(|| turn.retire())
    }

    /// What the window shows in this state.
    pub(super) fn shown(&self, state: Option<State>) -> Shown {
        let Self { backing, offset, pages, .. } = self;
        match state {
            Some(State::Revoked) => {
                Shown { file: pages.identity().map(Origin::from), offset: 0, is_revoked: true }
            }
            _ => Shown::backing(backing, *offset),
        }
    }

    pub(super) fn entry(&self) -> Option<&'static Entry> {
        // SAFETY: entries are never freed.
        unsafe { self.entry.load(Ordering::Acquire).as_ref() }
    }

    /// Why it is revoked; empty if it is not.
    pub(crate) fn reasons(&self) -> Reasons {
        if self.is_inherited() { Reasons::default() } else { self.turn().reasons() }
    }

    /// Whether it reads all ones when it is revoked, and not zeros.
    pub(crate) fn reads_ones(&self) -> bool {
        self.pages.are_ones()
    }

    pub(crate) fn is_sealed(&self) -> bool {
        !self.is_inherited() && self.turn().is_sealed()
    }

    /// Whether the window is no more: its verbs fail, and nothing is wrong with its device.
    pub(crate) fn is_unmapped(&self) -> bool {
        if self.is_inherited() {
            return false;
        }
        let turn = self.turn();
        turn.held.slot.is_none() && !turn.is_sealed()
    }

    /// How many bytes of the file behind the window are left, if it is a file that can be truncated and is
    /// shorter than the window.
    pub(crate) fn truncated_to(&self) -> Option<u64> {
        let start = self.backing.file_offset(self.offset);
        let size = file::regular_size(self.backing.fd()).ok()??;
        (size < start + self.size as u64).then(|| size.saturating_sub(start))
    }

    pub(in crate::space) fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    pub(in crate::space) fn object(&self) -> Object<'_> {
        Object { backing: &self.backing, offset: self.offset, size: self.size }
    }

    fn report(&self, range: Range<usize>, before: WindowState, after: WindowState) -> StateReport {
        let report = StateReport { addresses: range, before, after };
        log::debug!("{}: {report}", self.object());
        report
    }

    fn revoked(&self) -> WindowState {
        WindowState::Revoked { reads_ones: self.reads_ones() }
    }

    fn check_process(&self, operation: &'static str) -> Result<()> {
        if !self.is_inherited() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Gone, operation, self.object())
            .with_reason("children of fork do not inherit windows"))
    }

    /// Replaces the window by pages that read all ones. It stays revoked until each of the reasons is
    /// [taken back](Self::restore).
    pub(crate) fn revoke(&self, reasons: Reasons) -> Result<StateReport> {
        self.check_process("revoke")?;
        let mut turn = self.turn();
        let entry = turn.entry("revoke")?;
        let range = entry.range();
        let lock = MmapLock::take();
        // As in `restore`, if handlers wait for this verb.
        let signals = absent::moves_pages().then(SignalsBlocked::new);
        // Marked first, so that whoever reads the pages also sees the mark.
        let was_live = entry.mark();
        if was_live {
            // SAFETY: the window stays mapped at its range, because its verbs take turns, of which this is one.
            unsafe { self.replace_marked(&lock, entry) }
                .map_err(|errno| out_of_memory(errno, "revoke", self.object(), self.size))?;
        }
        drop((signals, lock));
        if !was_live {
            turn.held.reasons = turn.reasons().and(reasons);
            return Ok(self.report(range, self.revoked(), self.revoked()));
        }
        turn.held.reasons = reasons;
        Ok(self.report(range, WindowState::Live, self.revoked()))
    }

    /// Replaces the window by its pages, after its entry was marked. On failure the window is what it was, unless a
    /// handler has replaced it meanwhile, which is no failure.
    ///
    /// # Safety
    /// The window stays mapped at its range.
    pub(super) unsafe fn replace_marked(
        &self,
        _: &MmapLock,
        entry: &Entry,
    ) -> std::result::Result<(), Errno> {
        let range = entry.range();
        // SAFETY: by the contract.
        let result = unsafe { absent::replace(range.start, self.size, self.access, self.pages) };
        let Err(refused) = result else {
            entry.has_revoked();
            return Ok(());
        };
        let _signals = SignalsBlocked::new();
        if !entry.has_failed() {
            return Ok(());
        }
        let is_intact = match refused.left {
            Left::Untouched => true,
            Left::Unknown => self.is_shown(&range),
            Left::Plugged | Left::Hole => false,
        };
        if !is_intact {
            lost(&range);
        }
        let _ = entry.change(State::Undecided, State::Live);
        Err(refused.errno)
    }

    /// Whether the device is mapped in the range, and not what another thread has mapped. False if that cannot be
    /// found out.
    #[cold]
    fn is_shown(&self, range: &Range<usize>) -> bool {
        let offset = self.backing.file_offset(self.offset);
        let file = self.backing.shared_origin();
        file.is_ok_and(|file| maps::still_shows(range, file, offset) == Some(true))
    }

    /// Takes back reasons. If none is left, maps the device again, at the same addresses. A sealed window reaches its
    /// device, and stays as it is.
    ///
    /// The new mapping is made at an address that the kernel chooses, and moved over the pages untouched,
    /// which no kernel's hazards concern. If it cannot be made, the window stays revoked, as after a fault: no reason
    /// is left that somebody would take back. A late handler of a fault from before may revoke it again.
    pub(crate) fn restore(&self, reasons: Reasons) -> Result<StateReport> {
        self.check_process("restore")?;
        let mut turn = self.turn();
        if let Some(range) = &turn.held.sealed {
            return Ok(self.report(range.clone(), WindowState::Sealed, WindowState::Sealed));
        }
        let entry = turn.entry("restore")?;
        let range = entry.range();
        // A handler that has marked it may still fail, and take the mark back.
        entry.drain();
        if entry.state() != State::Revoked {
            return Ok(self.report(range, WindowState::Live, WindowState::Live));
        }
        let left = turn.reasons().without(reasons);
        turn.held.reasons = left;
        if !left.is_empty() {
            return Ok(self.report(range, self.revoked(), self.revoked()));
        }
        if self.truncated_to() == Some(0) {
            return Err(Error::new(ErrorKind::Gone, "restore", self.object())
                .with_reason("its file was truncated, and has no byte of it left")
                .with_advice("restore it when the server has the file whole again"));
        }
        let lock = MmapLock::take();
        let failed = |errno| out_of_memory(errno, "restore", self.object(), self.size);
        let new = self.backing.map(&lock, self.offset, self.size, self.access).map_err(failed)?;
        // SAFETY: the mapping was made above, and nothing else has its address.
        let unmap = || unsafe { mm::munmap(new, self.size) };
        // SAFETY: as above.
        if let Err(errno) = unsafe { mm::keep_from_children(new, self.size) } {
            let _ = unmap();
            return Err(failed(errno));
        }
        // SAFETY: as above.
        unsafe { prefer_huge(&self.backing, new, self.size) };
        // A signal handler of the program that interrupted this thread while the window is busy, and had a fault in
        // it, would repeat its access for ever.
        let signals = SignalsBlocked::new();
        let stopped = entry.stop_if(State::Revoked, State::Restoring).map_err(|_| Errno::EBUSY);
        let result = stopped.and_then(|()| {
            // SAFETY: nothing uses the new mapping, and verbs on this window take turns. No handler
            // replaces the window while its entry is busy.
            let moved = unsafe {
                // So that the pages can be told from another mapping if the call fails.
                mm::keep_from_children(range.start, self.size).and_then(|()| {
                    let moved = async_safe::move_over(new, self.size, range.start);
                    moved.inspect_err(|_| self.after_failed_restore(&lock, &range))
                })
            };
            let state = if moved.is_ok() { State::Live } else { State::Revoked };
            let _ = entry.change(State::Restoring, state);
            moved
        });
        drop(signals);
        if let Err(errno) = result {
            let _ = unmap();
            return Err(failed(errno));
        }
        Ok(self.report(range, self.revoked(), WindowState::Live))
    }

    /// Makes sure that the pages are still there after a move over them failed.
    #[cold]
    fn after_failed_restore(&self, _: &MmapLock, range: &Range<usize>) {
        /// From this version on, a move that is refused keeps what it was to replace.
        const KEEPS: KernelVersion = KernelVersion::new(6, 17);
        match absent::fill_gap(range.start, range.len(), self.access, self.pages) {
            Ok(()) => {}
            Err(Left::Untouched | Left::Unknown) => {
                let shown = maps::still_shows(range, self.pages.in_maps().into(), 0);
                if !shown.unwrap_or_else(|| KernelVersion::running() >= KEEPS) {
                    lost(range);
                }
            }
            Err(Left::Plugged | Left::Hole) => lost(range),
        }
    }

    /// `mseal(2)`: nothing can unmap, replace, move or protect the window any more, not even this crate.
    pub(crate) fn seal(&self) -> Result<StateReport> {
        self.check_process("seal")?;
        let mut turn = self.turn();
        let range = turn.entry("seal")?.range();
        // As in `restore`.
        let signals = SignalsBlocked::new();
        turn.freeze("seal")?;
        // SAFETY: the range is the window's, and is never replaced or unmapped from now on: its entry is
        // removed below, and the owner of the mapping keeps it for ever.
        if let Err(errno) = unsafe { mm::seal(range.start, self.size) } {
            turn.thaw();
            drop(signals);
            let error = Error::os(errno, "seal", self.object());
            return Err(match errno {
                Errno::ENOSYS => error
                    .with_reason("this kernel has no mseal(2)")
                    .with_advice("use Linux 6.10 or newer"),
                _ => error,
            });
        }
        turn.held.sealed = Some(range.clone());
        turn.retire();
        drop(signals);
        Ok(self.report(range, WindowState::Live, WindowState::Sealed))
    }
}
