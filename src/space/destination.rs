//! The place for a new mapping: where the kernel chooses, or in a reservation.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;

use nix::errno::Errno;

use super::cover::try_cover;
use super::revocation::Shown;
use super::{Backing, Failed, Placement, Reservation};
use crate::error::{Error, ErrorKind};
use crate::sys::mm;
use crate::sys::mmap_lock::MmapLock;

pub(super) const HUGE: usize = 2 << 20;
const GIB: usize = 1 << 30;

/// The place for a new mapping.
pub(super) enum Destination {
    /// The kernel chooses.
    Chosen,
    /// The start of a reservation, and whether the caller gave it (else the crate made it).
    Reserved(Reservation, bool),
}

/// Why a mapping was not made, and whether the destination was lost.
pub(super) struct FailedCall {
    pub errno: Errno,
    /// The failing call unmapped the destination, and it could not be reserved again.
    pub lost: bool,
}

impl From<Errno> for FailedCall {
    fn from(errno: Errno) -> Self {
        Self { errno, lost: false }
    }
}

impl Destination {
    /// Makes the reservation that a placement needs, or checks the one that it has.
    #[inline(always)]
    pub(super) fn prepare(
        placement: Placement,
        operation: &'static str,
        object: &dyn fmt::Display,
        file_offset: u64,
        size: usize,
    ) -> std::result::Result<Self, Failed> {
        let (reservation, given) = match placement {
            Placement::Anywhere if size < HUGE => return Ok(Self::Chosen),
            Placement::Anywhere => {
                let modulus = if size < GIB { HUGE } else { GIB };
                (Reservation::congruent(size, modulus, file_offset)?, false)
            }
            Placement::At(address) => (Reservation::at(address, size)?, false),
            Placement::In(reservation) => (reservation, true),
        };
        let unsuitable = if reservation.size() < size {
            Some((
                format!(
                    "{reservation:?} has {:#x} bytes, and {size:#x} are needed",
                    reservation.size()
                ),
                "make a larger reservation".to_owned(),
            ))
        } else if size >= HUGE
            && (reservation.address() as u64 ^ file_offset) & (HUGE as u64 - 1) != 0
        {
            Some((
                format!(
                    "{:#x} is not congruent to offset {file_offset:#x} modulo 2 MiB, which costs a \
                         fault for every page",
                    reservation.address()
                ),
                format!(
                    "use Placement::Anywhere or Reservation::congruent({size:#x}, {HUGE:#x}, {:#x})",
                    file_offset % HUGE as u64
                ),
            ))
        } else {
            None
        };
        match unsuitable {
            None => Ok(Self::Reserved(reservation, given)),
            Some((reason, advice)) => Err(Failed::new(
                Error::new(ErrorKind::UnsuitablePlacement, operation, object)
                    .with_reason(reason)
                    .with_advice(advice),
                given.then_some(reservation),
            )),
        }
    }

    /// Runs a FIXED call over the start of the reservation. If the call fails, the range is reserved as
    /// before, or the error says that it was lost.
    pub(super) fn fixed(
        reservation: &Reservation,
        size: usize,
        call: impl Fn(&MmapLock, usize) -> std::result::Result<(), Errno>,
    ) -> std::result::Result<usize, FailedCall> {
        let address = reservation.address();
        let lock = MmapLock::take();
        let mut made = call(&lock, address);
        if made == Err(Errno::EAGAIN) && reservation.unlock(size) {
            made = call(&lock, address);
        }
        match made {
            Ok(()) => Ok(address),
            Err(errno) => {
                // SAFETY: the failed call has mapped nothing, so nothing of ours but the marker is in the
                // range.
                let restored = unsafe { reservation.restore(&lock, size) };
                Err(FailedCall { errno, lost: !restored })
            }
        }
    }

    /// Unmaps what was just mapped at `address`, of `backing` from `offset` on. Returns false if the
    /// reservation was lost.
    ///
    /// # Safety
    /// `[address, address + size)` is ours, and nothing reads or writes through it.
    pub(super) unsafe fn undo(
        &self,
        backing: &Backing,
        offset: u64,
        address: usize,
        size: usize,
    ) -> bool {
        match self {
            Self::Reserved(reservation, _) => {
                let lock = MmapLock::take();
                // SAFETY: by the contract the range is ours, and nothing uses it.
                unsafe {
                    let cover = || reservation.cover(&lock, size);
                    let shown = Shown::backing(backing, offset);
                    let covered = try_cover(&lock, shown, address..address + size, cover);
                    reservation.clear(&lock, size, covered)
                }
            }
            Self::Chosen => {
                // SAFETY: by the contract the range is ours, and nothing uses it.
                if let Err(errno) = unsafe { mm::munmap(address, size) } {
                    log::error!("leaked the mapping at {address:#x}, {size:#x} bytes: {errno}");
                }
                true
            }
        }
    }

    /// The reservation that goes back to the caller with an error.
    pub(super) fn given_back(self, lost: bool) -> Option<Reservation> {
        match self {
            Self::Reserved(reservation, true) if !lost => Some(reservation),
            _ => None,
        }
    }

    pub(super) fn into_home(self) -> Option<Reservation> {
        match self {
            Self::Chosen => None,
            Self::Reserved(reservation, _) => Some(reservation),
        }
    }
}
