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
    /// How many entries `kept` has: looked at without its lock.
    entries: AtomicUsize,
    /// Memory that the kernel does not keep from being reused, by IOVA: windows of other devices, and what
    /// belongs to others.
    kept: Mutex<BTreeMap<u64, DmaMemory>>,
}

impl Books {
    pub(super) fn new(counter: &'static Counter) -> Self {
        let (mappings, entries) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { mappings, locked: Locked::nothing(counter), entries, kept: Mutex::default() }
    }

    pub(super) fn mappings(&self) -> usize {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Counts a mapping more, allowed or not.
    #[inline]
    pub(super) fn enter(&self, memory: &DmaMemory) -> Result<(), Exceeded> {
        self.mappings.fetch_add(1, Ordering::Relaxed);
        self.locked.add(memory.lockable())
    }

    /// Counts a mapping less, of which `locked` bytes were locked.
    #[inline]
    pub(super) fn strike(&self, locked: u64) {
        self.locked.subtract(locked);
        // Not below none: what another file has mapped may be unmapped through this.
        let less = |mappings: usize| mappings.checked_sub(1);
        let _ = self.mappings.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Counts one less that has been refused. Why it was, if for want of memory.
    #[cold]
    pub(super) fn refused(&self, memory: &DmaMemory, no_memory: bool) -> Option<Exceeded> {
        let locked = memory.lockable();
        let exceeded = if no_memory { self.locked.refused(locked) } else { None };
        self.strike(locked);
        exceeded
    }

    /// Keeps memory that is mapped.
    #[cold]
    pub(super) fn keep(&self, iova: u64, memory: DmaMemory) {
        let mut kept = self.kept();
        kept.insert(iova, memory);
        self.entries.store(kept.len(), Ordering::Release);
    }

    /// What is kept for the mapping at `iova`, kept no longer.
    #[inline]
    pub(super) fn let_go(&self, iova: u64) -> Option<DmaMemory> {
        if self.entries.load(Ordering::Acquire) == 0 { None } else { self.remove(iova) }
    }

    #[cold]
    fn remove(&self, iova: u64) -> Option<DmaMemory> {
        let mut kept = self.kept();
        let memory = kept.remove(&iova);
        self.entries.store(kept.len(), Ordering::Release);
        memory
    }

    /// All that is kept, kept no longer.
    pub(super) fn let_all_go(&mut self) -> BTreeMap<u64, DmaMemory> {
        std::mem::take(self.kept.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<u64, DmaMemory>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transport::MemoryDevice;
    use crate::{Device, Placement};

    #[test]
    fn memory_of_others_is_kept_until_it_is_unmapped_and_nothing_is_counted_below_none() {
        static COUNTER: Counter = Counter::new(false);
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let window = device.bar(0).unwrap().map(0..4096, Placement::Anywhere).unwrap();
        let mut books = Books::new(&COUNTER);

        let memory = window.dma_memory();
        assert!(books.enter(&memory).is_ok() && !memory.is_kept_by_kernel());
        books.keep(0x1000, memory);
        assert_eq!((books.mappings(), COUNTER.mapped()), (1, 4096));
        let device = device.close().expect_err("a window is there").into_device();
        drop(window);
        let device = device.close().expect_err("the memory is the window's").into_device();

        assert!(books.let_go(0x2000).is_none());
        let memory = books.let_go(0x1000).expect("it is kept");
        books.strike(memory.lockable());
        // What another file has mapped.
        books.strike(4096);
        assert_eq!((books.mappings(), COUNTER.mapped()), (0, 0));

        assert!(books.enter(&memory).is_ok());
        books.keep(0x1000, memory);
        assert_eq!(books.let_all_go().len(), 1);
        drop(books);
        assert_eq!(COUNTER.mapped(), 0, "what was not unmapped goes with the file");
        device.close().unwrap();
    }
}
