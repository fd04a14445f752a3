//! Accounting of the DMA mappings of one device file: their count, the locked bytes, and memory to keep.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::locked::{Counter, Exceeded, Locked};
use crate::error::Result;
use crate::space::DmaMemory;

/// The mappings that were made through one file. A mapping is added before the kernel maps it, and
/// removed after the kernel has unmapped it.
pub(super) struct Accounting {
    count: AtomicUsize,
    locked: Locked,
    /// Mapped memory, by IOVA, whose pages may be reused when its owner is dropped: windows of other
    /// devices, and memory that the crate did not allocate.
    kept: Mutex<BTreeMap<u64, DmaMemory>>,
}

impl Accounting {
    pub(super) fn new(counter: &'static Counter) -> Self {
        let count = AtomicUsize::new(0);
        Self { count, locked: Locked::nothing(counter), kept: Mutex::default() }
    }

    /// The number of mappings.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many more bytes can be locked, if that is limited.
    pub(super) fn lockable_bytes(&self) -> Option<u64> {
        self.locked.lockable_bytes()
    }

    /// Adds a mapping of `memory`, even if the limit on locked memory does not allow it.
    #[inline]
    pub(super) fn add(&self, memory: &DmaMemory) -> std::result::Result<(), Exceeded> {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.locked.add(memory.lockable())
    }

    /// Removes a mapping of `locked` locked bytes.
    #[inline]
    pub(super) fn remove(&self, locked: u64) {
        self.locked.subtract(locked);
        // Saturates at zero: this file may unmap what another file has mapped.
        let less = |count: usize| count.checked_sub(1);
        let _ = self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Removes a mapping that the kernel refused. If `no_memory`, returns the reason: the limit, or a
    /// description.
    #[cold]
    pub(super) fn remove_refused(
        &self,
        memory: &DmaMemory,
        no_memory: bool,
    ) -> Option<std::result::Result<Exceeded, String>> {
        let locked = memory.lockable();
        let why =
            no_memory.then(|| self.locked.exceeded(locked).ok_or_else(|| self.locked.shortage()));
        self.remove(locked);
        why
    }

    /// Maps `memory` at `iova` by `in_kernel`, and keeps it unless the kernel does, but not its file, which the kernel
    /// has no more use for.
    ///
    /// Both steps are under one lock, as in [`unmap`](Self::unmap). So the memory that is kept is the
    /// memory that is mapped, even if other threads use the same IOVA.
    #[inline]
    pub(super) fn map<T>(
        &self,
        iova: u64,
        memory: &DmaMemory,
        in_kernel: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if memory.is_kept_by_kernel() {
            return in_kernel();
        }
        let mut kept = self.kept();
        let mapped = in_kernel()?;
        // If memory was kept at this IOVA before, the kernel unmapped it together with a larger range.
        let before = kept.insert(iova, memory.clone().without_file());
        drop(kept);
        drop(before);
        Ok(mapped)
    }

    /// Unmaps the mapping at `iova` by `in_kernel`. Returns the memory that was kept for it, if any.
    #[inline]
    pub(super) fn unmap(
        &self,
        iova: u64,
        in_kernel: impl FnOnce() -> Result<()>,
    ) -> Result<Option<DmaMemory>> {
        let mut kept = self.kept();
        in_kernel()?;
        Ok(kept.remove(&iova))
    }

    /// Removes and returns all memory that is kept.
    pub(super) fn take_kept(&mut self) -> BTreeMap<u64, DmaMemory> {
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
    use crate::{Device, Error, ErrorKind, Placement};

    fn memory() -> DmaMemory {
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap().dma_memory()
    }

    /// So what is kept is what the kernel has mapped last, although threads race.
    #[test]
    fn the_kernel_maps_and_unmaps_under_the_lock() {
        static COUNTER: Counter = Counter::new(false);
        let (accounting, memory) = (Accounting::new(&COUNTER), memory());
        let locked = || {
            assert!(accounting.kept.try_lock().is_err());
            Ok(())
        };
        accounting.map(0x1000, &memory, locked).unwrap();
        accounting.unmap(0x1000, locked).unwrap();
    }

    #[test]
    fn memory_is_kept_without_a_descriptor_of_its_file() {
        static COUNTER: Counter = Counter::new(false);
        let mut accounting = Accounting::new(&COUNTER);
        let file = Arc::new(crate::sys::file::memory_file("vfio-remap-test", 0x1000).unwrap());
        let owner = Arc::new(());
        let memory = DmaMemory::never_mapped(file.clone(), owner.clone());
        accounting.map(0x1000, &memory, || Ok(())).unwrap();
        drop(memory);
        assert_eq!((Arc::strong_count(&file), Arc::strong_count(&owner)), (1, 2));
        drop(accounting.take_kept());
    }

    #[test]
    fn memory_is_kept_until_unmapped_and_counts_stop_at_zero() {
        static COUNTER: Counter = Counter::new(false);
        let device = Device::new(Arc::new(MemoryDevice::new(4096).unwrap()));
        let window = device.bar(0).unwrap().map(0..4096, Placement::Anywhere).unwrap();
        let mut accounting = Accounting::new(&COUNTER);

        let memory = window.dma_memory();
        assert!(accounting.add(&memory).is_ok() && !memory.is_kept_by_kernel());
        accounting.map(0x1000, &memory, || Ok(())).unwrap();
        drop(memory);
        assert_eq!((accounting.count(), COUNTER.mapped()), (1, 4096));
        let device = device.close().expect_err("a window is there").into_device();
        drop(window);
        let device = device.close().expect_err("the memory is the window's").into_device();

        assert!(accounting.unmap(0x2000, || Ok(())).unwrap().is_none());
        let refused = || Err(Error::new(ErrorKind::Os, "unmap from DMA", "it"));
        accounting.unmap(0x1000, refused).unwrap_err();
        let memory =
            accounting.unmap(0x1000, || Ok(())).unwrap().expect("it is kept, since it is mapped");
        accounting.remove(memory.lockable());
        // What another file has mapped.
        accounting.remove(4096);
        assert_eq!((accounting.count(), COUNTER.mapped()), (0, 0));

        accounting.map(0x2000, &memory, refused).unwrap_err();
        assert!(accounting.add(&memory).is_ok());
        accounting.map(0x1000, &memory, || Ok(())).unwrap();
        drop(memory);
        assert_eq!(accounting.take_kept().len(), 1);
        drop(accounting);
        assert_eq!(COUNTER.mapped(), 0, "what was not unmapped goes with the file");
        device.close().unwrap();
    }
}
