//! Revoke, restore and seal: one window, those of a BAR, all of a device.

use std::fmt;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::window::Window;
use super::{Device, Holder, Inner, Region};
use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::space::{Control, Reasons, StateReport, WindowState};

/// The program asked for it.
pub(super) const REQUESTED: Reasons = Reasons::of(0);
/// The device is being reset.
pub(super) const RESET: Reasons = Reasons::of(1);
/// This crate switched memory decoding off.
pub(super) const DECODING: Reasons = Reasons::of(2);
/// This crate put the device into low power.
pub(super) const POWER: Reasons = Reasons::of(3);
/// The device is gone.
pub(super) const GONE: Reasons = Reasons::of(4);
/// A write to configuration space put the device into a power state other than D0.
pub(super) const ASLEEP: Reasons = Reasons::of(5);

/// What a program takes back when it restores a window.
const RESTORABLE: Reasons = REQUESTED.and(GONE).and(Reasons::FAULT);

/// Why a window is revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Revoked {
    /// The program asked for it: [`Window::revoke`], [`Region::revoke`], [`Device::revoke`].
    Requested,
    /// The guard contained a fault ([`FaultGuard`](crate::space::FaultGuard)).
    Fault(FaultCause),
    /// [`Device::gone`] found that the device is gone.
    Gone,
    /// The device is being reset, by [`Device::reset`], [`Device::hot_reset`] or a write to
    /// [`Config`](super::Config).
    Reset,
    /// [`Config::set_memory_decoding`](super::Config::set_memory_decoding) or another write to
    /// [`Config`](super::Config) switched it off.
    DecodingOff,
    /// The device is in [low power](super::LowPower), or a write to [`Config`](super::Config) put it into another
    /// state than D0.
    LowPower,
}

/// What explains a fault, as far as the crate can find out when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultCause {
    /// The file behind the window was truncated.
    Truncated,
    /// The device is gone.
    Gone,
    /// Memory decoding is off (PCI 3.0 §6.2.2).
    DecodingOff,
    /// The device is in a power state other than D0 (PCI Power Management 1.2 §3.2.4).
    LowPower,
    /// None of these, now.
    Unknown,
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Requested => "the program revoked it",
            Self::Fault(FaultCause::Truncated) => "an access faulted: its file was truncated",
            Self::Fault(FaultCause::Gone) => "an access faulted: the device is gone",
            Self::Fault(FaultCause::DecodingOff) => "an access faulted: memory decoding is off",
            Self::Fault(FaultCause::LowPower) => "an access faulted: the device is in low power",
            Self::Fault(FaultCause::Unknown) => "an access faulted",
            Self::Gone => "the device is gone",
            Self::Reset => "the device is being reset",
            Self::DecodingOff => "memory decoding is off",
            Self::LowPower => "the device is in low power",
        })
    }
}

impl Window {
    /// Revokes the window: in one step, it no longer reaches the device. Loads answer all ones, as those of a
    /// card that was pulled do; stores go nowhere. Addresses, registers and clones stay what they are, the
    /// device is not touched, and threads that use registers meanwhile notice by the values only.
    ///
    /// A word that is stored may read back until the window is restored. A window that is larger than
    /// [`revocable_size`](crate::space::revocable_size) was when it was mapped reads zeros instead of ones:
    /// [`reads_ones_when_revoked`](Self::reads_ones_when_revoked). Duplicates are windows of their own, which
    /// [`Region::revoke`] and [`Device::revoke`] reach. Memory that was mapped for peer-to-peer DMA
    /// ([`dma_memory`](Self::dma_memory)) still reaches the device.
    ///
    /// A revoked window that is revoked again stays so, and is no error.
    ///
    /// # Errors
    /// `Sealed`; `Gone` in a child of `fork(2)`; `TooManyMappings`, `LockedMemory`, `AddressSpace` (RLIMIT_DATA
    /// counts the pages of a revoked window). The window has not changed then.
    pub fn revoke(&self) -> Result<StateReport> {
        self.control().revoke(REQUESTED)
    }

    /// Restores the window: it reaches the device again, at the same addresses.
    ///
    /// A window that is not revoked, or is sealed, stays as it is, and is no error. A
    /// [fault from before](crate::space::FaultGuard#a-fault-from-before) that is handled late revokes it again. Memory
    /// that another process has truncated is restored as far as it is still there. Peer-to-peer mappings that a reset could not map again, because
    /// their window was revoked, are mapped again.
    ///
    /// # Errors
    /// `Revoked` while a call of this crate keeps the device away: a reset, [low power](super::LowPower), or
    /// a write to [`Config`](super::Config) that switched memory decoding off or left D0.
    /// `Gone` if the device was removed, its file has no byte of the window left, or in a child of
    /// `fork(2)`; the kernel's error. The window stays revoked then. That of a peer-to-peer mapping that could not
    /// be mapped again: the window is restored then, and the next restore tries again.
    pub fn restore(&self) -> Result<StateReport> {
        if self.inner.mapping.is_inherited() {
            // It fails, and waits for no lock.
            return self.control().restore(RESTORABLE);
        }
        let device = self.inner.device();
        let (result, lost) = device.inner.restoring(|| restore(&device, self.control()));
        match lost.into_iter().next() {
            Some(error) if result.is_ok() => Err(error),
            _ => result,
        }
    }

    /// Seals the window (`mseal(2)`, Linux 6.10): nothing in this process can unmap it, move it, revoke it or
    /// map something over it until the process ends, not even by mistake.
    ///
    /// The window and its device stay in use until then: [`Device::close`] names it. The
    /// [guard](crate::space::FaultGuard) does not contain faults in it.
    ///
    /// # Errors
    /// The window, with `Unsupported` on an older kernel, `Revoked`, or `Sealed`.
    pub fn seal(self) -> std::result::Result<(SealedWindow, StateReport), NotSealed> {
        match self.control().seal() {
            Ok(report) => {
                // Never dropped, so that neither the mapping nor the device behind it is.
                std::mem::forget(self.clone());
                Ok((SealedWindow(self), report))
            }
            Err(error) => Err(NotSealed { error, window: self }),
        }
    }

    /// Whether the window is revoked: one atomic load.
    #[inline]
    pub fn is_revoked(&self) -> bool {
        self.control().is_revoked()
    }

    /// Why the window is revoked; `None` if it is not.
    ///
    /// The cause of a fault is what the crate finds now: it looks at the file behind the window and at
    /// configuration space.
    pub fn revoked(&self) -> Option<Revoked> {
        let (device, control) = (self.inner.device(), self.control());
        reason(control.reasons(), || {
            if control.truncated_to().is_some() {
                return FaultCause::Truncated;
            }
            device.fault_cause()
        })
    }

    /// Whether the window reads all ones when it is revoked. Otherwise it reads zeros, because it was larger than
    /// [`revocable_size`](crate::space::revocable_size) when it was mapped, or there was no memory.
    pub fn reads_ones_when_revoked(&self) -> bool {
        self.control().reads_ones()
    }

    /// Whether the window reaches no device: it is revoked, or the [device is gone](Device::gone). For a driver
    /// that has read all ones, or whose device does not do what it was told.
    ///
    /// It never guesses from the value of a register. If the window is not revoked, it asks the device's
    /// configuration space, which takes microseconds.
    pub fn gone(&self) -> bool {
        self.is_revoked() || self.inner.device().gone()
    }

    #[inline]
    fn control(&self) -> &Arc<Control> {
        self.inner.mapping.control()
    }
}

fn reason(reasons: Reasons, cause: impl FnOnce() -> FaultCause) -> Option<Revoked> {
    if reasons.is_empty() {
        return None;
    }
    let known = [
        (GONE, Revoked::Gone),
        (RESET, Revoked::Reset),
        (DECODING, Revoked::DecodingOff),
        (POWER, Revoked::LowPower),
        (ASLEEP, Revoked::LowPower),
        (REQUESTED, Revoked::Requested),
    ];
    let known = known.into_iter().find(|(bit, _)| reasons.contains(*bit));
    Some(known.map_or_else(|| Revoked::Fault(cause()), |(_, why)| why))
}

fn restore(device: &Device, control: &Control) -> Result<StateReport> {
    let report = control.restore(RESTORABLE)?;
    if !matches!(report.after, WindowState::Revoked { .. }) {
        return Ok(report);
    }
    let why = reason(control.reasons(), || FaultCause::Unknown);
    let object = format!("a window of {}", device.name());
    Err(Error::new(ErrorKind::Revoked, "restore", object)
        .with_reason(why.map_or_else(|| "it was revoked again".to_owned(), |why| why.to_string()))
        .with_advice("end that first: it restores the window"))
}

/// What a verb did to several windows. Its `Display` is a sentence.
#[derive(Debug, Default)]
#[must_use = "it has the errors"]
#[non_exhaustive]
pub struct WindowChanges {
    /// A report for each window, in no particular order.
    pub reports: Vec<StateReport>,
    /// An error for each window that could not be changed: sealed ones, and those that the kernel refused. After a
    /// restore also for each peer-to-peer mapping that could not be mapped again: see [`Window::restore`].
    pub errors: Vec<Error>,
}

impl WindowChanges {
    pub(super) fn add(&mut self, result: Result<StateReport>) {
        match result {
            Ok(report) => self.reports.push(report),
            Err(error) => self.errors.push(error),
        }
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.reports.append(&mut other.reports);
        self.errors.append(&mut other.errors);
    }

    /// How many windows have changed.
    pub fn changed(&self) -> usize {
        self.reports.iter().filter(|report| report.has_changed()).count()
    }

    /// The first error, if there is one.
    ///
    /// # Errors
    /// The first of [`errors`](Self::errors).
    pub fn into_result(self) -> Result<Vec<StateReport>> {
        match self.errors.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(self.reports),
        }
    }
}

impl fmt::Display for WindowChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.reports.len() + self.errors.len();
        write!(f, "changed {} of {all} windows", self.changed())?;
        for error in &self.errors {
            write!(f, "; {error}")?;
        }
        Ok(())
    }
}

impl Region<'_> {
    /// Revokes all windows over the region, duplicates and parts included: see [`Window::revoke`].
    pub fn revoke(&self) -> WindowChanges {
        let region = Some(self.index());
        self.device().inner.each_window(region, |control| control.revoke(REQUESTED))
    }

    /// Restores all windows over the region: see [`Window::restore`].
    pub fn restore(&self) -> WindowChanges {
        self.device().restore_windows(Some(self.index()))
    }
}

impl Device {
    /// Revokes all windows of the device: see [`Window::revoke`]. Trapped registers still reach it.
    pub fn revoke(&self) -> WindowChanges {
        self.inner.each_window(None, |control| control.revoke(REQUESTED))
    }

    /// Restores all windows of the device: see [`Window::restore`].
    pub fn restore(&self) -> WindowChanges {
        self.restore_windows(None)
    }

    fn restore_windows(&self, of: Option<u32>) -> WindowChanges {
        let restore = || self.inner.each_window(of, |control| restore(self, control));
        if self.inner.is_inherited() {
            return restore();
        }
        let (mut changes, mut lost) = self.inner.restoring(restore);
        changes.errors.append(&mut lost);
        changes
    }

    /// An eventfd that becomes readable when the [guard](crate::space::FaultGuard) contains a fault in a window
    /// of this device, from now on. Reading its eight bytes resets it. [`Window::revoked`] says which windows are
    /// revoked and why.
    ///
    /// # Errors
    /// `Os` if the process has no descriptor left.
    pub fn contained_faults(&self) -> Result<BorrowedFd<'_>> {
        self.inner.group.eventfd().map_err(|errno| Error::os(errno, "make", "an eventfd"))
    }
}

impl Inner {
    /// Does something to each window, of one region or of all. An error in a child of `fork(2)`.
    pub(super) fn each_window(
        &self,
        of: Option<u32>,
        act: impl Fn(&Control) -> Result<StateReport>,
    ) -> WindowChanges {
        let mut changes = WindowChanges::default();
        if self.is_inherited() {
            // The locks may be held for ever by a thread that only the parent has.
            let error = Error::new(ErrorKind::Gone, "change the windows of", &self.info.name)
                .with_reason("children of fork do not inherit windows");
            changes.add(Err(error));
            return changes;
        }
        // A window is in this list until it is about to be unmapped, and cannot leave it meanwhile.
        for (_, holder) in self.holders().iter() {
            if let Holder::Window { region, control, .. } = holder
                && of.is_none_or(|of| of == *region)
            {
                let result = act(control);
                // Another thread may be about to take it off the list.
                if result.is_ok() || !control.is_unmapped() {
                    changes.add(result);
                }
            }
        }
        changes
    }
}

/// A window that nothing can unmap, move or revoke until the process ends: see [`Window::seal`]. Dropping it
/// leaves the window mapped, and its device open.
///
/// It dereferences to the [`Window`]: registers are made and duplicates are as of any other.
#[derive(Clone, Debug)]
pub struct SealedWindow(Window);

impl Deref for SealedWindow {
    type Target = Window;

    fn deref(&self) -> &Window {
        &self.0
    }
}

/// A window that could not be sealed, and why.
///
/// `?` converts it into its [`Error`] and drops the window.
#[derive(Debug)]
pub struct NotSealed {
    error: Error,
    window: Window,
}

impl NotSealed {
    /// The window, unchanged.
    pub fn into_window(self) -> Window {
        self.window
    }
}

gives_back!(NotSealed { window: Window }, "The error, and the window, unchanged.");
