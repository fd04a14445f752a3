//! What the kernel refuses, what a child has, and what counts against limits.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};

use super::absent::Refused;
use super::registry::State;
use super::*;
use crate::error::ErrorKind;
use crate::space::fixture::{MIB, PAGE, backing, map, read, secluded, shared, state, write};
use crate::space::{Backing, BackingKind, Mapping, Placement, Strategy};
use crate::sys::mm::{self, Access};
use crate::sys::spy::{self, Call};
use crate::sys::{eventfd, file, maps};

const WHY: Reasons = Reasons::of(0);

#[test]
fn a_child_has_a_hole_in_place_of_a_revoked_window() {
    let mapping = shared(PAGE);
    let range = mapping.range();
    let control = mapping.control();
    for revoked in [true, false, true] {
        if revoked {
            control.revoke(WHY).unwrap();
        } else {
            control.restore(WHY).unwrap();
        }
        assert_eq!(control.is_revoked(), revoked);
        assert_eq!(state(&range), (PAGE, 0));
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
        let holds = unsafe {
            fork::holds_in_child(|| {
                let gone = [control.revoke(WHY), control.restore(WHY), control.seal()];
                state(&range) == (0, 0)
                    && gone.into_iter().all(|it| it.unwrap_err().kind() == ErrorKind::Gone)
            })
        };
        assert!(holds, "revoked: {revoked}");
    }
}

#[test]
fn what_a_raw_child_maps_at_old_addresses_is_inherited() {
    let mapping = shared(PAGE);
    let range = mapping.range();
    mapping.control().revoke(WHY).unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let at = range.start as *mut libc::c_void;
    // SAFETY: the children take no lock that another thread holds: only this test uses what they touch.
    // MAP_FIXED_NOREPLACE replaces nothing.
    let held = unsafe {
        // It keeps the pages from the next child.
        fork::holds_in_child(|| state(&range) == (0, 0))
            && fork::holds_in_raw_child(|| {
                libc::mmap(at, PAGE, libc::PROT_READ, flags, -1, 0) == at
                    && fork::holds_in_child(|| state(&range) == (PAGE, 0))
            })
    };
    assert!(held);
}

#[test]
fn a_window_is_restored_when_no_reason_is_left() {
    let mapping = shared(PAGE);
    let (control, other) = (mapping.control(), Reasons::of(1));
    control.revoke(WHY).unwrap();
    assert!(!control.revoke(other).unwrap().has_changed());
    assert!(!control.restore(WHY).unwrap().has_changed());
    assert_eq!(control.reasons(), other);
    assert!(!control.restore(WHY).unwrap().has_changed());
    assert!(control.restore(other).unwrap().has_changed());
    assert!(control.reasons().is_empty());
}

#[test]
fn a_window_that_cannot_be_mapped_stays_revoked() {
    let mapping = shared(2 * PAGE);
    let control = mapping.control();
    write(&mapping, PAGE, 7);
    control.revoke(WHY).unwrap();
    for refused in [|call| matches!(call, Call::Map { .. }), |call| matches!(call, Call::Advise)] {
        let restore = || control.restore(WHY.and(Reasons::FAULT));
        let error = spy::refuse(Errno::ENODEV, refused, restore).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert!(control.is_revoked());
        assert_eq!((read(&mapping, PAGE), state(&mapping.range())), (u32::MAX, (2 * PAGE, 0)));
    }
    // The second mark is that of the pages, and a call that fails after it might leave something else.
    let mut left = 1;
    let refuse = move |call| {
        left -= i32::from(matches!(call, Call::Advise));
        (left < 0).then_some(Errno::ENOMEM)
    };
    let error = spy::script(refuse, || control.restore(Reasons::FAULT)).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
    assert_eq!((read(&mapping, PAGE), state(&mapping.range())), (u32::MAX, (2 * PAGE, 0)));
    // The pages are found to be still there after a move that failed; else the process would end.
    let refused = |call| matches!(call, Call::MoveFixed { .. });
    spy::refuse(Errno::ENOMEM, refused, || control.restore(Reasons::FAULT)).unwrap_err();
    assert_eq!((read(&mapping, PAGE), state(&mapping.range())), (u32::MAX, (2 * PAGE, 0)));
    control.restore(Reasons::FAULT).unwrap();
    assert_eq!(read(&mapping, PAGE), 7);
}

#[test]
fn a_revoked_window_that_cannot_be_unmapped_is_kept() {
    let mut mapping = shared(PAGE);
    mapping.control().revoke(WHY).unwrap();
    let refused = |call| matches!(call, Call::Cover { .. });
    let error = spy::refuse(Errno::ENOMEM, refused, || mapping.vacate()).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Os, Some(libc::ENOMEM)), "{error}");
    assert!(mapping.control().is_revoked() && !mapping.is_unmapped());
    assert_eq!((read(&mapping, 0), state(&mapping.range())), (u32::MAX, (PAGE, 0)));
    mapping.control().restore(WHY).unwrap();
    assert_eq!(read(&mapping, 0), 0);
}

#[test]
fn a_revoked_window_that_cannot_be_covered_is_unmapped() {
    let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
    let (first, rest) = secluded(2 * PAGE).split_at(PAGE).unwrap();
    let place = Placement::In(first);
    let mapping = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
    let range = mapping.range();
    mapping.control().revoke(WHY).unwrap();
    let refused = |call| matches!(call, Call::Cover { .. });
    spy::refuse(Errno::ENOMEM, refused, || drop(mapping));
    assert_eq!(state(&range), (0, PAGE), "it is reserved again");
    drop(rest);
    assert_eq!(state(&range), (0, 0));
}

/// Runs `f` in a child that may lock, or have as data, no more than `limit` bytes.
fn limited(resource: Resource, limit: usize, f: impl FnOnce() -> bool) -> bool {
    // Initializes what is initialized once, before the fork.
    shared(2 * MIB).control().revoke(WHY).unwrap();
    let in_child = || {
        setrlimit(resource, limit as u64, limit as u64).unwrap();
        if resource == Resource::RLIMIT_MEMLOCK {
            // The raw system call: the C library's function synchronizes with other threads.
            // SAFETY: the calls change the user and the locking mode of the child, and no memory.
            unsafe {
                libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534);
                assert_eq!(libc::mlockall(libc::MCL_FUTURE), 0);
            }
        }
        f()
    };
    // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
    unsafe { fork::holds_in_child(in_child) }
}

#[test]
fn a_window_at_the_limit_of_locked_memory_is_revoked() {
    let held = limited(Resource::RLIMIT_MEMLOCK, 5 * MIB, || {
        let mapping = shared(2 * MIB);
        write(&mapping, 0, 3);
        for _ in 0..4 {
            mapping.control().revoke(WHY).unwrap();
            assert_eq!(read(&mapping, 2 * MIB - 4), u32::MAX);
            mapping.control().restore(WHY).unwrap();
            assert_eq!(read(&mapping, 0), 3);
        }
        true
    });
    assert!(held);
}

#[test]
fn a_window_that_cannot_be_revoked_is_what_it_was() {
    let held = limited(Resource::RLIMIT_DATA, MIB, || {
        let mapping = shared(2 * MIB);
        write(&mapping, 0, 3);
        let error = mapping.control().revoke(WHY).unwrap_err();
        assert!(error.errno() == Some(libc::ENOMEM), "{error}");
        assert!(!mapping.control().is_revoked());
        write(&mapping, 4, 5);
        (read(&mapping, 0), read(&mapping, 4)) == (3, 5)
    });
    assert!(held);
}

#[test]
fn on_an_old_kernel_pages_are_moved_over_a_window() {
    let held = limited(Resource::RLIMIT_DATA, usize::MAX >> 1, || {
        absent::always_move();
        let mapping = shared(2 * MIB);
        for _ in 0..3 {
            let (_, calls) = spy::record(|| mapping.control().revoke(WHY).unwrap());
            let at = mapping.range().start;
            assert_eq!(calls[1], Call::MoveFixed { address: at, len: 2 * MIB });
            assert_eq!(read(&mapping, 2 * MIB - 4), u32::MAX);
            write(&mapping, 0, 3);
            mapping.control().restore(WHY).unwrap();
            assert_eq!(read(&mapping, 0), 0);
        }
        state(&mapping.range()) == (2 * MIB, 0)
    });
    assert!(held);
}

/// Far from where the kernel maps what other tests map meanwhile.
fn alone(len: usize) -> Mapping {
    let backing = Arc::new(backing(len, BackingKind::SharedMemory));
    let place = Placement::In(secluded(len));
    Mapping::new(backing, 0, len, Access::ReadWrite, place).unwrap()
}

fn replaces(call: Call) -> bool {
    matches!(call, Call::MapFixed { .. } | Call::MoveFixed { .. })
}

fn replaces_or_fills(call: Call) -> bool {
    replaces(call) || matches!(call, Call::FillGap { .. })
}

/// Does what the handler does at a fault in the window.
fn handle(mapping: &Mapping) -> std::result::Result<bool, Refused> {
    guard::revoke(&registry().find(mapping.range().start).unwrap())
}

/// A handler takes no lock, so it may revoke a window just before its page tables move.
#[test]
fn the_pages_of_a_revoked_window_are_not_duplicated() {
    let mapping = alone(PAGE);
    write(&mapping, 0, 6);
    let duplicate =
        |place: Placement| mapping.duplicate(Access::ReadWrite, place.by(&[Strategy::DontUnmap]));
    drop(duplicate(Placement::Anywhere).unwrap());
    for placed in [false, true] {
        let place = if placed { Placement::In(secluded(PAGE)) } else { Placement::Anywhere };
        let start = mapping.range().start;
        let revoke = move |call| {
            if matches!(call, Call::DontUnmap | Call::DontUnmapFixed { .. }) {
                assert!(guard::revoke(&registry().find(start).unwrap()).unwrap());
            }
            None
        };
        let failed = spy::script(revoke, || duplicate(place).map(drop).unwrap_err());
        assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}");
        let place = failed.into_reservation();
        assert_eq!(place.as_ref().map(|it| state(&it.range())), placed.then_some((0, PAGE)));
        assert_eq!(read(&mapping, 0), u32::MAX);
        mapping.control().restore(Reasons::FAULT).unwrap();
        let (made, _) = duplicate(Placement::Anywhere).unwrap();
        assert_eq!((read(&mapping, 0), read(&made, 0)), (6, 6));
    }
}

#[test]
fn what_became_a_hole_is_filled_with_pages() {
    type Revoke = fn(&Mapping) -> bool;
    let by: [Revoke; 2] =
        [|it| it.control().revoke(WHY).unwrap().has_changed(), |it| handle(it).unwrap()];
    for revoke in by {
        let mapping = alone(PAGE);
        assert!(spy::refuse_destructively(Errno::ENOMEM, replaces, || revoke(&mapping)));
        assert!(mapping.control().is_revoked());
        assert_eq!((read(&mapping, 0), state(&mapping.range())), (u32::MAX, (PAGE, 0)));
        // A restore that fails leaves the pages, too.
        let restore = || mapping.control().restore(WHY.and(Reasons::FAULT));
        let error = spy::refuse_destructively(Errno::ENOMEM, replaces, restore).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
        assert!(mapping.control().is_revoked());
        assert_eq!(read(&mapping, 0), u32::MAX);
        restore().unwrap();
        assert_eq!(read(&mapping, 0), 0);
    }
}

#[test]
fn what_is_still_there_after_a_failed_call_is_the_window() {
    for old in [false, true] {
        let held = limited(Resource::RLIMIT_DATA, usize::MAX >> 1, || {
            if old {
                absent::always_move();
            }
            let mapping = alone(PAGE);
            let control = mapping.control();
            for refused in [replaces, replaces_or_fills] {
                let revoke = || control.revoke(WHY).unwrap_err();
                let error = spy::refuse(Errno::ENOMEM, refused, revoke);
                assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
                spy::refuse(Errno::ENOMEM, refused, || handle(&mapping)).unwrap_err();
                assert!(!control.is_revoked());
                write(&mapping, 0, 6);
                assert_eq!((read(&mapping, 0), state(&mapping.range())), (6, (PAGE, 0)));
            }
            control.revoke(WHY).unwrap().has_changed()
        });
        assert!(held, "old: {old}");
    }
}

#[test]
fn a_hole_without_memory_for_pages_is_plugged_by_the_handler() {
    let mapping = alone(PAGE);
    let refuse = |f: fn(&Mapping) -> _| {
        spy::refuse_destructively(Errno::ENOMEM, replaces_or_fills, || f(&mapping))
    };
    refuse(handle).unwrap_err();
    assert!(mapping.control().is_revoked());
    assert_eq!(state(&mapping.range()), (0, PAGE), "a hole, or accessible");
    mapping.control().restore(Reasons::FAULT).unwrap();
    assert_eq!(read(&mapping, 0), 0);
}

/// The kernel would refuse the pages, and might have unmapped the reservation before.
#[test]
fn no_reservation_is_replaced_for_a_window_that_was_revoked_just_now() {
    let mapping = alone(PAGE);
    let start = mapping.range().start;
    let order = [Strategy::DontUnmap, Strategy::OldLenZero, Strategy::MapAgain];
    let duplicate = |place: Placement| mapping.duplicate(Access::ReadWrite, place.by(&order));
    let revoke = move |call| match call {
        Call::DontUnmapFixed { .. } => {
            assert!(guard::revoke(&registry().find(start).unwrap()).unwrap());
            Some(Errno::EINVAL)
        }
        Call::OldLenZeroFixed { .. } => panic!("a revoked window is duplicated"),
        _ => None,
    };
    let place = Placement::In(secluded(PAGE));
    let failed = spy::script(revoke, || duplicate(place).map(drop).unwrap_err());
    assert_eq!(failed.kind(), ErrorKind::Revoked, "{failed}");
    assert_eq!(state(&failed.into_reservation().unwrap().range()), (0, PAGE));
}

/// By which signal a child ends that runs `f`; 0 if `f` returns. Panics if `f` does.
fn signal_of(f: impl FnOnce()) -> i32 {
    // SAFETY: the child takes no lock that another thread holds: only its test uses what it touches.
    unsafe {
        match libc::fork() {
            0 => {
                libc::alarm(120);
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
                libc::_exit(i32::from(result.is_err()))
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                assert!(libc::WIFSIGNALED(status) || status == 0, "the child has panicked");
                libc::WTERMSIG(status)
            }
        }
    }
}

#[test]
fn a_verb_that_loses_a_window_ends_the_process() {
    // Initializes what is initialized once, before the fork.
    shared(PAGE).control().revoke(WHY).unwrap();
    let hole = || {
        let mapping = alone(PAGE);
        let revoke = || drop(mapping.control().revoke(WHY));
        spy::refuse_destructively(Errno::ENOMEM, replaces_or_fills, revoke);
    };
    // What another thread has mapped in the gap is not the window.
    let other = |backing: Backing| {
        absent::always_move();
        let place = secluded(PAGE).range();
        let control = Control::new(Arc::new(backing), 0, PAGE, Access::ReadWrite, place.start);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: nothing is replaced.
        unsafe { libc::mmap(place.start as *mut _, PAGE, libc::PROT_READ, flags, -1, 0) };
        let moves = |call| matches!(call, Call::MoveFixed { .. });
        let _ = spy::refuse(Errno::ENOMEM, moves, || control.revoke(WHY));
    };
    // As a VFIO device before Linux 6.10, which shares its inode with others.
    let nameless = || {
        let fd = Arc::new(eventfd::new().unwrap());
        Backing::new("a device", fd, 0, PAGE as u64, BackingKind::Other).unwrap()
    };
    assert_eq!(signal_of(hole), libc::SIGABRT);
    let named = || backing(PAGE, BackingKind::SharedMemory);
    assert_eq!(signal_of(|| other(named())), libc::SIGABRT);
    assert_eq!(signal_of(|| other(nameless())), libc::SIGABRT);
}

#[test]
fn a_sibling_that_may_be_lost_ends_the_process() {
    // Initializes what is initialized once, before the fork.
    shared(PAGE).control().revoke(WHY).unwrap();
    let fault = |refused: fn(Call) -> bool| {
        absent::always_move();
        guard::WHOLE_DEVICE.store(true, Ordering::Relaxed);
        let backing = Arc::new(backing(2 * PAGE, BackingKind::SharedMemory));
        let (window, sibling) = (map(&backing, PAGE), map(&backing, 2 * PAGE));
        let contain = || guard::contain(window.range().start, libc::BUS_ADRERR);
        assert!(spy::refuse(Errno::ENOMEM, refused, contain) && window.control().is_revoked());
        assert_eq!(sibling.control().is_revoked(), !refused(Call::Map { len: 2 * PAGE }));
    };
    assert_eq!(signal_of(|| fault(|_| false)), 0);
    assert_eq!(signal_of(|| fault(|call| matches!(call, Call::Map { len } if len == 2 * PAGE))), 0);
    let moves = |call| matches!(call, Call::MoveFixed { len, .. } if len == 2 * PAGE);
    assert_eq!(signal_of(|| fault(moves)), libc::SIGABRT);
}

/// As in a signal handler of the program that interrupts the verb.
#[test]
fn a_fault_while_a_verb_revokes_a_window_is_contained() {
    // How is decided when the first window is mapped.
    drop(shared(PAGE));
    if absent::moves_pages() {
        // Signals are blocked meanwhile.
        return;
    }
    for refused in [None, Some(Errno::ENOMEM)] {
        let mapping = shared(PAGE);
        let (start, control) = (mapping.range().start, mapping.control());
        let script = move |call| {
            let Call::MapFixed { .. } = call else { return None };
            assert!(guard::contain(start, libc::BUS_ADRERR));
            refused
        };
        assert!(spy::script(script, || control.revoke(WHY)).unwrap().has_changed());
        assert_eq!((control.reasons(), read(&mapping, 0)), (WHY, u32::MAX));
        assert!(control.restore(WHY).unwrap().has_changed());
        write(&mapping, 0, 7);
        assert_eq!(read(&mapping, 0), 7);
    }
}

/// A fault in another window of the device, at the first call of a verb, which may be refused.
#[test]
fn a_window_that_a_verb_has_busy_is_revoked_with_the_others() {
    shared(PAGE).control().revoke(WHY).unwrap();
    let by = || Placement::Anywhere.only(Strategy::MapAgain);
    let during = |refused: Option<Errno>, verb: &dyn Fn(&mut Mapping) -> Mapping| {
        guard::WHOLE_DEVICE.store(true, Ordering::Relaxed);
        let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
        let (mut window, sibling) = (map(&backing, PAGE), map(&backing, PAGE));
        let at = sibling.range().start;
        let mut fault = Some(move || assert!(guard::contain(at, libc::BUS_ADRERR)));
        let call = move |_| {
            let fault = fault.take()?;
            fault();
            refused
        };
        let changed = spy::script(call, || verb(&mut window));
        for it in [&changed, &sibling] {
            assert!(it.control().is_revoked());
            assert_eq!(read(it, 0), u32::MAX);
            it.control().restore(Reasons::FAULT).unwrap();
            assert!(!it.control().is_revoked());
        }
    };
    let duplicate = |window: &mut Mapping| window.duplicate(Access::ReadWrite, by()).unwrap().0;
    let relocate = |window: &mut Mapping| {
        window.relocate(by()).unwrap();
        std::mem::replace(window, shared(PAGE))
    };
    let fail_to_relocate = |window: &mut Mapping| {
        window.relocate(by()).unwrap_err();
        std::mem::replace(window, shared(PAGE))
    };
    assert_eq!(signal_of(|| during(None, &duplicate)), 0);
    assert_eq!(signal_of(|| during(None, &relocate)), 0);
    assert_eq!(signal_of(|| during(Some(Errno::ENOMEM), &fail_to_relocate)), 0);
}

#[test]
fn a_restore_that_fails_leaves_no_reason_but_the_fault() {
    let mapping = shared(PAGE);
    let control = mapping.control();
    control.revoke(WHY).unwrap();
    let refuse = |call| matches!(call, Call::Map { .. });
    spy::refuse(Errno::ENOMEM, refuse, || control.restore(WHY)).unwrap_err();
    assert_eq!(control.reasons(), Reasons::FAULT);
    assert!(control.restore(Reasons::FAULT).unwrap().has_changed());
}

#[test]
fn an_unmapped_window_is_told_from_a_sealed_one() {
    let mut mapping = shared(PAGE);
    let control = mapping.control().clone();
    assert!(!control.is_unmapped());
    control.revoke(WHY).unwrap();
    assert!(!control.is_unmapped());
    drop(mapping.vacate().unwrap());
    assert!(control.is_unmapped());
    let mapping = shared(PAGE);
    if mapping.control().seal().is_ok() {
        assert!(!mapping.control().is_unmapped());
        assert_eq!(mapping.control().restore(WHY).unwrap().after, WindowState::Sealed);
    }
}

#[test]
fn nobody_can_change_the_ones() {
    drop(shared(PAGE));
    let fd = absent::file_of(PAGE).unwrap();
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    for size in [0, 1 << 30] {
        let error = file.set_len(size).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size:#x}");
    }
    let error = std::os::unix::fs::FileExt::write_at(&file, &[0], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let fd = file::memory_file("test", 0).unwrap();
    let mapping = shared(PAGE);
    let lock = MmapLock::take();
    let control = mapping.control();
    let entry = control.entry().unwrap();
    assert!(entry.mark());
    // Pages that fail, as if their memory did: a file without a byte.
    // SAFETY: the mapping is the test's to replace.
    unsafe { mm::map_fixed(&lock, mapping.range().start, fd.as_fd(), 0, PAGE, Access::ReadOnly) }
        .unwrap();
    drop(lock);
    let contain = || guard::contain(mapping.range().start + 5, libc::BUS_ADRERR);
    entry.change(State::RevokingByVerb, State::Revoking).unwrap();
    assert!(contain(), "it is about to be replaced");
    entry.change(State::Revoking, State::Revoked).unwrap();
    assert!(!contain(), "the access would be repeated for ever");
    control.restore(Reasons::FAULT).unwrap();
    control.revoke(WHY).unwrap();
    assert!(contain(), "an access from before");
}

#[test]
fn what_a_revoked_window_shows_does_not_change() {
    let held = limited(Resource::RLIMIT_DATA, usize::MAX >> 1, || {
        const LARGE: usize = 128 * MIB;
        let (small, large) = (shared(MIB), shared(LARGE));
        let shows = |it: &Mapping| (it.control().pages, it.control().pages.identity());
        let before = [shows(&small), shows(&large)];
        for it in [&small, &large] {
            it.control().revoke(WHY).unwrap();
        }
        set_revocable_size(LARGE);
        let late = shared(LARGE);
        assert_eq!(before, [shows(&small), shows(&large)]);
        for (it, ones) in [(&small, true), (&large, false), (&late, true)] {
            assert_eq!(it.control().reads_ones(), ones);
            it.control().revoke(WHY).unwrap();
            assert_eq!(read(it, MIB - 4), if ones { u32::MAX } else { 0 });
            // They are told from other mappings after a call that failed.
            let refused = |call| matches!(call, Call::MoveFixed { .. });
            spy::refuse(Errno::ENOMEM, refused, || it.control().restore(WHY)).unwrap_err();
            let shown = maps::still_shows(&it.range(), it.control().pages.in_maps().into(), 0);
            assert_eq!(shown, Some(true));
        }
        true
    });
    assert!(held);
}

#[test]
fn a_limit_on_files_is_no_end_of_the_process() {
    let held = limited(Resource::RLIMIT_FSIZE, 1 << 40, || {
        const LARGE: usize = 300 * MIB;
        set_revocable_size(usize::MAX);
        let backing = Arc::new(backing(LARGE, BackingKind::SharedMemory));
        setrlimit(Resource::RLIMIT_FSIZE, MIB as u64, MIB as u64).unwrap();
        let mapping = crate::space::fixture::map(&backing, LARGE);
        mapping.control().revoke(WHY).unwrap();
        !mapping.control().reads_ones() && read(&mapping, 0) == 0
    });
    assert!(held);
}
