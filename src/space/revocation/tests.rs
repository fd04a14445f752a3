//! What the kernel refuses, what a child has, and what counts against limits.

use nix::sys::resource::{Resource, setrlimit};

use super::*;
use crate::space::fixture::{MIB, PAGE, backing, read, secluded, shared, state, write};
use crate::space::{BackingKind, Mapping, Placement};
use crate::sys::spy::{self, Call};

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
        let error = spy::refuse(Errno::ENODEV, refused, || control.restore(WHY)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert!(control.is_revoked());
        assert_eq!((read(&mapping, PAGE), state(&mapping.range())), (u32::MAX, (2 * PAGE, 0)));
    }
    control.restore(WHY).unwrap();
    assert_eq!(read(&mapping, PAGE), 7);
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
fn pages_that_count_as_committed_are_moved_over_a_window() {
    let held = limited(Resource::RLIMIT_DATA, usize::MAX >> 1, || {
        absent::count_as_committed();
        let mapping = shared(2 * MIB);
        for _ in 0..3 {
            mapping.control().revoke(WHY).unwrap();
            assert_eq!(read(&mapping, 2 * MIB - 4), u32::MAX);
            write(&mapping, 0, 3);
            mapping.control().restore(WHY).unwrap();
            assert_eq!(read(&mapping, 0), 0);
        }
        state(&mapping.range()) == (2 * MIB, 0)
    });
    assert!(held);
}

#[test]
fn what_became_a_hole_is_filled_with_pages() {
    let backing = Arc::new(backing(PAGE, BackingKind::SharedMemory));
    let place = Placement::In(secluded(PAGE));
    let mapping = Mapping::new(backing, 0, PAGE, Access::ReadWrite, place).unwrap();
    let range = mapping.range();
    // SAFETY: the mapping is the test's own, and nothing else has its address.
    unsafe { mm::munmap(range.start, PAGE) }.unwrap();
    let lock = MmapLock::take();
    mapping.control().after_failed_revoke(&lock, &range, Errno::ENOMEM).unwrap();
    drop(lock);
    assert_eq!(read(&mapping, 0), u32::MAX);
    // What is still there is the window.
    let mapping = shared(PAGE);
    let lock = MmapLock::take();
    let control = mapping.control();
    let error = control.after_failed_revoke(&lock, &mapping.range(), Errno::ENOMEM).unwrap_err();
    drop(lock);
    assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
    assert_eq!(read(&mapping, 0), 0);
}
