//! What a device's file has mapped for DMA, as far as the kernel does not keep it itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::locked::Locked;
use crate::space::DmaMemory;

/// The mappings that were made through one file.
#[derive(Default)]
pub(super) struct Books {
    /// Changed by who has the entries locked, and read by anybody.
    mappings: AtomicUsize,
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    /// Bytes that count as locked: given back to their counter where this is dropped before they are
    /// unmapped.
    locked: Option<Locked>,
    /// Windows of other devices, by IOVA: they are not pinned by being mapped; kept here, they keep
    /// their device open.
    windows: BTreeMap<u64, DmaMemory>,
}

impl Books {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mappings(&self) -> usize {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Notes that `memory` is mapped at `iova`, and what of it counts as locked.
    #[inline]
    pub(super) fn enter(&self, iova: u64, memory: &DmaMemory, locked: Locked) {
        let mut entries = self.entries();
        self.mappings.store(self.mappings() + 1, Ordering::Relaxed);
        match &mut entries.locked {
            Some(all) => all.join(locked),
            none => *none = Some(locked),
        }
        if memory.is_of_device() {
            entries.windows.insert(iova, memory.clone());
        }
    }

    /// Notes that the mapping of `size` bytes at `iova` is gone.
    #[inline]
    pub(super) fn strike(&self, iova: u64, size: u64) {
        let mut entries = self.entries();
        self.mappings.store(self.mappings().saturating_sub(1), Ordering::Relaxed);
        let window = if entries.windows.is_empty() { None } else { entries.windows.remove(&iova) };
        if window.is_none()
            && let Some(all) = &mut entries.locked
        {
            all.part(size);
        }
        // A window that goes with its last owner closes a device: not under the lock.
        drop(entries);
    }
}
