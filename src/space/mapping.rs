//! One mapping of a backing: made, placed, undone.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;

use super::limits::out_of_memory;
use super::reservation::Uncovered;
use super::{Backing, BackingKind, Failed, Placement, Reservation};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mm::{self, Access};
use crate::sys::turn::Turn;
use crate::sys::{fork, maps};

const HUGE: usize = 2 << 20;
const GIB: usize = 1 << 30;

/// `len` bytes of a backing from `offset` on, mapped at `address`: one VMA, owned.
///
/// Dropping it leaves nothing mapped; where it was placed in a reservation, the range is reserved
/// again.
pub(crate) struct Mapping {
    pub(super) backing: Arc<Backing>,
    pub(super) offset: u64,
    pub(super) address: usize,
    pub(super) len: usize,
    pub(super) access: Access,
    /// The reservation at whose start the mapping lies.
    pub(super) home: Option<Reservation>,
    /// The process that made it: see [`fork::generation`].
    pub(super) generation: u32,
}

/// A place for a mapping, found or about to be found.
pub(super) enum Destination {
    /// The kernel chooses.
    Chosen,
    /// The start of a reservation that we made, or that the caller gave (`true`).
    Reserved(Reservation, bool),
}

/// A mapping that was not made, and what that has cost.
pub(super) struct Refusal {
    pub errno: Errno,
    /// The destination was unmapped by the failing call, and somebody else has taken it.
    pub lost: bool,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, lost: false }
    }
}

impl Destination {
    /// Reserves what a placement needs, and checks what it brings.
    #[inline(always)]
    pub(super) fn prepare(
        placement: Placement,
        operation: &'static str,
        object: &dyn fmt::Display,
        file_offset: u64,
        len: usize,
    ) -> std::result::Result<Self, Failed> {
        let (reservation, given) = match placement {
            Placement::Anywhere if len < HUGE => return Ok(Self::Chosen),
            Placement::Anywhere => {
                let modulus = if len < GIB { HUGE } else { GIB };
                (Reservation::congruent(len, modulus, file_offset)?, false)
            }
            Placement::At(address) => (Reservation::at(address, len)?, false),
            Placement::In(reservation) => (reservation, true),
        };
        let unsuitable = if reservation.size() < len {
            Some((
                format!("{reservation:?} has {:#x} bytes of {len:#x}", reservation.size()),
                "make a larger reservation".to_owned(),
            ))
        } else if len >= HUGE
            && (reservation.address() as u64 ^ file_offset) & (HUGE as u64 - 1) != 0
        {
            Some((
                format!(
                    "{:#x} is not congruent to offset {file_offset:#x} modulo 2 MiB, which costs a \
                         fault for every page",
                    reservation.address()
                ),
                format!(
                    "use Placement::Anywhere or Reservation::congruent({len:#x}, {HUGE:#x}, {:#x})",
                    file_offset % HUGE as u64
                ),
            ))
        } else {
            None
        };
        match unsuitable {
            None => Ok(Self::Reserved(reservation, given)),
            Some((reason, remedy)) => Err(Failed::new(
                Error::new(ErrorKind::UnsuitablePlacement, operation, object)
                    .because(reason)
                    .remedy(remedy),
                given.then_some(reservation),
            )),
        }
    }

    /// Runs a FIXED call over the reservation's start; a refusal leaves it as it was, or tells.
    pub(super) fn fixed(
        reservation: &Reservation,
        len: usize,
        call: impl Fn(&Turn, usize) -> std::result::Result<(), Errno>,
    ) -> std::result::Result<usize, Refusal> {
        let address = reservation.address();
        let turn = Turn::take();
        let mut made = call(&turn, address);
        if made == Err(Errno::EAGAIN) && reservation.unlock(len) {
            made = call(&turn, address);
        }
        match made {
            Ok(()) => Ok(address),
            // SAFETY: the call has mapped nothing.
            Err(errno) => Err(Refusal { errno, lost: !unsafe { reservation.plug(&turn, len) } }),
        }
    }

    /// Takes away again what was mapped at `address`, of `backing` from `offset` on. False where that has
    /// cost the reservation.
    ///
    /// # Safety
    /// `[address, address + len)` is ours, and nothing reads or writes through it.
    pub(super) unsafe fn undo(
        &self,
        backing: &Backing,
        offset: u64,
        address: usize,
        len: usize,
    ) -> bool {
        match self {
            Self::Reserved(reservation, _) => {
                let turn = Turn::take();
                // SAFETY: the caller's own contract.
                unsafe {
                    let cover = || reservation.cover(&turn, len);
                    let covered = try_cover(&turn, backing, offset, address..address + len, cover);
                    reservation.clear(&turn, len, covered)
                }
            }
            Self::Chosen => {
                // SAFETY: the caller's own contract.
                if let Err(errno) = unsafe { mm::munmap(address, len) } {
                    log::error!("leaked the mapping at {address:#x}, {len:#x} bytes: {errno}");
                }
                true
            }
        }
    }

    /// The reservation to give back to the caller with an error.
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

impl Mapping {
    /// Maps `len` bytes of `backing` from `offset` on, both multiples of the page size.
    pub(crate) fn new(
        backing: Arc<Backing>,
        offset: u64,
        len: usize,
        access: Access,
        placement: Placement,
    ) -> std::result::Result<Self, Failed> {
        let object = Object { backing: &backing, offset, len };
        let destination =
            Destination::prepare(placement, "map", &object, backing.file_offset(offset), len)?;
        match map_again(&backing, offset, len, access, &destination) {
            Ok(address) => {
                let home = destination.into_home();
                let generation = fork::generation();
                Ok(Self { backing, offset, address, len, access, home, generation })
            }
            Err(Refusal { errno, lost }) => {
                let error = out_of_memory(errno, "map", object, len);
                let error = if lost { error.into_kind(ErrorKind::ReservationLost) } else { error };
                Err(Failed::new(error, destination.given_back(lost)))
            }
        }
    }

    pub(crate) fn range(&self) -> Range<usize> {
        self.address..self.address + self.len
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// How errors name it.
    pub(super) fn object(&self) -> Object<'_> {
        Object { backing: &self.backing, offset: self.offset, len: self.len }
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether its pages are the kernel's, of a file on tmpfs, and not a device's.
    pub(crate) fn is_shared_memory(&self) -> bool {
        self.backing.kind() == BackingKind::SharedMemory
    }

    /// Unmaps it and gives its addresses back, reserved.
    ///
    /// # Errors
    /// `Os` where the kernel could not: the mapping is then as it was. `ReservationLost` where a failing
    /// call may have unmapped it, and what lies at its addresses is not known to be ours: the mapping has
    /// [gone](Self::has_gone).
    pub(crate) fn vacate(&mut self) -> Result<Reservation> {
        self.check_process("unmap")?;
        // SAFETY: `&mut self` says that nobody uses the mapping; afterwards it owns nothing.
        let result = unsafe { self.release() };
        let released =
            result.map_err(|errno| out_of_memory(errno, "unmap", self.object(), self.len))?;
        let error = Error::new(ErrorKind::ReservationLost, "unmap", self.object());
        self.len = 0;
        match released {
            Released::Whole(reservation) | Released::WithGap(reservation) => Ok(reservation),
            Released::Lost => Err(error.because(
                "a failing call may have unmapped it, and what is mapped there now is another's, or cannot \
                 be told from another's",
            )),
        }
    }

    /// Whether there is nothing left of it.
    pub(crate) fn has_gone(&self) -> bool {
        self.len == 0
    }

    /// Covers the mapping and hands its addresses out; on failure nothing has changed. The mapping
    /// owns nothing afterwards: its address or length is to be set anew.
    ///
    /// # Safety
    /// Nothing reads or writes through the mapping any more.
    #[inline(always)]
    pub(super) unsafe fn release(&mut self) -> std::result::Result<Released, Errno> {
        let turn = Turn::take();
        let home = self.home.take();
        // SAFETY: the mapping owns its range; the caller vouches for its users.
        let cover = || unsafe {
            match &home {
                Some(home) => home.cover(&turn, self.len).map(|()| None),
                None => Reservation::over(&turn, self.address, self.len).map(Some),
            }
        };
        let covered = try_cover(&turn, &self.backing, self.offset, self.range(), cover);
        match (covered, home) {
            (Ok(made), home) => Ok(made.or(home).map_or(Released::Lost, Released::Whole)),
            (Err(Uncovered { errno, intact: true }), home) => {
                self.home = home;
                Err(errno)
            }
            // The failing call has unmapped the range, or nobody can tell.
            (Err(_), home) => {
                let plugged = match home {
                    // SAFETY: nothing that is known to be ours is mapped there.
                    Some(home) => unsafe { home.plug(&turn, self.len) }.then_some(home),
                    None => Reservation::over_gap(&turn, self.address, self.len),
                };
                Ok(plugged.map_or(Released::Lost, Released::WithGap))
            }
        }
    }

    /// Whether this is a child of the process that made it: the mapping is not there.
    pub(crate) fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// An error in a child of `fork(2)`.
    pub(super) fn check_process(&self, operation: &'static str) -> Result<()> {
        if !self.is_inherited() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Gone, operation, self.object())
            .because("windows are not inherited by children of fork"))
    }
}

/// Covers a mapping of `backing`, from `offset` of the region on.
///
/// The kernel checks the limits on mappings, address space and locked memory before it touches the range
/// (`do_mmap`, `mmap_region`; Linux 5.10 to 7.3). If it runs out of memory later, it has unmapped the range,
/// and anybody may have mapped something there since.
fn try_cover<T>(
    turn: &Turn,
    backing: &Backing,
    offset: u64,
    range: Range<usize>,
    cover: impl Fn() -> std::result::Result<T, Errno>,
) -> std::result::Result<T, Uncovered> {
    let Some(file) = backing.identity else {
        // Nobody could tell afterwards. So the limits are tried where nothing is mapped.
        Reservation::try_room(turn, range.len())
            .map_err(|errno| Uncovered { errno, intact: true })?;
        return cover().map_err(|errno| Uncovered { errno, intact: false });
    };
    // What shows the same bytes of the same file and is kept from children is a window of this crate; no
    // other one came there, since `turn` was taken before the call.
    let is_intact = || {
        let shown = maps::is_kept_from_children(&range, file, backing.file_offset(offset));
        shown.unwrap_or(false)
    };
    let refused = |errno| Uncovered { errno, intact: is_intact() };
    let locked = match cover().map_err(refused) {
        Err(uncovered) if uncovered.errno == Errno::EAGAIN && uncovered.intact => uncovered,
        other => return other,
    };
    // After mlockall(MCL_FUTURE) the mapping counts, and so would what covers it: neither has to.
    // SAFETY: the mapping is there still, and it is ours; so is what covers it.
    let unlock = || unsafe { mm::munlock(range.start, range.len()) };
    unlock().map_err(|_| locked)?;
    let covered = cover().map_err(refused)?;
    let _ = unlock();
    Ok(covered)
}

/// What became of the addresses of a mapping that was covered.
pub(super) enum Released {
    /// They are reserved, and were no hole for an instant.
    Whole(Reservation),
    /// They are reserved, and were a hole for an instant.
    WithGap(Reservation),
    /// They were a hole, and somebody else took them.
    Lost,
}

/// Maps `len` bytes of the backing at the destination; the new side is cold, and ready for use.
#[inline(always)]
pub(super) fn map_again(
    backing: &Backing,
    offset: u64,
    len: usize,
    access: Access,
    destination: &Destination,
) -> std::result::Result<usize, Refusal> {
    let address = match destination {
        Destination::Chosen => backing.map(&Turn::take(), offset, len, access)?,
        Destination::Reserved(reservation, _) => {
            backing.vet(offset, len, access)?;
            let file_offset = backing.file_offset(offset);
            Destination::fixed(reservation, len, |turn, address| {
                // SAFETY: the reservation owns the range, and nothing uses it.
                unsafe { mm::map_fixed(turn, address, backing.fd(), file_offset, len, access) }
            })?
        }
    };
    // SAFETY: the mapping was made above.
    if let Err(errno) = unsafe { mm::keep_from_children(address, len) } {
        // SAFETY: as above; nobody knows of it yet.
        let lost = !unsafe { destination.undo(backing, offset, address, len) };
        return Err(Refusal { errno, lost });
    }
    if len >= HUGE && backing.kind() == BackingKind::VfioPci {
        // A kernel without transparent huge pages answers EINVAL, and maps by 4 KiB.
        // SAFETY: as above.
        let _ = unsafe { mm::prefer_huge_pages(address, len) };
    }
    Ok(address)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len == 0 || self.is_inherited() {
            return;
        }
        // SAFETY: the mapping's last holder is going, and with it every user of the range.
        unsafe {
            match &mut self.home {
                None => {
                    if let Err(errno) = mm::munmap(self.address, self.len) {
                        log::error!("leaked the mapping of {}: {errno}", self.object());
                    }
                }
                Some(home) => {
                    // A reservation that nobody else has goes with it, in one munmap of its own; but not
                    // one that this process has inherited.
                    if !home.is_whole_area() {
                        let (backing, offset) = (&self.backing, self.offset);
                        let range = self.address..self.address + self.len;
                        let turn = Turn::take();
                        let cover = || home.cover(&turn, self.len);
                        let covered = try_cover(&turn, backing, offset, range, cover);
                        home.clear(&turn, self.len, covered);
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} at {:#x}, {:?})", self.object(), self.address, self.access)
    }
}

/// "bar 0 of 0000:00:03.0, 0x0..0x4000"
pub(super) struct Object<'a> {
    backing: &'a Backing,
    offset: u64,
    len: usize,
}

impl fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.offset + self.len as u64;
        write!(f, "{}, {:#x}..{end:#x}", self.backing.name(), self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::Strategy;
    use crate::space::fixture::{PAGE, backing, secluded, state, unmap_and_let_in};
    use crate::sys::file;
    use crate::sys::spy::{self, Call};

    /// The calls that map `len` bytes where there is room.
    fn calls(kind: BackingKind, len: usize) -> Vec<Call> {
        let backing = Arc::new(backing(len, kind));
        let map = || Mapping::new(backing, 0, len, Access::ReadWrite, Placement::Anywhere);
        let (made, calls) = spy::record(map);
        let mapping = made.unwrap();
        assert_eq!(mapping.is_shared_memory(), kind == BackingKind::SharedMemory);
        let at = mapping.range().start;
        let shown = format!("Mapping(bar 0 of test, 0x0..{len:#x} at {at:#x}, ReadWrite)");
        assert_eq!(format!("{mapping:?}"), shown);
        calls
    }

    #[test]
    fn a_small_mapping_is_one_call_and_large_ones_of_bars_ask_for_huge_pages() {
        let advises = |calls: &[Call]| calls.iter().filter(|call| **call == Call::Advise).count();
        for kind in [BackingKind::SharedMemory, BackingKind::VfioPci, BackingKind::Other] {
            assert_eq!(calls(kind, PAGE), [Call::Map { len: PAGE }, Call::Advise]);
            let huge = usize::from(kind == BackingKind::VfioPci);
            assert_eq!(advises(&calls(kind, HUGE)), 1 + huge, "{kind:?}");
        }
    }

    #[test]
    fn a_mapping_that_has_a_reservation_to_itself_goes_with_it_in_one_call() {
        let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
        let place = Placement::In(secluded(PAGE));
        let made = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
        let range = made.range();
        let ((), calls) = spy::record(|| drop(made));
        assert_eq!((calls, state(&range)), (vec![Call::Unmap], (0, 0)));
    }

    #[test]
    fn a_child_has_a_hole_where_a_mapping_was() {
        let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
        for strategy in [Strategy::DontUnmap, Strategy::MapAgain, Strategy::Move] {
            let place = Placement::In(secluded(PAGE));
            let made = Mapping::new(backing.clone(), 0, PAGE, Access::ReadWrite, place).unwrap();
            let request = Placement::In(secluded(PAGE)).only(strategy);
            let (made, other) = if strategy == Strategy::Move {
                let mut made = made;
                made.relocate(request).unwrap();
                (made, None)
            } else {
                let (other, _) = made.duplicate(Access::ReadOnly, request).unwrap();
                (made, Some(other))
            };
            let both = [Some(&made), other.as_ref()];
            let ranges = both.into_iter().flatten().map(Mapping::range);
            let ranges: Vec<_> = ranges.collect();
            // SAFETY: the child takes no lock.
            let holes = unsafe {
                fork::holds_in_child(|| ranges.iter().all(|range| state(range) == (0, 0)))
            };
            assert!(holes, "{strategy}");
            assert!(ranges.iter().all(|range| state(range) == (PAGE, 0)));
        }
    }

    /// Where the hole is, anything may come to lie.
    #[test]
    fn a_child_leaves_alone_what_it_did_not_map() {
        for placed in [false, true] {
            let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
            let (home, rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
            let place = if placed { Placement::In(home) } else { Placement::Anywhere };
            let mapping = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
            let range = mapping.range();
            let mut mapping = Some(mapping);
            // SAFETY: nothing that the child comes by is locked; it has a hole in the range.
            let left_alone = unsafe {
                fork::holds_in_child(|| {
                    unmap_and_let_in(range.clone(), None);
                    let error = mapping.as_mut().unwrap().vacate().unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
                    drop(mapping.take());
                    state(&range) == (PAGE, 0)
                })
            };
            assert!(left_alone, "placed: {placed}");
            drop((mapping, rest));
        }
    }

    #[test]
    fn a_child_leaves_nothing_mapped_in_a_reservation_that_it_has_inherited() {
        const LEN: usize = 4 * 4096;
        let fd = file::memory_file("vfio-remap-test", LEN as u64).unwrap();
        let backing =
            Backing::new("bar 0 of test", Arc::new(fd), 0, LEN as u64, BackingKind::SharedMemory);
        let backing = Arc::new(backing.unwrap());
        let map = |place| Mapping::new(backing.clone(), 0, LEN, Access::ReadWrite, place);
        // What is found out once is found out before the child.
        drop(map(Placement::In(Reservation::new(LEN).unwrap())).unwrap());
        let reservation = Reservation::new(LEN).unwrap();
        let range = reservation.range();
        let inaccessible = || maps::overlapping(&range).iter().map(|m| m.inaccessible).collect();
        // SAFETY: the backing is this test's, and nothing else that the child comes by is locked.
        let tidy = unsafe {
            fork::holds_in_child(|| {
                let mapping = map(Placement::In(reservation)).unwrap();
                let before: Vec<bool> = inaccessible();
                drop(mapping);
                let after: Vec<bool> = inaccessible();
                (before, after) == (vec![false], vec![true])
            })
        };
        assert!(tidy);
    }
}
