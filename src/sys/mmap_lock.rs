//! The crate's lock for calls that create or replace mappings.
//!
//! A failing `MAP_FIXED` call may have unmapped its destination, and the kernel gives the hole to the
//! next `mmap` that fits. Code that examines a failed call takes this lock before the call. So what it
//! finds in the range was there before the call, or was mapped by code outside this crate. The kernel
//! runs such calls one at a time too (`mmap_lock`).

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::cell::UnsafeCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fork;

/// Held while a call creates or replaces a mapping.
pub(crate) struct MmapLock {
    _held: MutexGuard<'static, ()>,
}

struct Lock(UnsafeCell<Mutex<()>>);

// SAFETY: a `Mutex` is `Sync`. Only `renew` uses the cell otherwise, and by its contract no other thread
// exists then.
unsafe impl Sync for Lock {}

static LOCK: Lock = Lock(UnsafeCell::new(Mutex::new(())));

#[cfg(test)]
thread_local! {
    static TAKEN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

fn lock() -> &'static Mutex<()> {
    // Registers the handler that calls `renew` in children.
    fork::generation();
    // SAFETY: `renew` is the only writer. It runs in a child before any other code of this crate, so no
    // reference from this function is in use there.
    unsafe { &*LOCK.0.get() }
}

impl MmapLock {
    /// Waits for the lock. A thread that already holds it waits forever.
    pub(crate) fn take() -> Self {
        #[cfg(test)]
        TAKEN.set(TAKEN.get() + 1);
        Self { _held: lock().lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// How often this thread has taken the lock.
    #[cfg(test)]
    pub(crate) fn count() -> usize {
        TAKEN.get()
    }

    /// Whether some thread holds the lock now.
    #[cfg(test)]
    pub(crate) fn is_taken() -> bool {
        lock().try_lock().is_err()
    }
}

/// Replaces the lock by a free one: in a child of `fork(2)` the thread that held it may not exist.
///
/// # Safety
/// This thread is the only one of the process, and does not hold the lock.
pub(super) unsafe fn renew() {
    // SAFETY: by the contract nothing uses the mutex now. The old value owns nothing, so not dropping it
    // leaks nothing.
    unsafe { LOCK.0.get().write(Mutex::new(())) };
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_child_can_take_a_lock_that_another_thread_held_at_fork() {
        let (held, forked) = (Barrier::new(2), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _lock = MmapLock::take();
                held.wait();
                forked.wait();
            });
            held.wait();
            // SAFETY: the child takes this lock only.
            let free = unsafe {
                fork::holds_in_child(|| {
                    drop(MmapLock::take());
                    true
                })
            };
            forked.wait();
            assert!(free);
        });
    }
}
