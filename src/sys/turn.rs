//! One call at a time gives addresses out: the lock of this crate over the address space.
//!
//! A failing `MAP_FIXED` call may have unmapped its destination, and the kernel gives the hole to the next
//! `mmap` that fits. Whoever examines a failed call holds the turn from before the call on, so what lies
//! in the range is what was there before, or belongs to somebody outside this crate. The kernel makes
//! such calls one at a time, too (`mmap_lock`).

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::cell::UnsafeCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fork;

/// The turn to give addresses out, or to replace what is mapped at addresses of one's own.
pub(crate) struct Turn {
    _held: MutexGuard<'static, ()>,
}

struct Lock(UnsafeCell<Mutex<()>>);

// SAFETY: shared as a `Mutex` is, except by `renew`, whose contract is that nobody else is there.
unsafe impl Sync for Lock {}

static LOCK: Lock = Lock(UnsafeCell::new(Mutex::new(())));

#[cfg(test)]
thread_local! {
    static TAKEN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

fn lock() -> &'static Mutex<()> {
    // Has `renew` called in children from now on.
    fork::generation();
    // SAFETY: `renew`, the only writer, runs before a child can have called this.
    unsafe { &*LOCK.0.get() }
}

impl Turn {
    /// Waits for the turn. A thread that has it already waits forever.
    pub(crate) fn take() -> Self {
        #[cfg(test)]
        TAKEN.set(TAKEN.get() + 1);
        Self { _held: lock().lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// How often this thread took the turn.
    #[cfg(test)]
    pub(crate) fn count() -> usize {
        TAKEN.get()
    }

    /// Whether some thread has the turn now.
    #[cfg(test)]
    pub(crate) fn is_taken() -> bool {
        lock().try_lock().is_err()
    }
}

/// Makes the lock a free one: the thread that held it may not exist in a child of `fork(2)`.
///
/// # Safety
/// This thread is the only one of the process, and does not hold the turn.
pub(super) unsafe fn renew() {
    // SAFETY: by the contract nobody uses the mutex. It owns nothing, so nothing is lost with the old value.
    unsafe { LOCK.0.get().write(Mutex::new(())) };
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_child_has_the_turn_that_a_thread_held_at_fork() {
        let (held, forked) = (Barrier::new(2), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = Turn::take();
                held.wait();
                forked.wait();
            });
            held.wait();
            // SAFETY: the child takes this lock only.
            let free = unsafe {
                fork::holds_in_child(|| {
                    drop(Turn::take());
                    true
                })
            };
            forked.wait();
            assert!(free);
        });
    }
}
