//! Whether this is still the process that made something.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use super::turn;

static GENERATION: AtomicU32 = AtomicU32::new(0);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a child of fork has one thread, the one that called fork, and no code of this crate forks
    // while it holds the turn.
    unsafe { turn::renew() };
}

/// A number that is another one in every child of `fork(2)`.
///
/// Windows are not inherited (`MADV_DONTFORK`): in a child, what was mapped at their addresses is gone,
/// and anything may have taken its place. Owners of addresses remember the generation in which they
/// came to own them, and do nothing to them in another.
pub(crate) fn generation() -> u32 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: the handler writes to two statics, which is allowed in a child of a threaded process.
        // Should there be no memory for it, children are as they would be without this module.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
    GENERATION.load(Ordering::Relaxed)
}

/// Whether `f` holds in a child of `fork(2)`, which ends with it, and after two minutes in any case.
///
/// # Safety
/// `f` takes no lock that another thread may hold now. (The C library's allocator sees to its own.)
#[cfg(test)]
pub(crate) unsafe fn holds_in_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: the caller vouches for what the child does.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: SIGALRM ends a child that waits for a lock that nobody will release.
            unsafe { libc::alarm(120) };
            let holds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(i32::from(!holds)) };
        }
        child => {
            let mut status = -1;
            // SAFETY: waits for our own child.
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
        assert_eq!(generation(), before, "the parent is what it was");
    }
}
