//! Tests: after a failed call, a range is unmapped only if what is mapped there is known to be ours.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::ops::Range;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};

use super::fixture::{PAGE, backing, secluded, state, unmap_and_let_in};
use super::{Access, Backing, BackingKind, Mapping, Placement, Reservation, Strategy};
use crate::error::ErrorKind;
use crate::sys::mmap_lock::MmapLock;
use crate::sys::spy::{self, Call};
use crate::sys::{fork, mm};

/// The verbs that cover the addresses of a mapping.
const VERBS: [fn(Mapping); 3] = [
    drop,
    |mut mapping| {
        let lost = mapping.vacate().unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::ReservationLost, "{lost}");
        assert!(mapping.is_unmapped());
    },
    |mut mapping| {
        let relocation = mapping.relocate(Placement::Anywhere.into()).unwrap();
        assert!(relocation.old.is_none(), "{relocation:?}");
    },
];

/// One page of `backing`, placed in a piece of a reservation, and the other piece, which keeps the
/// reservation alive.
fn placed(backing: Backing) -> (Mapping, Reservation) {
    let (home, rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
    let placement = Placement::In(home);
    let mapping = Mapping::new(Arc::new(backing), 0, PAGE, Access::ReadWrite, placement).unwrap();
    (mapping, rest)
}

/// Runs `verb` while every call that covers fails. Before the first one fails, the kernel unmaps the
/// range and other code maps `file` there.
fn while_others_get_in(mapping: Mapping, file: Option<OwnedFd>, verb: fn(Mapping)) -> Range<usize> {
    let range = mapping.range();
    let mut first = true;
    let refuse = move |call| match call {
        Call::Cover { address, len } => {
            if std::mem::take(&mut first) {
                // SAFETY: the mapping is the caller's to replace.
                unsafe { unmap_and_let_in(address..address + len, file.as_ref().map(AsFd::as_fd)) };
            }
            Some(Errno::ENOMEM)
        }
        _ => None,
    };
    spy::script(refuse, || verb(mapping));
    range
}

#[test]
fn another_mapping_of_the_same_bytes_is_left_alone() {
    for (verb, same) in VERBS.into_iter().flat_map(|verb| [(verb, true), (verb, false)]) {
        let backing = backing(PAGE, BackingKind::SharedMemory);
        let file = backing.fd().try_clone_to_owned().unwrap();
        let (mapping, rest) = placed(backing);
        let range = while_others_get_in(mapping, same.then_some(file), verb);
        assert_eq!(state(&range), (PAGE, 0));
        drop(rest);
        assert_eq!(state(&range), (PAGE, 0), "dropping the reservation does not unmap it either");
    }
}

#[test]
fn what_cannot_be_undone_is_left_alone() {
    let backing = backing(PAGE, BackingKind::SharedMemory);
    let file = backing.fd().try_clone_to_owned().unwrap();
    let (mapping, rest) = placed(backing);
    let (place, other_rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
    let range = place.range();
    let mut covers = 0;
    let refuse = move |call| match call {
        Call::Cover { address, len } => {
            covers += 1;
            if covers == 2 {
                // SAFETY: the new side is the caller's to replace.
                unsafe { unmap_and_let_in(address..address + len, Some(file.as_fd())) };
            }
            Some(Errno::ENOMEM)
        }
        _ => None,
    };
    let at = mapping.range();
    let mut mapping = mapping;
    let failed = spy::script(refuse, || mapping.relocate(Placement::In(place).into()).unwrap_err());
    assert_eq!(failed.kind(), ErrorKind::ReservationLost, "{failed}");
    assert!(failed.into_reservation().is_none());
    assert_eq!((mapping.range(), state(&at)), (at.clone(), (PAGE, 0)), "the window is unchanged");
    drop((mapping, rest, other_rest));
    assert_eq!((state(&at), state(&range)), ((0, 0), (PAGE, 0)));
}

/// While a thread holds the lock, no other thread of this crate maps something into a hole.
#[test]
fn calls_that_create_mappings_take_the_lock() {
    let calls = [Strategy::DontUnmap, Strategy::MapAgain, Strategy::Move].map(|strategy| {
        let backing = Arc::new(backing(2 * PAGE, BackingKind::SharedMemory));
        let watch = |call| {
            let creates =
                !matches!(call, Call::Unmap | Call::Protect | Call::Unlock | Call::Advise);
            assert!(!creates || MmapLock::is_taken(), "{call:?}");
            None
        };
        let verbs = || {
            spy::record(|| {
                let map = |place| Mapping::new(backing.clone(), 0, PAGE, Access::ReadWrite, place);
                let mut mapping = map(Placement::Anywhere).unwrap();
                let taken = map(Placement::At(mapping.range().start)).unwrap_err();
                assert_eq!(taken.kind(), ErrorKind::AddressTaken);
                let anywhere = Placement::Anywhere.only(strategy);
                let _ = mapping.duplicate(Access::ReadOnly, anywhere);
                let place = Reservation::new(PAGE).unwrap();
                mapping.relocate(Placement::In(place).only(strategy)).unwrap();
                mapping.relocate(Placement::Anywhere.only(strategy)).unwrap();
                let alias = |place: Placement| place.only(Strategy::OldLenZero);
                drop(mapping.duplicate(Access::ReadOnly, alias(Placement::Anywhere)).unwrap());
                let place = Placement::In(Reservation::new(PAGE).unwrap());
                drop(mapping.duplicate(Access::ReadOnly, alias(place)).unwrap());
                drop(mapping.vacate().unwrap());
            })
        };
        spy::script(watch, verbs).1
    });
    let calls = calls.concat();
    let made = |call: fn(&Call) -> bool| assert!(calls.iter().any(call), "{calls:?}");
    made(|call| matches!(call, Call::Reserve));
    made(|call| matches!(call, Call::ReserveAt { .. }));
    made(|call| matches!(call, Call::Cover { .. }));
    made(|call| matches!(call, Call::Map { .. }));
    made(|call| matches!(call, Call::MapFixed { .. }));
    made(|call| matches!(call, Call::DontUnmap));
    made(|call| matches!(call, Call::DontUnmapFixed { .. }));
    made(|call| matches!(call, Call::OldLenZero));
    made(|call| matches!(call, Call::OldLenZeroFixed { .. }));
    made(|call| matches!(call, Call::MoveFixed { .. }));
}

#[test]
fn the_lock_is_held_until_the_range_is_reserved_again() {
    for verb in [drop, |mut mapping: Mapping| drop(mapping.vacate().unwrap())] {
        let (mapping, rest) = placed(backing(PAGE, BackingKind::SharedMemory));
        let mut counts = Vec::new();
        let refuse = move |call| match call {
            Call::Cover { address, len } => {
                counts.push(MmapLock::count());
                // SAFETY: the mapping is the caller's to replace.
                unsafe { mm::munmap(address, len) }.unwrap();
                Some(Errno::ENOMEM)
            }
            Call::ReserveAt { .. } => {
                assert_eq!(counts, [MmapLock::count()]);
                None
            }
            _ => None,
        };
        let (_, calls) = spy::record(|| spy::script(refuse, || verb(mapping)));
        assert!(calls.iter().any(|call| matches!(call, Call::ReserveAt { .. })), "{calls:?}");
        drop(rest);
    }
}

/// The ring of a perf event. `None` if the kernel forbids perf events.
fn perf_event() -> Option<OwnedFd> {
    // `struct perf_event_attr` (linux/perf_event.h) of 64 bytes: PERF_TYPE_SOFTWARE,
    // PERF_COUNT_SW_CPU_CLOCK, of user space only (bits 5 and 6 of the flags at byte 40).
    let mut attributes = [0u8; 64];
    attributes[0] = 1;
    attributes[4] = 64;
    attributes[40] = 1 << 5 | 1 << 6;
    let here = (0, -1, -1, 0);
    // SAFETY: the kernel reads the structure.
    let fd = unsafe {
        let (pid, cpu, group, flags) = here;
        libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), pid, cpu, group, flags)
    };
    // SAFETY: the call returned a new descriptor, which is ours.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// VFIO's device files before Linux 6.10, perf events and KVM's vCPUs share one inode.
#[test]
fn files_that_share_the_anonymous_inode_are_left_alone() {
    for verb in VERBS {
        let (Some(ours), Some(other)) = (perf_event(), perf_event()) else {
            println!("no perf events here");
            return;
        };
        let backing =
            Backing::new("a ring", Arc::new(ours), 0, PAGE as u64, BackingKind::Other).unwrap();
        let (mapping, rest) = placed(backing);
        let range = while_others_get_in(mapping, Some(other), verb);
        assert_eq!(state(&range), (PAGE, 0));
        drop(rest);
        assert_eq!(state(&range), (PAGE, 0));
    }
}

/// As if the limit on mappings were reached.
#[test]
fn without_room_a_file_with_the_anonymous_inode_stays_mapped() {
    let Some(event) = perf_event() else {
        println!("no perf events here");
        return;
    };
    let backing =
        Backing::new("a ring", Arc::new(event), 0, PAGE as u64, BackingKind::Other).unwrap();
    let (mut mapping, rest) = placed(backing);
    let range = mapping.range();
    let no_room = |call| matches!(call, Call::Reserve | Call::Cover { .. });
    let failed = spy::refuse(Errno::ENOMEM, no_room, || mapping.vacate().unwrap_err());
    assert_eq!(failed.errno(), Some(libc::ENOMEM), "{failed}");
    assert!(!mapping.is_unmapped());
    assert_eq!((mapping.range(), state(&range)), (range.clone(), (PAGE, 0)));
    spy::refuse(Errno::ENOMEM, no_room, || drop(mapping));
    assert_eq!(state(&range), (0, PAGE));
    drop(rest);
    assert_eq!(state(&range), (0, 0));
}

#[test]
fn without_proc_nothing_is_unmapped_after_a_failed_call() {
    // Initializes what is initialized once, while files can be opened.
    drop(placed(backing(PAGE, BackingKind::SharedMemory)));
    for verb in VERBS {
        let (mapping, rest) = placed(backing(PAGE, BackingKind::SharedMemory));
        drop(mapping);
        drop(rest);
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
        let left_alone = unsafe {
            fork::holds_in_child(|| {
                let (mapping, rest) = placed(backing(PAGE, BackingKind::SharedMemory));
                setrlimit(Resource::RLIMIT_NOFILE, 0, 0).unwrap();
                assert!(std::fs::File::open("/proc/self/maps").is_err());
                let range = while_others_get_in(mapping, None, verb);
                drop(rest);
                // ENOMEM if nothing is mapped (`man 2 msync`).
                libc::msync(range.start as *mut _, PAGE, libc::MS_ASYNC) == 0
            })
        };
        assert!(left_alone);
    }
}
