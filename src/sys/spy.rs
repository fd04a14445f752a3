//! Lets tests record the calls that change the address space, and make chosen ones fail.
//!
//! Outside tests, [`call`] does nothing.

#![cfg_attr(test, expect(unsafe_code, reason = "the kernel's contracts are unsafe"))]

use nix::errno::Errno;

/// A call that changes the address space, with the arguments that tests check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// `mmap` of the marker file, inaccessible, at an address that the kernel chooses.
    Reserve,
    /// The same at a given address, if nothing is mapped there (`MAP_FIXED_NOREPLACE`).
    ReserveAt { address: usize },
    /// The same over a range of ours (`MAP_FIXED`).
    Cover { address: usize, len: usize },
    /// `mmap` of a file at an address that the kernel chooses.
    Map { len: usize },
    /// `mmap` of a file over a range of ours (`MAP_FIXED`).
    MapFixed { address: usize, len: usize },
    /// `mmap` of private pages at an address, if nothing is mapped there (`MAP_FIXED_NOREPLACE`).
    FillGap { address: usize },
    /// `munmap`.
    Unmap,
    /// `mprotect`.
    Protect,
    /// `munlock`.
    Unlock,
    /// `madvise`.
    Advise,
    /// `mremap` with `MREMAP_DONTUNMAP`.
    DontUnmap,
    /// `mremap` with `MREMAP_DONTUNMAP|MREMAP_FIXED`.
    DontUnmapFixed { address: usize, len: usize },
    /// `mremap` with an old length of 0.
    OldLenZero,
    /// The same with `MREMAP_FIXED`.
    OldLenZeroFixed { address: usize, len: usize },
    /// `mremap` with `MREMAP_FIXED`.
    MoveFixed { address: usize, len: usize },
}

/// Announces a call. If this returns an error, the caller returns it instead of making the call.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn call(_: Call) -> Result<(), Errno> {
    Ok(())
}

#[cfg(test)]
pub(crate) use in_tests::{call, record, refuse, refuse_destructively, script};

#[cfg(test)]
mod in_tests {
    use std::cell::RefCell;

    use super::*;

    type Script = Box<dyn FnMut(Call) -> Option<(Errno, bool)>>;

    thread_local! {
        static RECORD: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
        static SCRIPT: RefCell<Option<Script>> = const { RefCell::new(None) };
    }

    pub(crate) fn call(call: Call) -> Result<(), Errno> {
        RECORD.with_borrow_mut(|record| {
            if let Some(calls) = record {
                calls.push(call);
            }
        });
        // A script may make calls itself; those are not passed to it.
        let mut script = SCRIPT.take();
        let answer = script.as_mut().and_then(|refuse| refuse(call));
        SCRIPT.set(script);
        let Some((errno, destructive)) = answer else { return Ok(()) };
        if destructive
            && let Call::MapFixed { address, len }
            | Call::DontUnmapFixed { address, len }
            | Call::OldLenZeroFixed { address, len }
            | Call::MoveFixed { address, len }
            | Call::Cover { address, len } = call
        {
            // SAFETY: the caller of the FIXED call may replace the destination. The test asked for what
            // kernels do: unmap the destination before the call fails.
            unsafe { libc::munmap(address as *mut _, len) };
        }
        Err(errno)
    }

    /// Runs `f` and returns the calls that this thread made meanwhile.
    pub(crate) fn record<T>(f: impl FnOnce() -> T) -> (T, Vec<Call>) {
        RECORD.set(Some(Vec::new()));
        let result = f();
        (result, RECORD.take().unwrap_or_default())
    }

    /// Runs `f`. Calls for which `refuse` returns an errno fail with it.
    pub(crate) fn script<T>(
        mut refuse: impl FnMut(Call) -> Option<Errno> + 'static,
        f: impl FnOnce() -> T,
    ) -> T {
        run(move |call| refuse(call).map(|errno| (errno, false)), f)
    }

    /// Runs `f`. Calls that match fail with `errno`.
    pub(crate) fn refuse<T>(errno: Errno, matches: fn(Call) -> bool, f: impl FnOnce() -> T) -> T {
        run(move |call| matches(call).then_some((errno, false)), f)
    }

    /// As [`refuse`], but a failing call first unmaps its destination, as kernels do.
    pub(crate) fn refuse_destructively<T>(
        errno: Errno,
        matches: fn(Call) -> bool,
        f: impl FnOnce() -> T,
    ) -> T {
        run(move |call| matches(call).then_some((errno, true)), f)
    }

    fn run<T>(
        script: impl FnMut(Call) -> Option<(Errno, bool)> + 'static,
        f: impl FnOnce() -> T,
    ) -> T {
        SCRIPT.set(Some(Box::new(script)));
        let result = f();
        SCRIPT.set(None);
        result
    }
}
