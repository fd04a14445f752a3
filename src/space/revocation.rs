//! Revoke and restore: a window that reaches its device, or pages that read as if the device were not there.
//!
//! Verbs that change one window ([`control`]) take turns by a lock ([`turn`]). The [guard](FaultGuard) acts in a signal handler
//! and takes none: what the two do at once is decided by the state of the window's entry in the [`registry`].

#![expect(unsafe_code, reason = "addresses are owned by convention")]

mod absent;
mod atomic;
mod control;
mod group;
mod guard;
mod reasons;
mod registry;
mod report;
mod sweeps;
#[cfg(test)]
mod tests;
mod turn;

use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::errno::Errno;

use crate::sys::mmap_lock::MmapLock;
use crate::sys::{async_safe, fork};
use registry::{Registry, State};

pub use absent::{revocable_size, set_revocable_size};
pub(crate) use control::Control;
pub(crate) use group::Group;
pub use guard::{FaultGuard, FaultScope};
pub(crate) use reasons::Reasons;
pub use report::{StateReport, WindowState};
pub(super) use turn::Shown;

/// The registry, and the process that made it: a child of `fork(2)` has none of its parent's windows.
struct Current {
    generation: u32,
    process: u32,
    registry: Registry,
}

static CURRENT: AtomicPtr<Current> = AtomicPtr::new(ptr::null_mut());

/// The registry of this process, if a window was mapped in it. For signal handlers, too.
#[inline(always)]
fn current() -> Option<&'static Registry> {
    // SAFETY: only pointers to leaked values are stored.
    let current = unsafe { CURRENT.load(Ordering::Acquire).as_ref() }?;
    (current.generation == fork::generation_in_handler()).then_some(&current.registry)
}

#[inline(always)]
fn registry() -> &'static Registry {
    current().unwrap_or_else(make_registry)
}

#[cold]
fn make_registry() -> &'static Registry {
    const FIRST: usize = 64;
    let generation = fork::generation();
    let _lock = MmapLock::take();
    if let Some(registry) = current() {
        return registry;
    }
    if CURRENT.load(Ordering::Relaxed).is_null() {
        fork::before(keep_revoked_from_children);
    }
    let (process, registry) = (std::process::id(), Registry::new(FIRST));
    // In a child the parent's stays as it is: another thread may have been about to change it.
    let new = Box::leak(Box::new(Current { generation, process, registry }));
    CURRENT.store(new, Ordering::Release);
    &new.registry
}

/// Before the C library's `fork`: keeps the pages of revoked windows from the child, which inherits no windows either.
/// It may still get those of a window that another thread, or a handler that runs later, changes meanwhile.
///
/// Does nothing in a child that was made in another way: anything may be mapped there at the addresses of windows.
extern "C" fn keep_revoked_from_children() {
    let errno = Errno::last_raw();
    // A signal handler of the program may have a fault in a window that is pinned here. It would wait for the thread
    // that has the window busy, and that for this one.
    let mask = async_safe::block_signals(!0);
    // SAFETY: as in `current`.
    let current = unsafe { CURRENT.load(Ordering::Acquire).as_ref() };
    if let Some(current) = current.filter(|current| current.process == std::process::id()) {
        for pin in current.registry.each().filter(|pin| pin.state() == State::Revoked) {
            let range = pin.range();
            // SAFETY: the range stays the window's while it is pinned.
            let _ = unsafe { async_safe::keep_from_children(range.start, range.len()) };
        }
    }
    async_safe::block_signals(mask);
    Errno::set_raw(errno);
}

/// Makes sure that a window of `size` bytes can be revoked: see [`revocable_size`].
pub(super) fn prepare(size: usize) {
    absent::prepare(size);
}

/// Ends the process. After a call that replaces a mapping of which registers exist, something else is mapped
/// there, or nothing, and no other answer keeps those registers from reading and writing what is not theirs.
///
/// The kernel unmaps and maps in one call, and fails in between only if it has no memory for its own tables;
/// and then it must have refused the pages once more, or another thread must have mapped something at just these
/// addresses before they were filled again.
#[cold]
fn lost(range: &Range<usize>) -> ! {
    /// Also if the program's logger panics.
    struct Abort;
    impl Drop for Abort {
        fn drop(&mut self) {
            std::process::abort();
        }
    }
    let _abort = Abort;
    log::error!(
        "the kernel unmapped a window at {:#x}..{:#x} in a call that failed, and it could not be filled again",
        range.start,
        range.end
    );
    std::process::abort()
}
