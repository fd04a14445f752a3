//! Tells a process from its children of `fork(2)`.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use super::mmap_lock;

static GENERATION: AtomicU32 = AtomicU32::new(0);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a child of fork has one thread, the one that called fork. No code of this crate forks while it holds the
    // lock. If a signal handler of the program interrupts such code and forks, the child may leave the handler only
    // to end or to execute another program (`man 7 signal-safety`).
    unsafe { mmap_lock::renew() };
}

/// A number that differs between a process and its children of `fork(2)`.
///
/// Children do not inherit windows (`MADV_DONTFORK`): in a child, nothing is mapped at their addresses at
/// first, and later anything may be. An owner of addresses stores the generation in which it got them. It
/// does nothing to them in another generation.
pub(crate) fn generation() -> u32 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: the handler writes to two statics, which is allowed in a child of a threaded process.
        // If registering fails for lack of memory, children keep their parent's generation.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    GENERATION.load(Ordering::Relaxed)
}

/// Has `f` run in each thread that calls the C library's `fork`, before it forks. That may be in a signal handler, so
/// `f` is async-signal-safe. If registering fails for lack of memory, it does not run.
pub(crate) fn before(f: extern "C" fn()) {
    /// `pthread_atfork` has no safe type for a handler.
    type Handler = unsafe extern "C" fn();
    // SAFETY: the handler is one of this crate, which may be called at any time.
    unsafe { libc::pthread_atfork(Some(f as Handler), None, None) };
}

/// As [`generation`], for a signal handler. The code that the handler serves has called [`generation`] before.
pub(crate) fn generation_in_handler() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Whether `f` returns true in a child of `fork(2)`. The child exits after `f`, or after two minutes.
///
/// # Safety
/// `f` takes no lock that another thread may hold now. (The C library makes its allocator usable after
/// fork.)
#[cfg(test)]
pub(crate) unsafe fn holds_in_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: the caller vouches for what the child does.
    unsafe { holds(libc::fork(), f) }
}

/// As [`holds_in_child`], in a child that the C library does not know of.
///
/// # Safety
/// As [`holds_in_child`].
#[cfg(test)]
pub(crate) unsafe fn holds_in_raw_child(f: impl FnOnce() -> bool) -> bool {
    const ZERO: libc::c_long = 0;
    let signal = libc::c_long::from(libc::SIGCHLD);
    // SAFETY: without flags and a stack, clone(2) is fork. The caller vouches for what the child does.
    unsafe {
        let child = libc::syscall(libc::SYS_clone, signal, ZERO, ZERO, ZERO, ZERO);
        holds(child as libc::pid_t, f)
    }
}

/// # Safety
/// `forked` is what a fork has returned. For the rest as [`holds_in_child`].
#[cfg(test)]
unsafe fn holds(forked: libc::pid_t, f: impl FnOnce() -> bool) -> bool {
    match forked {
        0 => {
            // SAFETY: alarm only arms a timer. SIGALRM ends a child that waits for a lock forever.
            unsafe { libc::alarm(120) };
            let holds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            // SAFETY: _exit ends the child and runs none of the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!holds)) };
        }
        child => {
            let mut status = -1;
            // SAFETY: the kernel writes one int; the child is ours.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            status == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_another_generation() {
        let before = generation();
        // SAFETY: the child reads an atomic.
        assert!(unsafe { holds_in_child(|| generation() != before) });
        assert_eq!(generation(), before, "the parent's does not change");
    }
}
