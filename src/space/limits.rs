//! The resource limits that a mapping call may reach: an error names the limit, what is in use, and how
//! to raise it.

#![cfg_attr(test, expect(unsafe_code, reason = "addresses are owned by convention"))]

use std::fmt;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::error::{Error, ErrorKind};
use crate::sys::maps;

/// The error of a mapping call that failed to get `size` bytes.
pub(crate) fn out_of_memory(
    errno: Errno,
    operation: &'static str,
    object: impl fmt::Display,
    size: usize,
) -> Error {
    let error = Error::os(errno, operation, object);
    match errno {
        Errno::EAGAIN => out_of_locked_memory(error, size as u64),
        Errno::ENOMEM => match maps::count_and_limit() {
            Some((count, limit)) if is_reached(count, limit) => error
                .into_kind(ErrorKind::TooManyMappings)
                .with_reason(format!(
                    "the process has {count} mappings, and may have {limit} (vm.max_map_count)"
                ))
                .with_advice(format!(
                    "drop windows, or raise it: sysctl vm.max_map_count={}",
                    2 * limit
                )),
            _ => out_of_address_space(error, size as u64),
        },
        _ => error,
    }
}

/// A call may need two more mappings: the one it makes, and one that it splits.
fn is_reached(count: usize, limit: usize) -> bool {
    count + 2 >= limit
}

/// `do_mmap` returns EAGAIN (Linux 5.10 to 7.3) if the mapping would be locked and exceeds the limit.
fn out_of_locked_memory(error: Error, size: u64) -> Error {
    let (Some(limit), Some(used)) = (limit(Resource::RLIMIT_MEMLOCK), maps::locked()) else {
        return error;
    };
    let need = used.saturating_add(size);
    let pid = std::process::id();
    error
        .into_kind(ErrorKind::LockedMemory)
        .with_reason(format!(
            "after mlockall(MCL_FUTURE) every mapping is locked: the process has {used} bytes locked, \
             needs {need}, and may have {limit} (RLIMIT_MEMLOCK)"
        ))
        .with_advice(format!(
            "raise it: prlimit --pid {pid} --memlock={need}, ulimit -l, or LimitMEMLOCK= of its unit; or \
             map before mlockall"
        ))
}

fn out_of_address_space(error: Error, size: u64) -> Error {
    let (Some(limit), Some(used)) = (limit(Resource::RLIMIT_AS), maps::address_space()) else {
        return error.with_reason("no range of this size is free, or memory is short");
    };
    let need = used.saturating_add(size);
    if need <= limit {
        return error.with_reason("memory is short");
    }
    let pid = std::process::id();
    error
        .into_kind(ErrorKind::AddressSpace)
        .with_reason(format!(
            "the process has {used} bytes of address space in use, needs {need}, and may have {limit} \
             (RLIMIT_AS)"
        ))
        .with_advice(format!(
            "raise it: prlimit --pid {pid} --as={need}, ulimit -v, or LimitAS= of its unit"
        ))
}

/// The soft limit in bytes; `None` if it is unlimited.
fn limit(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(limit, _)| limit).filter(|limit| *limit != RLIM_INFINITY)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::sys::resource::setrlimit;

    use super::*;
    use crate::space::fixture::{MIB, PAGE, backing, read, write};
    use crate::space::{Access, BackingKind, Failed, Mapping, Placement, Reservation, Strategy};
    use crate::sys::fork;

    #[test]
    fn two_mappings_less_than_the_limit_are_too_many() {
        assert!(is_reached(65528, 65530) && is_reached(65532, 65530));
        assert!(!is_reached(65527, 65530) && !is_reached(40000, 65530));
    }

    /// Duplicates a mapping of 1 MiB until that fails.
    fn duplicate_until_refused() -> Failed {
        let window = map(MIB, BackingKind::Other).unwrap();
        let mut all = Vec::with_capacity(256);
        loop {
            match window.duplicate(Access::ReadOnly, Placement::Anywhere.into()) {
                Ok((duplicate, _)) => all.push(duplicate),
                Err(failed) => break failed,
            }
        }
    }

    fn map(size: usize, kind: BackingKind) -> Result<Mapping, Failed> {
        let backing = Arc::new(backing(size, kind));
        Mapping::new(backing, 0, size, Access::ReadWrite, Placement::Anywhere)
    }

    /// Runs `f` in a child without capabilities that locks its mappings and may lock `limit` bytes.
    fn with_locked_memory(limit: usize, f: impl FnOnce() -> bool) -> bool {
        // Initializes what is initialized once, before the fork.
        drop(map(2 * MIB, BackingKind::SharedMemory).unwrap());
        let in_child = || {
            setrlimit(Resource::RLIMIT_MEMLOCK, limit as u64, limit as u64).unwrap();
            // The raw system call: the C library's function synchronizes with other threads.
            // SAFETY: the calls change the user and the locking mode of the child, and no memory.
            unsafe {
                libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534);
                assert_eq!(libc::mlockall(libc::MCL_FUTURE), 0);
            }
            f()
        };
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
        unsafe { fork::holds_in_child(in_child) }
    }

    #[test]
    fn a_window_is_locked_once() {
        let held = with_locked_memory(7 * MIB, || {
            for kind in [BackingKind::SharedMemory, BackingKind::VfioPci] {
                let window = map(4 * MIB, kind).unwrap();
                write(&window, 0, 7);
                assert_eq!(read(&window, 0), 7);
            }
            true
        });
        assert!(held);
    }

    #[test]
    fn relocating_locks_a_window_twice_and_no_more() {
        let held = with_locked_memory(5 * MIB, || {
            let mut window = map(2 * MIB, BackingKind::SharedMemory).unwrap();
            write(&window, 0, 7);
            for _ in 0..4 {
                let again = |place: Placement| place.only(Strategy::MapAgain);
                let old = window.relocate(again(Placement::Anywhere)).unwrap().old.unwrap();
                assert_eq!(read(&window, 0), 7);
                window.relocate(again(Placement::In(old))).unwrap();
            }
            drop(window.vacate().unwrap());
            true
        });
        assert!(held);
    }

    #[test]
    fn a_large_window_needs_no_more_than_its_own_size() {
        assert!(with_locked_memory(5 * MIB, || map(4 * MIB, BackingKind::SharedMemory).is_ok()));
    }

    #[test]
    fn the_limit_on_locked_memory_is_named() {
        let named = with_locked_memory(7 * MIB, || {
            let window = map(4 * MIB, BackingKind::SharedMemory).unwrap();
            let failed = map(6 * MIB, BackingKind::SharedMemory).unwrap_err();
            let other = map(2 * MIB, BackingKind::SharedMemory).unwrap();
            let duplicated = other.duplicate(Access::ReadOnly, Placement::Anywhere.into());
            drop(window);
            let small = duplicate_until_refused();
            [failed, duplicated.map(drop).unwrap_err(), small].iter().all(|failed| {
                let words = failed.to_string();
                println!("{words}");
                failed.kind() == ErrorKind::LockedMemory
                    && failed.error().errno() == Some(libc::EAGAIN)
                    && words.contains("may have 7340032 (RLIMIT_MEMLOCK)")
                    && words.contains("--memlock=")
            })
        });
        assert!(named);
    }

    /// Runs `f` in a child that may have `more` bytes of address space.
    fn with_address_space(more: usize, f: impl FnOnce() -> bool) -> bool {
        drop(map(2 * MIB, BackingKind::SharedMemory).unwrap());
        let in_child = || {
            let limit = maps::address_space().unwrap() + more as u64;
            setrlimit(Resource::RLIMIT_AS, limit, limit).unwrap();
            f()
        };
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
        unsafe { fork::holds_in_child(in_child) }
    }

    #[test]
    fn a_window_takes_address_space_once() {
        for kind in [BackingKind::SharedMemory, BackingKind::VfioPci] {
            assert!(with_address_space(100 * MIB, || map(98 * MIB, kind).is_ok()));
        }
    }

    #[test]
    fn the_limit_on_address_space_is_named() {
        let named = with_address_space(100 * MIB, || {
            let (limit, _) = getrlimit(Resource::RLIMIT_AS).unwrap();
            let window = map(64 * MIB, BackingKind::SharedMemory).unwrap();
            let failed = map(64 * MIB, BackingKind::SharedMemory).unwrap_err();
            let duplicated = window.duplicate(Access::ReadOnly, Placement::Anywhere.into());
            let duplicated = duplicated.map(drop).unwrap_err();
            [failed, duplicated, duplicate_until_refused()].iter().all(|failed| {
                let words = failed.to_string();
                println!("{words}");
                failed.kind() == ErrorKind::AddressSpace
                    && failed.error().errno() == Some(libc::ENOMEM)
                    && words.contains(&format!("may have {limit} (RLIMIT_AS)"))
                    && words.contains("--as=")
            })
        });
        assert!(named);
    }

    #[test]
    fn the_limit_on_mappings_is_named() {
        let named = || {
            let mut all = Vec::new();
            let failed = loop {
                match Reservation::new(PAGE) {
                    Ok(reservation) => all.push(reservation),
                    Err(failed) => break failed,
                }
            };
            let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
            // Makes room for the memory of the error.
            all.truncate(all.len() - 8);
            let words = failed.to_string();
            println!("{words}");
            failed.kind() == ErrorKind::TooManyMappings
                && words.contains(&format!("may have {} (vm.max_map_count)", limit.trim()))
        };
        // SAFETY: the child takes no lock that another thread holds: only this test uses what it touches.
        assert!(unsafe { fork::holds_in_child(named) });
    }
}
