//! One mapping of a backing: how it is made and unmapped.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::cover::{Released, release, try_cover};
use super::destination::{Destination, FailedCall, HUGE};
use super::limits::out_of_memory;
use super::revocation::{self, Control};
use super::{Backing, BackingKind, Failed, Placement, Reservation};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::sys::mm::{self, Access};
use crate::sys::mmap_lock::MmapLock;

/// `size` bytes of a backing from `offset` on, mapped at `address`. It owns this range, which is one VMA.
///
/// Dropping it unmaps the range. If it was placed in a reservation, the range is reserved again.
pub(crate) struct Mapping {
    /// Revokes and restores it, and keeps its backing.
    pub(super) control: Arc<Control>,
    pub(super) offset: u64,
    pub(super) address: usize,
    pub(super) size: usize,
    pub(super) access: Access,
    /// The reservation in which the mapping lies, at its start.
    pub(super) home: Option<Reservation>,
    /// The process that made it: see [`fork::generation`].
    pub(super) generation: u32,
}

impl Mapping {
    /// Maps `size` bytes of `backing` from `offset` on, both multiples of the page size.
    pub(crate) fn new(
        backing: Arc<Backing>,
        offset: u64,
        size: usize,
        access: Access,
        placement: Placement,
    ) -> std::result::Result<Self, Failed> {
        let object = Object { backing: &backing, offset, size };
        let destination =
            Destination::prepare(placement, "map", &object, backing.file_offset(offset), size)?;
        revocation::prepare(size);
        match map_again(&backing, offset, size, access, &destination) {
            Ok(address) => {
                let home = destination.into_home();
                let generation = fork::generation();
                let control = Control::new(backing, offset, size, access, address);
                Ok(Self { control, offset, address, size, access, home, generation })
            }
            Err(FailedCall { errno, lost }) => {
                let error = out_of_memory(errno, "map", object, size);
                let error = if lost { error.into_kind(ErrorKind::ReservationLost) } else { error };
                Err(Failed::new(error, destination.given_back(lost)))
            }
        }
    }

    pub(crate) fn range(&self) -> Range<usize> {
        self.address..self.address + self.size
    }

    pub(super) fn backing(&self) -> &Arc<Backing> {
        &self.control.backing
    }

    /// What revokes and restores it.
    #[inline]
    pub(crate) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Its name in errors.
    pub(super) fn object(&self) -> Object<'_> {
        Object { backing: self.backing(), offset: self.offset, size: self.size }
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether its pages are memory of a file on tmpfs, and not of a device.
    pub(crate) fn is_shared_memory(&self) -> bool {
        self.backing().kind() == BackingKind::SharedMemory
    }

    /// Unmaps it and returns its addresses as a reservation.
    ///
    /// # Errors
    /// `Os` if the kernel refused: the mapping has not changed. `ReservationLost` if a failing call may
    /// have unmapped it, and what is mapped at its addresses now is not known to be ours: the mapping
    /// then [owns nothing](Self::is_unmapped).
    pub(crate) fn vacate(&mut self) -> Result<Reservation> {
        self.check_process("unmap")?;
        let range = self.range();
        let Self { control, home, size, .. } = self;
        let mut turn = control.turn();
        if turn.is_sealed() {
            return Err(Error::new(ErrorKind::Sealed, "unmap", control.object())
                .with_reason("a sealed window stays as it is until the process ends"));
        }
        let state = turn.suspend();
        // SAFETY: `&mut self` proves that nothing uses the mapping, and it is suspended. It owns nothing
        // afterwards, since its length is set to 0 below.
        let result = unsafe { release(home, range, turn.shown(state)) };
        match &result {
            Ok(_) => {
                turn.retire();
            }
            Err(_) => turn.resume(state),
        }
        let released =
            result.map_err(|errno| out_of_memory(errno, "unmap", control.object(), *size))?;
        *size = 0;
        match released {
            Released::Whole(reservation) | Released::WithGap(reservation) => Ok(reservation),
            Released::Lost => Err(Error::new(ErrorKind::ReservationLost, "unmap", control.object()).with_reason(
                "a failing call may have unmapped it, and what is mapped there now may belong to other code",
            )),
        }
    }

    /// Whether it owns nothing any more.
    pub(crate) fn is_unmapped(&self) -> bool {
        self.size == 0
    }

    /// Whether this process is a child of the one that made it. The mapping does not exist here.
    pub(crate) fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Fails in a child of `fork(2)`.
    pub(super) fn check_process(&self, operation: &'static str) -> Result<()> {
        if !self.is_inherited() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Gone, operation, self.object())
            .with_reason("children of fork do not inherit windows"))
    }
}

/// Maps `size` bytes of the backing at the destination. The new side is ready for use; its page tables are
/// empty.
#[inline(always)]
pub(super) fn map_again(
    backing: &Backing,
    offset: u64,
    size: usize,
    access: Access,
    destination: &Destination,
) -> std::result::Result<usize, FailedCall> {
    let address = match destination {
        Destination::Chosen => backing.map(&MmapLock::take(), offset, size, access)?,
        Destination::Reserved(reservation, _) => {
            backing.ensure_accepted(offset, size, access)?;
            let file_offset = backing.file_offset(offset);
            Destination::fixed(reservation, size, |lock, address| {
                // SAFETY: the reservation owns the range, and nothing uses it.
                unsafe { mm::map_fixed(lock, address, backing.fd(), file_offset, size, access) }
            })?
        }
    };
    // SAFETY: the mapping was made above, so the range is ours.
    if let Err(errno) = unsafe { mm::keep_from_children(address, size) } {
        // SAFETY: as above, and nothing else has its address yet.
        let lost = !unsafe { destination.undo(backing, offset, address, size) };
        return Err(FailedCall { errno, lost });
    }
    // SAFETY: the mapping was made above, so the range is ours.
    unsafe { prefer_huge(backing, address, size) };
    Ok(address)
}

/// Whether the kernel can map `size` bytes of the backing by huge page-table entries.
pub(super) fn may_be_huge(backing: &Backing, size: usize) -> bool {
    size >= HUGE && backing.kind() == BackingKind::VfioPci
}

/// Asks for huge page-table entries, if the mapping has room for one.
///
/// # Safety
/// The range is ours.
pub(super) unsafe fn prefer_huge(backing: &Backing, address: usize, size: usize) {
    if may_be_huge(backing, size) {
        // A kernel without transparent huge pages returns EINVAL, and uses 4 KiB entries.
        // SAFETY: by the contract.
        let _ = unsafe { mm::prefer_huge_pages(address, size) };
    }
}

impl Drop for Mapping {
    #[inline(always)]
    fn drop(&mut self) {
        if self.size == 0 || self.is_inherited() {
            return;
        }
        let Self { control, home, address, size, .. } = self;
        let (address, size) = (*address, *size);
        let Some(shown) = control.retire() else { return };
        // SAFETY: the mapping owns its range. It is being dropped, so nothing uses the range any more:
        // windows and registers hold it by an `Arc`, and it is no longer in the registry of handlers.
        unsafe {
            match home {
                None => {
                    if let Err(errno) = mm::munmap(address, size) {
                        log::error!("leaked the mapping of {}: {errno}", control.object());
                    }
                }
                Some(home) => {
                    // A reservation that has no other holder is dropped next, and unmaps the range in one
                    // munmap. A reservation that this process inherited does not.
                    if !home.is_whole_area() {
                        let lock = MmapLock::take();
                        let cover = || home.cover(&lock, size);
                        let covered = try_cover(&lock, shown, address..address + size, cover);
                        home.clear(&lock, size, covered);
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
    pub backing: &'a Backing,
    pub offset: u64,
    pub size: usize,
}

impl fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.offset + self.size as u64;
        write!(f, "{}, {:#x}..{end:#x}", self.backing.name(), self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::Strategy;
    use crate::space::fixture::{PAGE, backing, secluded, state, unmap_and_let_in};
    use crate::sys::spy::{self, Call};
    use crate::sys::{file, maps};

    /// The calls that map `len` bytes at an address that the kernel chooses.
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
    fn only_large_mappings_of_bars_ask_for_huge_pages() {
        let advises = |calls: &[Call]| calls.iter().filter(|call| **call == Call::Advise).count();
        for kind in [BackingKind::SharedMemory, BackingKind::VfioPci, BackingKind::Other] {
            assert_eq!(calls(kind, PAGE), [Call::Map { len: PAGE }, Call::Advise]);
            let huge = usize::from(kind == BackingKind::VfioPci);
            assert_eq!(advises(&calls(kind, HUGE)), 1 + huge, "{kind:?}");
        }
    }

    #[test]
    fn a_mapping_and_its_reservation_are_unmapped_in_one_call() {
        let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
        let place = Placement::In(secluded(PAGE));
        let made = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
        let range = made.range();
        let ((), calls) = spy::record(|| drop(made));
        assert_eq!((calls, state(&range)), (vec![Call::Unmap], (0, 0)));
    }

    #[test]
    fn a_child_has_a_hole_in_place_of_a_mapping() {
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

    /// Other code may map anything into the hole.
    #[test]
    fn a_child_leaves_alone_what_it_did_not_map() {
        for placed in [false, true] {
            let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
            let (home, rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
            let place = if placed { Placement::In(home) } else { Placement::Anywhere };
            let mapping = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
            let range = mapping.range();
            let mut mapping = Some(mapping);
            // SAFETY: the child takes no lock that another thread holds: only this test uses what it
            // touches. In the child the range is a hole.
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
    fn a_child_leaves_nothing_mapped_in_an_inherited_reservation() {
        const LEN: usize = 4 * 4096;
        let fd = file::memory_file("vfio-remap-test", LEN as u64).unwrap();
        let backing =
            Backing::new("bar 0 of test", Arc::new(fd), 0, LEN as u64, BackingKind::SharedMemory);
        let backing = Arc::new(backing.unwrap());
        let map = |place| Mapping::new(backing.clone(), 0, LEN, Access::ReadWrite, place);
        // Initializes what is initialized once, before the fork.
        drop(map(Placement::In(Reservation::new(LEN).unwrap())).unwrap());
        let reservation = Reservation::new(LEN).unwrap();
        let range = reservation.range();
        let inaccessible = || maps::overlapping(&range).iter().map(|m| m.inaccessible).collect();
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
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
