//! What a device's file has mapped for DMA, as far as the kernel does not keep it itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::locked::{Counter, Exceeded, Locked};
use crate::space::DmaMemory;

/// The mappings that were made through one file. Each is counted before the kernel is told of it, and until
/// the kernel has forgotten it.
pub(super) struct Books {
    mappings: AtomicUsize,
    locked: Locked,
    /// How many windows are kept: looked at without a lock.
    windows: AtomicUsize,
    /// Windows of other devices, by IOVA: they are not pinned by being mapped; kept here, they keep
    /// their device open.
    kept: Mutex<BTreeMap<u64, DmaMemory>>,
}

impl Books {
    pub(super) fn new(counter: &'static Counter) -> Self {
        let kept = Mutex::default();
        let (mappings, windows) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { mappings, locked: Locked::nothing(counter), windows, kept }
    }

    pub(super) fn mappings(&self) -> usize {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Counts a mapping more, allowed or not.
    #[inline]
    pub(super) fn enter(&self, memory: &DmaMemory) -> Result<(), Exceeded> {
        self.mappings.fetch_add(1, Ordering::Relaxed);
        self.locked.add(lockable(memory))
    }

    /// Keeps a window that is mapped now.
    #[cold]
    pub(super) fn keep(&self, iova: u64, window: &DmaMemory) {
        let mut kept = self.kept();
        kept.insert(iova, window.clone());
        self.windows.store(kept.len(), Ordering::Release);
    }

    /// Counts one mapping less: that of `size` bytes at `iova`.
    #[inline]
    pub(super) fn strike(&self, iova: u64, size: u64) {
        if self.windows.load(Ordering::Acquire) == 0 || !self.let_go(iova) {
            self.locked.subtract(size);
        }
        self.mappings.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts one less that the kernel has refused. Why it may have, if it has no memory.
    #[cold]
    pub(super) fn refused(&self, memory: &DmaMemory, no_memory: bool) -> Option<Exceeded> {
        let size = lockable(memory);
        let exceeded = if no_memory { self.locked.refused(size) } else { None };
        self.locked.subtract(size);
        self.mappings.fetch_sub(1, Ordering::Relaxed);
        exceeded
    }

    /// Lets a window go, if it is one.
    #[cold]
    fn let_go(&self, iova: u64) -> bool {
        let mut kept = self.kept();
        let window = kept.remove(&iova);
        self.windows.store(kept.len(), Ordering::Release);
        // With its last owner a device is closed: not under the lock.
        drop(kept);
        window.is_some()
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<u64, DmaMemory>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many bytes of it are locked: of a device's pages none.
fn lockable(memory: &DmaMemory) -> u64 {
    if memory.is_of_device() { 0 } else { memory.size() as u64 }
}
