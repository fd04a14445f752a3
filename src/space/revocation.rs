//! Revoke and restore: a window that reaches its device, or pages that read as if the device were not there.
//!
//! Verbs on one window take turns by a lock. The [guard](FaultGuard) acts in a signal handler and takes none:
//! what the two do at once is decided by the state of the window's entry in the [`registry`].

#![expect(unsafe_code, reason = "addresses are owned by convention")]

mod absent;
mod atomic;
mod guard;
mod registry;
mod report;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;

use super::Backing;
use super::KernelVersion;
use super::limits::out_of_memory;
use super::mapping::{Object, prefer_huge};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::async_safe::{self, SignalsBlocked};
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{eventfd, file, fork, maps};
use absent::{Left, Pages};
use registry::{Entry, Registry, Slot, State};

pub use absent::{revocable_size, set_revocable_size};
pub use guard::{FaultGuard, FaultScope};
pub use report::{StateReport, WindowState};

/// Why a window is revoked: a set. It is restored when none is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reasons(u8);

impl Reasons {
    /// The guard has contained a fault.
    pub(crate) const FAULT: Self = Self(1);

    /// A reason that the user of this module gives a meaning, 0 to 6.
    pub(crate) const fn of(number: u8) -> Self {
        Self(2 << number)
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    pub(crate) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
}

/// Windows that a fault in one of them may revoke together: those of a device. Aligned so that a pointer to it has
/// room for the rest of a [note](Group::note).
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Group {
    eventfd: OnceLock<OwnedFd>,
    /// The eventfd, for a signal handler; -1 if there is none.
    fd: AtomicI32,
    /// How often a handler has revoked all of them.
    sweeps: AtomicU64,
}

impl Default for Group {
    fn default() -> Self {
        Self { eventfd: OnceLock::new(), fd: AtomicI32::new(-1), sweeps: AtomicU64::new(0) }
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
    const OTHERS: usize = align_of::<Self>() - 1;

    /// What a handler is told of a window: the group, whether the window can be written, and its pages.
    fn note(self: &Arc<Self>, access: Access, pages: Pages) -> usize {
        const { assert!(2 << Pages::BITS <= align_of::<Group>()) };
        let others = usize::from(access == Access::ReadWrite) | pages.bits() << 1;
        ptr::from_ref::<Self>(self).expose_provenance() | others
    }

    fn of_note(note: usize) -> (Access, Pages) {
        let access = if note & 1 == 1 { Access::ReadWrite } else { Access::ReadOnly };
        (access, Pages::from_bits((note & Self::OTHERS) >> 1))
    }
}

/// The registry, and the process that made it: a child of `fork(2)` has none of its parent's windows.
struct Current {
    generation: u32,
    registry: Registry,
}

static CURRENT: AtomicPtr<Current> = AtomicPtr::new(ptr::null_mut());

/// The registry of this process, if a window was mapped in it. For signal handlers, too.
fn current() -> Option<&'static Registry> {
    // SAFETY: only pointers to leaked values are stored.
    let current = unsafe { CURRENT.load(Ordering::Acquire).as_ref() }?;
    (current.generation == fork::generation_in_handler()).then_some(&current.registry)
}

fn registry() -> &'static Registry {
    const FIRST: usize = 64;
    if let Some(registry) = current() {
        return registry;
    }
    let generation = fork::generation();
    let _lock = MmapLock::take();
    if let Some(registry) = current() {
        return registry;
    }
    // In a child the parent's stays as it is: another thread may have been about to change it.
    let new = Box::leak(Box::new(Current { generation, registry: Registry::new(FIRST) }));
    CURRENT.store(new, Ordering::Release);
    &new.registry
}

/// What can be done to a window without owning it: to revoke and to restore it.
pub(crate) struct Control {
    pub(super) backing: Arc<Backing>,
    offset: u64,
    size: usize,
    access: Access,
    /// What it shows when it is revoked.
    pages: Pages,
    generation: u32,
    /// The entry in `held`; null if there is none.
    entry: AtomicPtr<Entry>,
    held: Mutex<Held>,
}

struct Held {
    /// `None` once the window is unmapped or sealed.
    slot: Option<Slot>,
    /// Empty while the window is live, and if a handler has revoked it.
    reasons: Reasons,
    /// Where it is, if it is sealed.
    sealed: Option<Range<usize>>,
}

/// The right to do something to a window.
pub(super) struct Turn<'a> {
    control: &'a Control,
    held: MutexGuard<'a, Held>,
}

impl Control {
    /// Registers a window that was mapped at `address`.
    pub(super) fn new(
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

    /// Waits for verbs on the same window to end. Not for a child of `fork(2)`.
    pub(super) fn turn(&self) -> Turn<'_> {
        Turn { control: self, held: self.held.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Whether the window is revoked.
    #[inline]
    pub(crate) fn is_revoked(&self) -> bool {
        let state = self.entry().map(Entry::state);
        matches!(state, Some(State::Revoking | State::Revoked | State::Restoring))
    }

    fn entry(&self) -> Option<&'static Entry> {
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

    pub(super) fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    fn object(&self) -> Object<'_> {
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
        // A signal handler of the program that interrupted this thread after the mark, and had a fault in this
        // window, would repeat its access for ever.
        let signals = SignalsBlocked::new();
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

    /// Replaces the window by its pages, after its entry was marked. On failure the window is what it was.
    ///
    /// # Safety
    /// The window stays mapped at its range.
    unsafe fn replace_marked(&self, _: &MmapLock, entry: &Entry) -> std::result::Result<(), Errno> {
        let range = entry.range();
        // SAFETY: by the contract.
        let result = unsafe { absent::replace(range.start, self.size, self.access, self.pages) };
        if let Err(refused) = &result {
            let is_intact = match refused.left {
                Left::Untouched => true,
                Left::Unknown => self.is_shown(&range),
                Left::Plugged | Left::Hole => false,
            };
            if !is_intact {
                lost(&range);
            }
        }
        let state = if result.is_ok() { State::Revoked } else { State::Live };
        let _ = entry.change(State::Revoking, state);
        result.map_err(|refused| refused.errno)
    }

    /// Whether the device is mapped in the range, and not what another thread has mapped. False if that cannot be
    /// found out.
    #[cold]
    fn is_shown(&self, range: &Range<usize>) -> bool {
        let offset = self.backing.file_offset(self.offset);
        let file = file::identity(self.backing.fd());
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
        // As in `revoke`.
        let signals = SignalsBlocked::new();
        let stopped = entry.stop_if(State::Revoked, State::Restoring).map_err(|_| Errno::EBUSY);
        let result = stopped.and_then(|()| {
            // SAFETY: nothing uses the new mapping, and verbs on this window take turns. No handler
            // replaces the window while its entry is busy.
            let moved = unsafe { async_safe::move_over(new, self.size, range.start) };
            if moved.is_err() {
                self.after_failed_restore(&lock, &range);
            }
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
                let shown = maps::still_shows(range, self.pages.in_maps(), 0);
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
        // As in `revoke`.
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

impl<'a> Turn<'a> {
    fn entry(&self, operation: &'static str) -> Result<&'static Entry> {
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

    fn reasons(&self) -> Reasons {
        match &self.held.slot {
            Some(slot) if [State::Revoking, State::Revoked].contains(&slot.entry.state()) => {
                match self.held.reasons {
                    reasons if reasons.is_empty() => Reasons::FAULT,
                    reasons => reasons,
                }
            }
            _ => Reasons::default(),
        }
    }

    fn refused(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Revoked, operation, self.control.object())
            .with_reason("the window is revoked")
            .with_advice("restore it first: Window::restore")
    }

    /// Fails if the window is revoked.
    pub(super) fn check(&self, operation: &'static str) -> Result<()> {
        if self.is_sealed() {
            return Ok(());
        }
        match self.entry(operation)?.state() {
            State::Revoking | State::Revoked => Err(self.refused(operation)),
            _ => Ok(()),
        }
    }

    /// As [`check`](Self::check), after handlers that were about to revoke the window have done so.
    pub(super) fn check_settled(&self, operation: &'static str) -> Result<()> {
        if let Some(slot) = &self.held.slot {
            slot.entry.drain();
        }
        self.check(operation)
    }

    /// Keeps handlers from revoking the window until [`thaw`](Self::thaw), [`moved`](Self::moved) or
    /// [`retire`](Self::retire): accesses that fault meanwhile are repeated. Fails if the window is revoked
    /// or sealed.
    pub(super) fn freeze(&self, operation: &'static str) -> Result<()> {
        let entry = self.entry(operation)?;
        entry.stop_if(State::Live, State::Busy).map_err(|_| self.refused(operation))
    }

    /// Ends a [`freeze`](Self::freeze): the window is what it was.
    pub(super) fn thaw(&self) {
        if let Some(slot) = &self.held.slot {
            let _ = slot.entry.change(State::Busy, State::Live);
        }
    }

    /// How often handlers have revoked all windows of the group.
    pub(super) fn sweeps(&self) -> u64 {
        self.control.backing.group().sweeps.load(Ordering::Acquire)
    }

    /// Ends a [`freeze`](Self::freeze): the window is at `address` now. If a handler has revoked the group since
    /// there were `sweeps`, the window is revoked, too.
    pub(super) fn moved(&mut self, address: usize, sweeps: u64) {
        let control = self.control;
        let range = address..address + control.size;
        let note = control.backing.group().note(control.access, control.pages);
        let slot = registry().insert(&range, note);
        control.entry.store(ptr::from_ref(slot.entry).cast_mut(), Ordering::Release);
        if let Some(old) = self.held.slot.replace(slot) {
            registry().remove(old);
        }
        if self.sweeps() != sweeps
            && let Some(slot) = &self.held.slot
        {
            let lock = MmapLock::take();
            // SAFETY: the window stays mapped at its range during this turn. If it is not revoked, it has its own
            // fault later.
            let _ =
                slot.entry.mark() && unsafe { control.replace_marked(&lock, slot.entry) }.is_ok();
        }
    }

    /// Removes the window from the registry. When this returns, no handler changes its range.
    pub(super) fn retire(&mut self) {
        self.control.entry.store(ptr::null_mut(), Ordering::Release);
        if let Some(slot) = self.held.slot.take() {
            registry().remove(slot);
        }
    }

    /// Keeps handlers from the window, whether it is revoked or not, as [`retire`](Self::retire) does. Returns
    /// what [`resume`](Self::resume) takes.
    pub(super) fn suspend(&self) -> Option<State> {
        self.held.slot.as_ref().map(|slot| slot.entry.stop(State::Busy))
    }

    /// Ends [`suspend`](Self::suspend).
    pub(super) fn resume(&self, before: Option<State>) {
        if let (Some(slot), Some(before)) = (&self.held.slot, before) {
            let _ = slot.entry.change(State::Busy, before);
        }
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.held.sealed.is_some()
    }

    /// What the window shows in this state.
    pub(super) fn shown(&self, state: Option<State>) -> Shown {
        let Control { backing, offset, pages, .. } = self.control;
        match state {
            Some(State::Revoked) => Shown { file: pages.identity(), offset: 0 },
            _ => Shown::backing(backing, *offset),
        }
    }
}

/// What is mapped at the addresses of a window: the file, if it can be told from others, and the offset in it.
#[derive(Clone, Copy)]
pub(super) struct Shown {
    pub file: Option<(u64, u64)>,
    pub offset: u64,
}

impl Shown {
    /// A live mapping of `backing` from `offset` of the region on.
    pub(super) fn backing(backing: &Backing, offset: u64) -> Self {
        Self { file: backing.identity, offset: backing.file_offset(offset) }
    }
}

/// Makes sure that a window of `size` bytes can be revoked: see [`revocable_size`].
pub(super) fn prepare(size: usize) {
    absent::prepare(size);
}

/// Ends the process. After a call that replaces a mapping of which registers exist, something else is mapped
/// there, or nothing, and no other answer keeps those registers from reading and writing what is not theirs.
///
/// The kernel unmaps and maps in one call, and fails in between only if it has no memory for its own tables;
/// and then it must have refused the pages once more, or another thread must have mapped something at just these
/// addresses before they were filled again.
#[cold]
fn lost(range: &Range<usize>) -> ! {
    log::error!(
        "the kernel unmapped a window at {:#x}..{:#x} in a call that failed, and it could not be filled again",
        range.start,
        range.end
    );
    std::process::abort()
}
