//! Duplicate and relocate: tries the strategies in order until one works.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;

use super::backing::Remap;
use super::cover::{Released, release};
use super::destination::{Destination, FailedCall};
use super::limits::out_of_memory;
use super::mapping::{Object, map_again, may_be_huge};
use super::placement::Order;
use super::revocation::{Control, Shown};
use super::{
    Attempt, Attempts, Failed, Mapping, Outcome, Placement, Report, Request, Reservation, Source,
    Strategy, Verb,
};
use crate::error::{Error, ErrorKind};
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;

/// A new side, made by `strategy`.
struct Made {
    address: usize,
    strategy: Strategy,
    /// Whether it took over the pages of a revoked window.
    pages: bool,
}

/// Why there is no new side, and whether the destination was lost.
struct NotMade {
    error: Error,
    lost: bool,
}

/// The result of a relocation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Relocation {
    /// The old addresses of the window. They are reserved and reach nothing. `None` only if the report's
    /// source is [`Source::Lost`].
    pub old: Option<Reservation>,
    /// Which strategy was used, and why.
    pub report: Report,
}

impl Mapping {
    /// Makes a second mapping of the same bytes.
    #[inline(always)]
    pub(crate) fn duplicate(
        &self,
        access: Access,
        request: Request,
    ) -> Result<(Mapping, Report), Failed> {
        let mut attempts = Attempts::default();
        self.check_process("duplicate")?;
        let swept = self.control.swept();
        if self.control.is_revoked() {
            return Err(request.refused(self.control.refused("duplicate")));
        }
        let Request { placement, order, pinned } = request;
        let mut destination = self.destination("duplicate", placement)?;
        let made =
            self.make(Verb::Duplicate, access, order, pinned, &mut destination, &mut attempts);
        let Made { address, strategy, pages } = match made {
            Ok(made) => made,
            Err(NotMade { error, lost }) => {
                return Err(Failed::new(error, destination.given_back(lost)));
            }
        };
        if pages {
            let error = self.control.refused("duplicate");
            // SAFETY: the new side was made above, and nothing else has its address yet.
            let lost =
                !unsafe { destination.undo(self.backing(), self.offset, address, self.size) };
            return Err(Failed::new(error, destination.given_back(lost)));
        }
        let report = Report {
            verb: Verb::Duplicate,
            strategy,
            attempts,
            from: self.range(),
            to: address..address + self.size,
            source: match strategy {
                Strategy::DontUnmap => Source::Cold,
                Strategy::OldLenZero | Strategy::MapAgain | Strategy::Move => Source::Warm,
            },
        };
        log_report(&self.object(), &report);
        let backing = Arc::clone(self.backing());
        let control = Control::new(backing, self.offset, self.size, access, address);
        control.follow_sweeps(swept);
        let duplicate = Mapping {
            control,
            offset: self.offset,
            address,
            size: self.size,
            access,
            home: destination.into_home(),
            generation: self.generation,
        };
        Ok((duplicate, report))
    }

    /// Moves the mapping to other addresses; the old ones stay reserved.
    #[inline(always)]
    pub(crate) fn relocate(&mut self, request: Request) -> Result<Relocation, Failed> {
        let mut attempts = Attempts::default();
        self.check_process("relocate")?;
        let turn = self.control.turn();
        if let Err(error) = turn.freeze("relocate") {
            return Err(request.refused(error));
        }
        let Request { placement, order, pinned } = request;
        let prepared = self.destination("relocate", placement);
        let mut destination = prepared.inspect_err(|_| turn.thaw())?;
        let (verb, access) = (Verb::Relocate, self.access);
        let made = self.make(verb, access, order, pinned, &mut destination, &mut attempts);
        let Made { address, strategy, .. } = match made {
            Ok(made) => made,
            Err(NotMade { error, lost }) => {
                turn.thaw();
                return Err(Failed::new(error, destination.given_back(lost)));
            }
        };
        let from = self.range();
        let shown = Shown::backing(self.backing(), self.offset);
        let (old, source) = match strategy {
            Strategy::Move => reserve_old(&mut self.home, &from),
            // SAFETY: `&mut self` proves that nothing uses the mapping meanwhile, and it is frozen.
            _ => match unsafe { release(&mut self.home, from.clone(), shown) } {
                Ok(Released::Whole(old)) => (Some(old), Source::Released),
                Ok(Released::WithGap(old)) => (Some(old), Source::ReleasedWithGap),
                Ok(Released::Lost) => (None, Source::Lost),
                Err(errno) => {
                    turn.thaw();
                    // SAFETY: the new side was made above, and nothing else has its address yet.
                    let lost = !unsafe {
                        destination.undo(self.backing(), self.offset, address, self.size)
                    };
                    let error = out_of_memory(errno, "relocate", self.object(), self.size);
                    let error = if lost {
                        error.into_kind(ErrorKind::ReservationLost).with_reason(
                            "the old range could not be covered, and the new range could not be reserved again",
                        )
                    } else if error.kind() == ErrorKind::Os {
                        error.with_reason("the old range could not be covered; nothing has changed")
                    } else {
                        error
                    };
                    return Err(Failed::new(error, destination.given_back(lost)));
                }
            },
        };
        self.address = address;
        self.home = destination.into_home();
        turn.moved(address);
        let report =
            Report { verb: Verb::Relocate, strategy, attempts, from, to: self.range(), source };
        log_report(&self.object(), &report);
        Ok(Relocation { old, report })
    }

    #[inline(always)]
    fn destination(
        &self,
        operation: &'static str,
        placement: Placement,
    ) -> Result<Destination, Failed> {
        let file_offset = self.backing().file_offset(self.offset);
        Destination::prepare(placement, operation, &self.object(), file_offset, self.size)
    }

    /// Tries the strategies in order until one makes a new side.
    ///
    /// Inlined, as are the other steps of a verb, and those of dropping a window: copying their large results took
    /// a fifth of a verb's instructions, and after a call that has flushed the TLB each page of code that they are
    /// spread over costs a walk of the page tables.
    #[inline(always)]
    fn make(
        &self,
        verb: Verb,
        access: Access,
        order: Order,
        pinned: bool,
        destination: &mut Destination,
        attempts: &mut Attempts,
    ) -> Result<Made, NotMade> {
        let operation = match verb {
            Verb::Duplicate => "duplicate",
            Verb::Relocate => "relocate",
        };
        let huge = may_be_huge(self.backing(), self.size);
        let mut pages = false;
        for strategy in order.strategies(verb, huge).into_iter().flatten() {
            let made = match strategy {
                Strategy::DontUnmap => self.by_dont_unmap(access, destination, pinned, &mut pages),
                Strategy::OldLenZero => self.by_old_len_zero(verb, access, destination, pinned),
                Strategy::MapAgain => {
                    map_again(self.backing(), self.offset, self.size, access, destination)
                        .map_err(FailedAttempt::from)
                }
                Strategy::Move => self.by_move(verb, destination),
            };
            let failed = match made {
                Ok(address) => return Ok(Made { address, strategy, pages }),
                Err(failed) => failed,
            };
            attempts.push(Attempt { strategy, outcome: failed.outcome });
            if failed.lost {
                let error = self.refused(operation, attempts).into_kind(ErrorKind::ReservationLost);
                return Err(NotMade { error, lost: true });
            }
            // Since the verb began. A window that is relocated is frozen.
            if self.control.is_revoked() {
                return Err(NotMade { error: self.control.refused(operation), lost: false });
            }
        }
        Err(NotMade { error: self.refused(operation, attempts), lost: false })
    }

    /// This alone takes over whatever is mapped over the window when it is revoked meanwhile. It then sets `pages`. The
    /// kernel does not duplicate private pages by an old length of 0.
    fn by_dont_unmap(
        &self,
        access: Access,
        destination: &Destination,
        probe_again: bool,
        pages: &mut bool,
    ) -> Result<usize, FailedAttempt> {
        self.probe(Remap::DontUnmap, probe_again)?;
        let (address, size) = (self.address, self.size);
        if let Some(hazard) = self.backing().hazard_of_dont_unmap(address, self.offset, size) {
            return Err(FailedAttempt { outcome: Outcome::Hazard(hazard), lost: false });
        }
        let revoked = Cell::new(false);
        let new = match destination {
            Destination::Chosen => {
                let lock = MmapLock::take();
                // SAFETY: the mapping owns its range. Its backing serves faults in it again, since no
                // hazard says otherwise.
                let new = unsafe { mm::dont_unmap(&lock, address, size) };
                revoked.set(self.control.is_revoked_now(&lock));
                new.map_err(FailedCall::from)
            }
            Destination::Reserved(reservation, _) => {
                Destination::fixed(reservation, size, |lock, new| {
                    self.check_source(lock)?;
                    // SAFETY: as above; the reservation owns the new range, and nothing uses it.
                    let made = unsafe { mm::dont_unmap_fixed(lock, address, size, new) };
                    revoked.set(self.control.is_revoked_now(lock));
                    made
                })
            }
        }?;
        // SAFETY: the new side was made above, and nothing else has its address yet.
        let new = unsafe { self.restrict(access, destination, new) }?;
        *pages = revoked.get();
        Ok(new)
    }

    fn by_old_len_zero(
        &self,
        verb: Verb,
        access: Access,
        destination: &Destination,
        probe_again: bool,
    ) -> Result<usize, FailedAttempt> {
        if verb == Verb::Relocate {
            return Err(FailedAttempt { outcome: Outcome::OnlyDuplicates, lost: false });
        }
        self.probe(Remap::OldLenZero, probe_again)?;
        if let Some(hazard) = self.backing().hazard_of_old_len_zero() {
            return Err(FailedAttempt { outcome: Outcome::Hazard(hazard), lost: false });
        }
        let (address, size) = (self.address, self.size);
        let new = match destination {
            Destination::Chosen => {
                mm::old_len_zero(&MmapLock::take(), address, size).map_err(FailedCall::from)
            }
            Destination::Reserved(reservation, _) => {
                Destination::fixed(reservation, size, |lock, new| {
                    self.check_source(lock)?;
                    // SAFETY: the reservation owns the new range, and nothing uses it.
                    unsafe { mm::old_len_zero_fixed(lock, address, size, new) }
                })
            }
        }?;
        // SAFETY: the new side was made above, and nothing else has its address yet.
        unsafe { self.restrict(access, destination, new) }
    }

    /// Fails if the window shows its pages. The kernel has accepted the device, and may refuse these after it has
    /// unmapped the destination of a FIXED call. No verb revokes the window while the lock is held.
    fn check_source(&self, _: &MmapLock) -> Result<(), Errno> {
        if self.control.is_revoked() { Err(Errno::EBUSY) } else { Ok(()) }
    }

    /// Fails if the kernel does not accept `remap` for this backing.
    fn probe(&self, remap: Remap, again: bool) -> Result<(), FailedAttempt> {
        let (probed, remembered) = self.backing().probe(remap, self.offset, again);
        probed.map_err(|errno| {
            let outcome = Outcome::Refused { errno: errno as i32, remembered };
            FailedAttempt { outcome, lost: false }
        })
    }

    /// Takes the right to write from a new side, which has inherited the protection of the mapping, if
    /// `access` says so. If that fails, the new side is unmapped.
    ///
    /// # Safety
    /// The new side at `new` is ours, and nothing has its address yet.
    unsafe fn restrict(
        &self,
        access: Access,
        destination: &Destination,
        new: usize,
    ) -> Result<usize, FailedAttempt> {
        if access == Access::ReadWrite || self.access == Access::ReadOnly {
            return Ok(new);
        }
        // SAFETY: by the contract the range is ours, and nothing uses it.
        if let Err(errno) = unsafe { mm::protect_read_only(new, self.size) } {
            // SAFETY: as above.
            let lost = !unsafe { destination.undo(self.backing(), self.offset, new, self.size) };
            return Err(FailedCall { errno, lost }.into());
        }
        Ok(new)
    }

    fn by_move(&self, verb: Verb, destination: &mut Destination) -> Result<usize, FailedAttempt> {
        if verb == Verb::Duplicate {
            return Err(FailedAttempt { outcome: Outcome::OnlyMoves, lost: false });
        }
        let (address, size) = (self.address, self.size);
        if let Some(hazard) = self.backing().hazard_of_move(address, self.offset, size) {
            return Err(FailedAttempt { outcome: Outcome::Hazard(hazard), lost: false });
        }
        // `mremap` moves a mapping that keeps its size only with MREMAP_FIXED, so it needs a destination.
        let place = match std::mem::replace(destination, Destination::Chosen) {
            Destination::Reserved(reservation, given) => (reservation, given),
            Destination::Chosen => match Reservation::new(size) {
                Ok(reservation) => (reservation, false),
                Err(error) => {
                    let errno = error.errno().map_or(Errno::ENOMEM, Errno::from_raw);
                    return Err(FailedCall::from(errno).into());
                }
            },
        };
        // SAFETY: the mapping owns its range, and `relocate` has `&mut` access to it, so nothing else
        // uses it; the reservation owns the new range, and nothing uses that.
        let moved = Destination::fixed(&place.0, size, |lock, new| unsafe {
            mm::move_fixed(lock, address, size, new)
        });
        *destination = Destination::Reserved(place.0, place.1);
        Ok(moved?)
    }

    /// The error if no strategy worked.
    fn refused(&self, operation: &'static str, attempts: &[Attempt]) -> Error {
        if attempts.is_empty() {
            return Error::new(ErrorKind::Refused, operation, self.object())
                .with_reason("no strategy is allowed")
                .with_advice("name at least one in Placement::by, or use the placement alone");
        }
        let reason = attempts.iter().map(Attempt::to_string).collect::<Vec<_>>().join("; ");
        let errno = attempts.iter().rev().find_map(|attempt| match attempt.outcome {
            Outcome::Refused { errno, .. } => Some(Errno::from_raw(errno)),
            _ => None,
        });
        let hazard = attempts.iter().any(|attempt| matches!(attempt.outcome, Outcome::Hazard(_)));
        let error = match errno {
            Some(errno) => out_of_memory(errno, operation, self.object(), self.size),
            None => Error::new(ErrorKind::Refused, operation, self.object()),
        };
        let error = match error.kind() {
            ErrorKind::TooManyMappings
            | ErrorKind::LockedMemory
            | ErrorKind::AddressSpace
            | ErrorKind::Gone => return error,
            _ if hazard && errno.is_none() => error.into_kind(ErrorKind::Hazard),
            _ => error.into_kind(ErrorKind::Refused),
        };
        let error = error.with_reason(reason);
        if attempts.iter().any(|attempt| attempt.strategy == Strategy::MapAgain) {
            error
        } else {
            error
                .with_advice("allow MapAgain, which works wherever the device's file can be mapped")
        }
    }
}

fn log_report(object: &Object<'_>, report: &Report) {
    if log::log_enabled!(log::Level::Debug) {
        write_report(object, report);
    }
}

#[cold]
fn write_report(object: &Object<'_>, report: &Report) {
    log::debug!("{object}: {report}");
}

/// Reserves the old range of a mapping in `home`, which a move has left as a hole.
fn reserve_old(
    home: &mut Option<Reservation>,
    range: &Range<usize>,
) -> (Option<Reservation>, Source) {
    let lock = MmapLock::take();
    let old = match home.take() {
        // SAFETY: the move left nothing of ours mapped in the range.
        Some(home) => unsafe { home.reserve_again(&lock, range.len()) }.then_some(home),
        None => Reservation::reserve_gap(&lock, range.start, range.len()),
    };
    let source = if old.is_some() { Source::ReleasedWithGap } else { Source::Lost };
    (old, source)
}

/// Why a strategy did not work, and whether the destination was lost.
struct FailedAttempt {
    outcome: Outcome,
    lost: bool,
}

impl From<FailedCall> for FailedAttempt {
    fn from(FailedCall { errno, lost }: FailedCall) -> Self {
        Self { outcome: Outcome::Refused { errno: errno as i32, remembered: false }, lost }
    }
}

#[cfg(test)]
mod tests;
