#![expect(unsafe_code, reason = "addresses are owned by convention")]
use super::*;
use crate::space::fixture::{MIB, secluded};
use crate::space::{Access, Backing, BackingKind, Mapping, Placement};
use crate::sys::spy::{self, Call};

/// Half of the address space of a process.
const HALF: usize = 1 << 46;

fn mapped(range: &Range<usize>) -> usize {
    maps::overlapping(range).iter().map(|mapped| mapped.range.len()).sum()
}

#[test]
fn reservations_are_aligned_and_congruent_as_asked() {
    let page = sys::page_size();
    assert_eq!(Reservation::new(1).unwrap().size(), page);
    assert_eq!(Reservation::aligned(page, 2 * MIB).unwrap().address() % (2 * MIB), 0);
    for offset in [0, page as u64, 6 << 20, (1 << 40) + 0x5000] {
        let reservation = Reservation::congruent(3 * page, 1 << 30, offset).unwrap();
        assert_eq!(reservation.address() as u64 % (1 << 30), offset % (1 << 30));
    }
}

#[test]
fn without_room_to_align_the_size_alone_is_enough() {
    for (taken, modulus) in [(0, 2 * MIB), (3, 2 * MIB), (1, 1 << 30)] {
        let (mut reserves, mut tries) = (0, 0);
        let script = move |call| match call {
            Call::Reserve => {
                reserves += 1;
                (reserves == 1).then_some(Errno::ENOMEM)
            }
            Call::ReserveAt { .. } => {
                tries += 1;
                (tries <= taken).then_some(Errno::EEXIST)
            }
            _ => None,
        };
        let make = || Reservation::congruent(4 * MIB, modulus, 0x5000).unwrap();
        let (reservation, calls) = spy::record(|| spy::script(script, make));
        assert_eq!(reservation.address() % modulus, 0x5000);
        assert_eq!((reservation.size(), mapped(&reservation.range())), (4 * MIB, 4 * MIB));
        let tries = calls.iter().filter(|call| matches!(call, Call::ReserveAt { .. })).count();
        // None if the kernel's choice happens to be congruent.
        assert!(tries == 0 || tries > taken, "{calls:?}");
    }
}

#[test]
fn the_search_for_an_aligned_address_ends() {
    let mut reserves = 0;
    let script = move |call| match call {
        Call::Reserve => {
            reserves += 1;
            (reserves == 1).then_some(Errno::EAGAIN)
        }
        Call::ReserveAt { .. } => Some(Errno::EEXIST),
        _ => None,
    };
    let make = || Reservation::congruent(4 * MIB, 1 << 34, 0x5000).unwrap_err();
    let (failed, calls) = spy::record(|| spy::script(script, make));
    assert_eq!(failed.errno(), Some(libc::EAGAIN), "{failed}");
    let tried = calls.iter().filter_map(|call| match *call {
        Call::ReserveAt { address } => Some(address),
        _ => None,
    });
    let tried: Vec<_> = tried.collect();
    assert_eq!(tried.len(), 64);
    // Further if another test has something mapped there.
    assert!(tried.windows(2).all(|two| two[0] - two[1] >= 1 << 34), "{tried:x?}");
    assert!(tried.iter().all(|address| address % (1 << 34) == 0x5000), "{tried:x?}");
    assert_eq!(calls[..3], [Call::Reserve, Call::Reserve, Call::Unmap]);
}

#[test]
fn the_search_for_an_aligned_address_skips_what_is_in_the_way() {
    // Lower than anything that the kernel or another test puts somewhere.
    let (low, high) = (0x8_0000_0000, 0x9_0000_0000);
    let _far = Reservation::at(high, 1 << 30).unwrap();
    let _near = Reservation::at(high - 3 * MIB, MIB).unwrap();
    let search = || {
        let (file, lock) = (marker().unwrap().as_fd(), MmapLock::take());
        search_below(&lock, file, 4 * MIB, 2 * MIB, high + (1 << 29) + 4096)
    };
    let (start, calls) = spy::record(search);
    // Not in the 2 MiB between the two.
    let start = start.unwrap();
    assert_eq!(start, high - 8 * MIB + 4096);
    assert!(start > low && calls.len() == 3, "{calls:x?}");
    // SAFETY: the range was reserved above, and nothing else has its address.
    unsafe { mm::munmap(start, 4 * MIB) }.unwrap();
}

#[test]
fn invalid_arguments_are_refused() {
    let kind = |result: Result<Reservation>| result.unwrap_err().kind();
    assert_eq!(kind(Reservation::new(0)), ErrorKind::OutOfRange);
    assert_eq!(kind(Reservation::new(usize::MAX)), ErrorKind::OutOfRange);
    assert_eq!(kind(Reservation::new(usize::MAX / 2)), ErrorKind::OutOfRange);
    assert_eq!(kind(Reservation::new(1 << 50)), ErrorKind::Os);
    assert_eq!(kind(Reservation::aligned(1, 3 * MIB)), ErrorKind::Unaligned);
    assert_eq!(kind(Reservation::aligned(1, 1)), ErrorKind::Unaligned);
    assert_eq!(kind(Reservation::aligned(usize::MAX - 8192, 1 << 62)), ErrorKind::OutOfRange);
    assert_eq!(kind(Reservation::congruent(1, MIB, 1)), ErrorKind::Unaligned);
    assert_eq!(kind(Reservation::at(1, 1)), ErrorKind::Unaligned);
    assert_eq!(kind(Reservation::at(usize::MAX - 4095, 8192)), ErrorKind::OutOfRange);
}

#[test]
fn a_taken_address_is_named_with_what_is_there() {
    let first = secluded(MIB);
    let error = Reservation::at(first.address(), MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken);
    assert!(error.to_string().contains("vfio-remap-reserved"), "{error}");
    let range = first.range();
    drop(first);
    assert_eq!(Reservation::at(range.start, MIB).unwrap().range(), range);
}

#[test]
fn dropped_pieces_stay_reserved_until_the_last_is_dropped() {
    let whole = secluded(MIB);
    let range = whole.range();
    let (a, rest) = whole.split_at(MIB / 4).unwrap();
    let (b, c) = rest.split_at(MIB / 4).unwrap();
    let (a, c) = a.join(c).unwrap_err();
    drop(b);
    drop(a);
    assert_eq!(mapped(&range), MIB, "dropped pieces stay reserved");
    drop(c);
    assert_eq!(mapped(&range), 0, "the last one unmaps all of them");
}

#[test]
fn joined_pieces_are_the_whole_again() {
    let whole = Reservation::new(MIB).unwrap();
    let range = whole.range();
    let (a, b) = whole.split_at(MIB / 2).unwrap();
    let whole = a.join(b).unwrap();
    assert_eq!(whole.range(), range);
    assert_eq!(format!("{whole:?}"), format!("Reservation({:#x}..{:#x})", range.start, range.end));
}

#[test]
fn a_bad_split_gives_the_reservation_back() {
    let whole = Reservation::new(MIB).unwrap();
    let range = whole.range();
    let failed = whole.split_at(MIB).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::OutOfRange);
    assert_eq!(failed.error().object(), format!("addresses {:#x}..{:#x}", range.start, range.end));
    let failed = failed.into_reservation().unwrap().split_at(1).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Unaligned);
    assert_eq!(failed.into_reservation().unwrap().range(), range);
}

#[test]
fn a_child_keeps_the_reservations_of_its_parent() {
    let mut reservation = Some(secluded(MIB));
    let range = reservation.as_ref().unwrap().range();
    // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
    let kept = unsafe {
        fork::holds_in_child(|| {
            drop(reservation.take());
            mapped(&range) == MIB
        })
    };
    assert!(kept);
    drop(reservation);
    assert_eq!(mapped(&range), 0);
}

#[test]
fn what_other_code_took_is_never_unmapped() {
    let whole = secluded(MIB);
    let range = whole.range();
    let (_, second) = whole.split_at(MIB / 2).unwrap();
    // SAFETY: the reservation is ours. This makes the hole that a failing FIXED call leaves.
    unsafe { mm::munmap(second.address(), second.size()) }.unwrap();
    let other = Reservation::at(second.address() + 4096, 4096).unwrap();
    // SAFETY: nothing of ours is there.
    assert!(!unsafe { second.restore(&MmapLock::take(), second.size()) });
    let ((), calls) = spy::record(|| drop(second));
    assert_eq!(calls, [Call::Unmap], "of the part before the lost range");
    assert_eq!(mapped(&range), 4096, "only the other reservation");
    drop(other);
}

#[test]
fn addresses_that_the_stack_may_grow_into_are_refused() {
    let all = maps::overlapping(&(0..usize::MAX));
    let stack = all.iter().find(|mapped| mapped.name == "[stack]").unwrap();
    let address = stack.range.start - 2 * MIB;
    let error = Reservation::at(address & !0xfff, MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken);
    assert!(error.to_string().contains("stack"), "{error}");
}

/// A guest may choose addresses that are taken any number of times.
#[test]
fn refused_placements_leak_nothing() {
    let file = sys::file::memory_file("vfio-remap-test", HALF as u64).unwrap();
    let kind = BackingKind::SharedMemory;
    let backing = Backing::new("bar 0 of test", Arc::new(file), 0, HALF as u64, kind).unwrap();
    let backing = Arc::new(backing);
    let taken = secluded(sys::page_size());
    for _ in 0..200_000 {
        let placement = Placement::At(taken.address());
        let failed = Mapping::new(backing.clone(), 0, HALF, Access::ReadOnly, placement);
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::AddressTaken);
    }
}

#[test]
fn dropped_reservations_leak_nothing() {
    for _ in 0..200_000 {
        drop(Reservation::new(HALF).unwrap());
    }
}

#[test]
fn an_intact_destination_is_recognized_by_its_file() {
    let reservation = Reservation::new(MIB).unwrap();
    let (kept, calls) = spy::record(|| {
        // SAFETY: only the marker file is mapped there.
        unsafe { reservation.restore(&MmapLock::take(), MIB) }
    });
    assert!(kept && calls.is_empty());
}

#[test]
fn a_reservation_without_alignment_is_one_call() {
    let (made, calls) = spy::record(|| Reservation::new(MIB));
    assert_eq!((made.is_ok(), calls), (true, vec![Call::Reserve]));
    let no_room =
        || spy::refuse(Errno::ENOMEM, |call| call == Call::Reserve, || Reservation::new(MIB));
    let (made, calls) = spy::record(no_room);
    assert_eq!(made.unwrap_err().errno(), Some(libc::ENOMEM));
    assert_eq!(calls, [Call::Reserve]);
}

#[test]
fn the_surplus_of_an_aligned_reservation_is_unmapped() {
    let (made, calls) = spy::record(|| Reservation::congruent(MIB, 1 << 34, 0x5000));
    assert_eq!(made.unwrap().address() % (1 << 34), 0x5000);
    assert_eq!(calls, [Call::Reserve, Call::Unmap, Call::Unmap], "before and after it");
}

#[test]
fn the_error_says_if_anonymous_memory_is_in_the_way() {
    let place = secluded(MIB);
    let range = place.range();
    drop(place);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (at, prot) = (range.start as *mut libc::c_void, libc::PROT_READ);
    // SAFETY: NOREPLACE never replaces a mapping.
    assert_eq!(unsafe { libc::mmap(at, MIB, prot, flags, -1, 0) }, at);
    let error = Reservation::at(range.start, MIB).unwrap_err();
    let words = format!("anonymous memory is mapped at {:#x}..{:#x}", range.start, range.end);
    assert!(error.to_string().contains(&words), "{error}");
    // SAFETY: the range was mapped above, and nothing else has its address.
    unsafe { mm::munmap(range.start, MIB) }.unwrap();
}

#[test]
fn a_gap_is_reserved_again_unless_something_is_mapped_there() {
    let place = secluded(MIB);
    let range = place.range();
    drop(place);
    let reserve = || Reservation::reserve_gap(&MmapLock::take(), range.start, MIB);
    let again = reserve().unwrap();
    assert_eq!((again.range(), mapped(&range)), (range.clone(), MIB));
    assert!(reserve().is_none());
}

#[test]
fn only_a_reservation_is_unlocked() {
    let (reservation, rest) = secluded(2 * MIB).split_at(MIB).unwrap();
    assert!(reservation.unlock(MIB));
    // SAFETY: the reservation is ours. This makes the hole that a failing FIXED call leaves.
    unsafe { mm::munmap(reservation.start + MIB / 2, MIB / 2) }.unwrap();
    let (unlocked, calls) = spy::record(|| reservation.unlock(MIB));
    assert!(!unlocked && calls.is_empty(), "{calls:?}");
    drop(rest);
}

#[test]
fn the_stack_grows_down_to_its_limit_or_to_what_is_below() {
    let end = 0x7fff_0000_0000;
    assert_eq!(stack_floor(end, 8 << 20), Some(end - 9 * MIB));
    assert_eq!(stack_floor(end, 1 << 20), Some(end - 9 * MIB), "it may be raised again");
    assert_eq!(stack_floor(end, 64 << 20), Some(end - 65 * MIB));
    assert_eq!(stack_floor(end, RLIM_INFINITY), None);
    assert_eq!(stack_floor(end, end as u64), None);

    let all = maps::overlapping(&(0..usize::MAX));
    let stack = all.iter().position(|mapped| mapped.name == "[stack]").unwrap();
    let end = all[stack].range.end;
    assert_eq!(end_below(&all, end), all[stack - 1].range.end);
    assert_eq!(end_below(&[], end), 0);
    assert!(stack_may_grow_into(&(end - 4096..end)));
    assert!(!stack_may_grow_into(&(end..end + 4096)));
    let (limit, _) = getrlimit(Resource::RLIMIT_STACK).unwrap();
    let floor = stack_floor(end, limit).unwrap_or_else(|| end_below(&all, end));
    assert!(stack_may_grow_into(&(floor..floor + 4096)));
    assert!(!stack_may_grow_into(&(floor - 4096..floor)));
}
