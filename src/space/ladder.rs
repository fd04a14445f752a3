//! Duplicate and relocate: the ladder of strategies.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::sync::Arc;

use nix::errno::Errno;

use super::limits::out_of_memory;
use super::mapping::{Destination, Refusal, Released, map_again};
use super::{
    Attempt, Attempts, Failed, Mapping, Outcome, Report, Request, Reservation, Source, Strategy,
    Verb,
};
use crate::error::{Error, ErrorKind};
use crate::sys::mm::{self, Access};
use crate::sys::turn::Turn;

/// A new side, made by `strategy`.
struct Made {
    address: usize,
    strategy: Strategy,
    destination: Destination,
}

/// What a relocation leaves besides the window itself.
#[derive(Debug)]
#[non_exhaustive]
pub struct Relocation {
    /// The addresses that the window has left, reserved: they reach nothing. `None` only where the
    /// report's source is [`Source::Lost`].
    pub old: Option<Reservation>,
    /// Which way it took and why.
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
        let Made { address, strategy, destination } =
            self.make(Verb::Duplicate, access, request, &mut attempts)?;
        let report = Report {
            verb: Verb::Duplicate,
            strategy,
            attempts,
            from: self.range(),
            to: address..address + self.len,
            source: match strategy {
                Strategy::DontUnmap => Source::Cold,
                Strategy::MapAgain | Strategy::Move => Source::Warm,
            },
        };
        log::debug!("{}: {report}", self.object());
        let duplicate = Mapping {
            backing: Arc::clone(&self.backing),
            offset: self.offset,
            address,
            len: self.len,
            access,
            home: destination.into_home(),
            generation: self.generation,
        };
        Ok((duplicate, report))
    }

    /// Takes the mapping elsewhere; its old addresses stay reserved.
    #[inline(always)]
    pub(crate) fn relocate(&mut self, request: Request) -> Result<Relocation, Failed> {
        let mut attempts = Attempts::default();
        let Made { address, strategy, destination } =
            self.make(Verb::Relocate, self.access, request, &mut attempts)?;
        let from = self.range();
        let (old, source) = match strategy {
            Strategy::Move => self.reserve_gap(),
            // SAFETY: `&mut self` says that nobody uses the mapping meanwhile.
            Strategy::DontUnmap | Strategy::MapAgain => match unsafe { self.release() } {
                Ok(Released::Whole(old)) => (Some(old), Source::Released),
                Ok(Released::WithGap(old)) => (Some(old), Source::ReleasedWithGap),
                Ok(Released::Lost) => (None, Source::Lost),
                Err(errno) => {
                    // SAFETY: the new side was made above, and nobody knows of it yet.
                    let lost =
                        !unsafe { destination.undo(&self.backing, self.offset, address, self.len) };
                    let error = out_of_memory(errno, "relocate", self.object(), self.len);
                    let error = if lost {
                        error.into_kind(ErrorKind::ReservationLost).because(
                            "the old range could not be covered, and the new not be reserved again",
                        )
                    } else if error.kind() == ErrorKind::Os {
                        error.because("the old range could not be covered; nothing has changed")
                    } else {
                        error
                    };
                    return Err(Failed::new(error, destination.given_back(lost)));
                }
            },
        };
        self.address = address;
        self.home = destination.into_home();
        let report =
            Report { verb: Verb::Relocate, strategy, attempts, from, to: self.range(), source };
        log::debug!("{}: {report}", self.object());
        Ok(Relocation { old, report })
    }

    /// Climbs down the ladder until a strategy makes a new side.
    ///
    /// Inlined, as are the steps of a verb in `mapping`: moving their large results about was a fifth of
    /// a verb's instructions.
    #[inline(always)]
    fn make(
        &self,
        verb: Verb,
        access: Access,
        request: Request,
        attempts: &mut Attempts,
    ) -> Result<Made, Failed> {
        let Request { placement, strategies, pinned } = request;
        let operation = match verb {
            Verb::Duplicate => "duplicate",
            Verb::Relocate => "relocate",
        };
        self.check_process(operation)?;
        let file_offset = self.backing.file_offset(self.offset);
        let mut destination =
            Destination::prepare(placement, operation, &self.object(), file_offset, self.len)?;
        for strategy in strategies.into_iter().flatten() {
            let made = match strategy {
                Strategy::DontUnmap => self.by_dont_unmap(access, &destination, pinned),
                Strategy::MapAgain => {
                    map_again(&self.backing, self.offset, self.len, access, &destination)
                        .map_err(Rejection::from)
                }
                Strategy::Move => self.by_move(verb, &mut destination),
            };
            let rejection = match made {
                Ok(address) => return Ok(Made { address, strategy, destination }),
                Err(rejection) => rejection,
            };
            attempts.push(Attempt { strategy, outcome: rejection.outcome });
            if rejection.lost {
                let error = self.refused(operation, attempts).into_kind(ErrorKind::ReservationLost);
                return Err(Failed::new(error, destination.given_back(true)));
            }
        }
        let error = self.refused(operation, attempts);
        Err(Failed::new(error, destination.given_back(false)))
    }

    fn by_dont_unmap(
        &self,
        access: Access,
        destination: &Destination,
        ask_again: bool,
    ) -> Result<usize, Rejection> {
        let (answer, remembered) = self.backing.probe(self.offset, ask_again);
        if let Err(errno) = answer {
            let outcome = Outcome::Refused { errno: errno as i32, remembered };
            return Err(Rejection { outcome, lost: false });
        }
        let (address, len) = (self.address, self.len);
        if let Some(hazard) = self.backing.distrust_dont_unmap(address, self.offset, len) {
            return Err(Rejection { outcome: Outcome::Hazard(hazard), lost: false });
        }
        let new = match destination {
            Destination::Chosen => {
                // SAFETY: the mapping owns its range, and its backing fills it again.
                unsafe { mm::dont_unmap(&Turn::take(), address, len) }.map_err(Refusal::from)
            }
            Destination::Reserved(reservation, _) => {
                // SAFETY: as above; the reservation owns the new range, and nothing uses it.
                Destination::fixed(reservation, len, |turn, new| unsafe {
                    mm::dont_unmap_fixed(turn, address, len, new)
                })
            }
        }?;
        if access == Access::ReadOnly && self.access == Access::ReadWrite {
            // SAFETY: the new side was made above, and nobody knows of it yet.
            if let Err(errno) = unsafe { mm::protect_read_only(new, len) } {
                // SAFETY: as above.
                let lost = !unsafe { destination.undo(&self.backing, self.offset, new, len) };
                return Err(Refusal { errno, lost }.into());
            }
        }
        Ok(new)
    }

    fn by_move(&self, verb: Verb, destination: &mut Destination) -> Result<usize, Rejection> {
        if verb == Verb::Duplicate {
            return Err(Rejection { outcome: Outcome::OnlyMoves, lost: false });
        }
        let (address, len) = (self.address, self.len);
        if let Some(hazard) = self.backing.distrust_move(address, self.offset, len) {
            return Err(Rejection { outcome: Outcome::Hazard(hazard), lost: false });
        }
        // A mapping that keeps its size moves only where it is told to.
        let place = match std::mem::replace(destination, Destination::Chosen) {
            Destination::Reserved(reservation, given) => (reservation, given),
            Destination::Chosen => match Reservation::new(len) {
                Ok(reservation) => (reservation, false),
                Err(error) => {
                    let errno = error.errno().map_or(Errno::ENOMEM, Errno::from_raw);
                    return Err(Refusal::from(errno).into());
                }
            },
        };
        // SAFETY: the mapping owns its range and `relocate` holds it exclusively; the reservation
        // owns the new range, and nothing uses it.
        let moved = Destination::fixed(&place.0, len, |turn, new| unsafe {
            mm::move_fixed(turn, address, len, new)
        });
        *destination = Destination::Reserved(place.0, place.1);
        Ok(moved?)
    }

    /// Reserves the hole that a move has left.
    fn reserve_gap(&mut self) -> (Option<Reservation>, Source) {
        let turn = Turn::take();
        let old = match self.home.take() {
            // SAFETY: the move has taken everything of ours out of the range.
            Some(home) => unsafe { home.fill(&turn, self.len) }.then_some(home),
            None => Reservation::over_gap(&turn, self.address, self.len),
        };
        let source = if old.is_some() { Source::ReleasedWithGap } else { Source::Lost };
        (old, source)
    }

    /// The error of a ladder of which no rung has held.
    fn refused(&self, operation: &'static str, attempts: &[Attempt]) -> Error {
        let reason = attempts.iter().map(Attempt::to_string).collect::<Vec<_>>().join("; ");
        let errno = attempts.iter().rev().find_map(|attempt| match attempt.outcome {
            Outcome::Refused { errno, .. } => Some(Errno::from_raw(errno)),
            _ => None,
        });
        let hazard = attempts.iter().any(|attempt| matches!(attempt.outcome, Outcome::Hazard(_)));
        let error = match errno {
            Some(errno) => out_of_memory(errno, operation, self.object(), self.len),
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
        let error = error.because(reason);
        if attempts.iter().any(|attempt| attempt.strategy == Strategy::MapAgain) {
            error
        } else {
            error.remedy("allow MapAgain, which works wherever the device's file can be mapped")
        }
    }
}

/// Why a rung did not hold, and whether it has cost the destination.
struct Rejection {
    outcome: Outcome,
    lost: bool,
}

impl From<Refusal> for Rejection {
    fn from(Refusal { errno, lost }: Refusal) -> Self {
        Self { outcome: Outcome::Refused { errno: errno as i32, remembered: false }, lost }
    }
}

#[cfg(test)]
mod tests;
