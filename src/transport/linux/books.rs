//! What a device's file has mapped for DMA, as far as the kernel does not keep it itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::locked::{Counter, Exceeded, Locked};
use crate::error::Result;
use crate::space::DmaMemory;

/// The mappings that were made through one file. Each is counted before the kernel is told of it, and until
/// the kernel has forgotten it.
pub(super) struct Books {
    mappings: AtomicUsize,
    locked: Locked,
    /// Memory that the kernel does not keep from being reused, by IOVA: windows of other devices, and what
    /// belongs to others.
    kept: Mutex<BTreeMap<u64, DmaMemory>>,
}

impl Books {
    pub(super) fn new(counter: &'static Counter) -> Self {
        let mappings = AtomicUsize::new(0);
        Self { mappings, locked: Locked::nothing(counter), kept: Mutex::default() }
    }

    pub(super) fn mappings(&self) -> usize {
        self.mappings.load(Ordering::Relaxed)
    }

    /// Counts a mapping more, allowed or not.
    #[inline]
    pub(super) fn enter(&self, memory: &DmaMemory) -> std::result::Result<(), Exceeded> {
        self.mappings.fetch_add(1, Ordering::Relaxed);
        self.locked.add(memory.lockable())
    }

    /// Decrements the mapping count, and the locked bytes by `locked`.
    #[inline]
    pub(super) fn strike(&self, locked: u64) {
        self.locked.subtract(locked);
        // Saturates at zero: what another file has mapped may be unmapped through this.
        let less = |mappings: usize| mappings.checked_sub(1);
        let _ = self.mappings.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Counts one less that has been refused. Why it was, if for want of memory: the limit, or, as far as is
    /// known, what else.
    #[cold]
    pub(super) fn refused(
        &self,
        memory: &DmaMemory,
        no_memory: bool,
    ) -> Option<std::result::Result<Exceeded, String>> {
        let locked = memory.lockable();
        let why =
            no_memory.then(|| self.locked.refused(locked).ok_or_else(|| self.locked.shortage()));
        self.strike(locked);
        why
    }

    /// Maps `memory` at `iova` by `tell_kernel`, and keeps it where the kernel does not.
    ///
    /// The kernel is told, and the memory kept, under one lock, as in [`unmap`](Self::unmap): what the
    /// kernel has mapped is what is kept, whatever other threads do at the same address.
    #[inline]
    pub(super) fn map(
        &self,
        iova: u64,
        memory: &DmaMemory,
        tell_kernel: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if memory.is_kept_by_kernel() {
            return tell_kernel();
        }
        let mut kept = self.kept();
        tell_kernel()?;
        // What was kept here, if anything, the kernel has unmapped with something larger.
        let before = kept.insert(iova, memory.clone());
        drop(kept);
        drop(before);
        Ok(())
    }

    /// Unmaps what is mapped at `iova` by `tell_kernel`: what was kept for it, kept no longer.
    #[inline]
    pub(super) fn unmap(
        &self,
        iova: u64,
        tell_kernel: impl FnOnce() -> Result<()>,
    ) -> Result<Option<DmaMemory>> {
        let mut kept = self.kept();
        tell_kernel()?;
        Ok(kept.remove(&iova))
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
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;
    use crate::transport::MemoryDevice;
    use crate::{Device, Error, ErrorKind, Placement};

    fn memory() -> DmaMemory {
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap().dma_memory()
    }

    /// The first thread has had the kernel map A, and is not back yet; the second unmaps that and maps B.
    #[test]
    fn what_is_mapped_is_kept_whatever_two_threads_do() {
        static COUNTER: Counter = Counter::new(false);
        let (books, mapped) = (Books::new(&COUNTER), Mutex::new(None));
        let (a, b) = (memory(), memory());
        let kernel_maps = &|memory: &DmaMemory| {
            *mapped.lock().unwrap() = Some(memory.address());
            Ok(())
        };
        let (mapped_a, wait_for_a) = mpsc::channel();
        let (mapped_b, wait_for_b) = mpsc::channel();
        std::thread::scope(|scope| {
            let (books, mapped, b) = (&books, &mapped, &b);
            scope.spawn(move || {
                wait_for_a.recv().unwrap();
                let kernel_unmaps = || {
                    *mapped.lock().unwrap() = None;
                    Ok(())
                };
                books.unmap(0x1000, kernel_unmaps).unwrap();
                books.map(0x1000, b, || kernel_maps(b)).unwrap();
                // Nobody waits any more, where all is well.
                let _ = mapped_b.send(());
            });
            let first = || {
                kernel_maps(&a)?;
                mapped_a.send(()).unwrap();
                // In vain, where all is well: the second thread waits for the first.
                let _ = wait_for_b.recv_timeout(Duration::from_millis(200));
                Ok(())
            };
            books.map(0x1000, &a, first).unwrap();
        });
        let kept: Vec<_> = books.kept().values().map(DmaMemory::address).collect();
        assert_eq!((kept, *mapped.lock().unwrap()), (vec![b.address()], Some(b.address())));
    }

    #[test]
    fn the_kernel_is_told_under_the_lock_of_the_books() {
        static COUNTER: Counter = Counter::new(false);
        let (books, memory) = (Books::new(&COUNTER), memory());
        let locked = || {
            assert!(books.kept.try_lock().is_err());
            Ok(())
        };
        books.map(0x1000, &memory, locked).unwrap();
        books.unmap(0x1000, locked).unwrap();
    }

    #[test]
    fn memory_of_others_is_kept_until_it_is_unmapped_and_nothing_is_counted_below_none() {
        static COUNTER: Counter = Counter::new(false);
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let window = device.bar(0).unwrap().map(0..4096, Placement::Anywhere).unwrap();
        let mut books = Books::new(&COUNTER);

        let memory = window.dma_memory();
        assert!(books.enter(&memory).is_ok() && !memory.is_kept_by_kernel());
        books.map(0x1000, &memory, || Ok(())).unwrap();
        drop(memory);
        assert_eq!((books.mappings(), COUNTER.mapped()), (1, 4096));
        let device = device.close().expect_err("a window is there").into_device();
        drop(window);
        let device = device.close().expect_err("the memory is the window's").into_device();

        assert!(books.unmap(0x2000, || Ok(())).unwrap().is_none());
        let refused = || Err(Error::new(ErrorKind::Os, "unmap from DMA", "it"));
        books.unmap(0x1000, refused).unwrap_err();
        let memory =
            books.unmap(0x1000, || Ok(())).unwrap().expect("it is kept, since it is mapped");
        books.strike(memory.lockable());
        // What another file has mapped.
        books.strike(4096);
        assert_eq!((books.mappings(), COUNTER.mapped()), (0, 0));

        books.map(0x2000, &memory, refused).unwrap_err();
        assert!(books.enter(&memory).is_ok());
        books.map(0x1000, &memory, || Ok(())).unwrap();
        drop(memory);
        assert_eq!(books.let_all_go().len(), 1);
        drop(books);
        assert_eq!(COUNTER.mapped(), 0, "what was not unmapped goes with the file");
        device.close().unwrap();
    }
}
