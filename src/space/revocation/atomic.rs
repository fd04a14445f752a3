//! The atomics of the registry: those of the standard library, or loom's, which try all interleavings.

#[cfg(not(all(test, vfio_remap_loom)))]
pub(super) use std::sync::{
    Mutex,
    atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

#[cfg(all(test, vfio_remap_loom))]
pub(super) use loom::sync::{
    Mutex,
    atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

/// Waits a little for another thread, the longer the more turns have passed. It sleeps at last, so that a
/// thread of lower priority on the same processor gets on.
#[cfg(not(all(test, vfio_remap_loom)))]
pub(super) fn spin(turn: u32) {
    match turn {
        0..64 => std::hint::spin_loop(),
        64..128 => std::thread::yield_now(),
        _ => std::thread::sleep(std::time::Duration::from_micros(50)),
    }
}

#[cfg(all(test, vfio_remap_loom))]
pub(super) fn spin(_: u32) {
    loom::thread::yield_now();
}
