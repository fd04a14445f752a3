//! Arenas: a few large mappings, of which buffers are parts.
//!
//! Mappings are scarce: some vfio-user servers accept 16, and each one costs system calls and entries of the
//! IOMMU's cache. An arena doubles: a new mapping is as large as all before it together.
//!
//! `unsafe` is here because a part of a mapping is found by pointer arithmetic, and zeroed before it is used
//! again.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::dma::{DmaMapping, DmaSpace};
use super::dma_memory::{HUGE_PAGE, Memory, free_huge_pages};
use super::dma_placement::IovaPlacement;
use super::iova::{Iova, IovaAllocator};
use super::register_access::sealed::Access as _;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::fork;
use crate::transport::{AddressSpaceId, DmaLimits, MappedBy};

/// The sizes of the smallest and of the largest shared mapping, in bytes.
const FIRST: usize = 64 << 10;
const LARGEST: usize = 64 << 20;
/// A shared mapping takes at most one of so many parts of the memory that can still be locked, and of the free
/// huge pages. A mapping of one buffer may take all.
const SHARE: u64 = 4;

/// The size and the options of an allocation.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Whole pages, one or more, in bytes.
    pub(super) size: usize,
    /// The size of these pages: a power of two.
    pub(super) page: usize,
    pub(super) huge: bool,
    pub(super) placement: IovaPlacement,
    /// Whether it needs a mapping of its own.
    pub(super) alone: bool,
}

/// Why an allocation failed.
pub(super) enum Refused {
    /// The kernel has no such memory.
    Memory(Error),
    /// The memory could not be mapped for the device.
    Mapping(Error),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Memory(error) | Refused::Mapping(error) => error,
        }
    }
}

/// What all allocations of an arena have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// The highest address.
    limit: u64,
    huge: bool,
}

/// The arenas of a space.
pub(super) struct Arenas {
    arenas: Mutex<Vec<Arena>>,
    /// Held while a shared mapping is made, so that a thread that finds no room waits for the mapping that
    /// another thread makes.
    growth: Mutex<()>,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

struct Arena {
    kind: Kind,
    /// The size of all its mappings together, in bytes.
    size: Arc<AtomicUsize>,
    /// Its shared mappings. The allocations keep them alive.
    mappings: Vec<Weak<ArenaMapping>>,
}

impl Arenas {
    pub(super) fn new() -> Self {
        let (arenas, growth) = (Mutex::default(), Mutex::default());
        Self { arenas, growth, generation: fork::generation() }
    }

    /// Allocates memory that is mapped for the device. All bytes are zero.
    pub(super) fn allocate(
        &self,
        space: &DmaSpace,
        wanted: &Wanted,
    ) -> std::result::Result<Allocation, Refused> {
        let kind = match wanted.placement {
            // Without translation only small mappings are contiguous for the device. A child of fork(2) must not
            // share its parent's mappings, nor take locks that a thread of the parent may hold.
            IovaPlacement::Anywhere { limit, .. }
                if !wanted.alone
                    && space.limits().translated
                    && self.generation == fork::generation() =>
            {
                Kind { limit, huge: wanted.huge }
            }
            _ => return Ok(ArenaMapping::new(space, wanted, None)?.whole()),
        };
        if let Some(found) = self.find(kind, wanted) {
            return Ok(found);
        }
        let growth = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = self.find(kind, wanted) {
            return Ok(found);
        }
        let arena_size = self.size(kind);
        let size = grown(space, wanted, arena_size.load(Ordering::Relaxed));
        if size > wanted.size {
            let shared = Wanted { size, ..*wanted };
            match ArenaMapping::shared(space, &shared, arena_size.clone()) {
                Ok(mapping) => {
                    if let Some(allocation) = mapping.allocate(wanted) {
                        self.add(kind, &mapping);
                        return Ok(allocation);
                    }
                }
                Err(Refused::Mapping(error))
                    if matches!(error.kind(), ErrorKind::Gone | ErrorKind::TimedOut) =>
                {
                    return Err(Refused::Mapping(error));
                }
                Err(refused) => log::debug!("a smaller mapping instead: {}", Error::from(refused)),
            }
        }
        // What follows is not shared, so that no thread needs to wait for it.
        drop(growth);
        Ok(ArenaMapping::new(space, wanted, Some(arena_size))?.whole())
    }

    /// Allocates a part of an existing mapping.
    fn find(&self, kind: Kind, wanted: &Wanted) -> Option<Allocation> {
        let mappings: Vec<_> = {
            let arenas = self.arenas();
            let arena = arenas.iter().find(|arena| arena.kind == kind)?;
            arena.mappings.iter().filter_map(Weak::upgrade).collect()
        };
        // Without the lock, because this may unmap: another thread may drop the last allocation of a mapping.
        mappings.iter().find_map(|mapping| mapping.allocate(wanted))
    }

    /// The size of an arena. Makes the arena if it does not exist.
    fn size(&self, kind: Kind) -> Arc<AtomicUsize> {
        let mut arenas = self.arenas();
        if let Some(arena) = arenas.iter().find(|arena| arena.kind == kind) {
            return arena.size.clone();
        }
        // Removes arenas without mappings.
        arenas.retain(|arena| Arc::strong_count(&arena.size) > 1);
        let size = Arc::default();
        arenas.push(Arena { kind, size: Arc::clone(&size), mappings: Vec::new() });
        size
    }

    fn add(&self, kind: Kind, mapping: &Arc<ArenaMapping>) {
        if let Some(arena) = self.arenas().iter_mut().find(|arena| arena.kind == kind) {
            arena.mappings.retain(|mapping| mapping.strong_count() > 0);
            arena.mappings.push(Arc::downgrade(mapping));
        }
    }

    /// Runs `f` while all locks are held.
    #[cfg(test)]
    pub(super) fn while_locked<T>(&self, f: impl FnOnce() -> T) -> T {
        let _growth = self.growth.lock().unwrap();
        let arenas = self.arenas();
        let mappings = arenas.iter().flat_map(|arena| &arena.mappings).filter_map(Weak::upgrade);
        let mappings: Vec<_> = mappings.collect();
        let _free: Vec<_> = mappings.iter().map(|mapping| mapping.free().unwrap()).collect();
        f()
    }

    fn arenas(&self) -> MutexGuard<'_, Vec<Arena>> {
        self.arenas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The size of the next mapping of an arena of `arena` bytes that has no room for `wanted`: the same size again,
/// within limits, or the wanted size if that is larger.
fn grown(space: &DmaSpace, wanted: &Wanted, arena: usize) -> usize {
    let mut size = arena.clamp(FIRST, LARGEST);
    if size <= wanted.size {
        return wanted.size;
    }
    let pool = if wanted.huge { free_huge_pages() } else { None };
    let pool = pool.map(|pages| pages.saturating_mul(HUGE_PAGE as u64));
    for limited in [space.lockable_bytes(), pool].into_iter().flatten() {
        size = size.min(usize::try_from(limited / SHARE).unwrap_or(usize::MAX));
    }
    (size / wanted.page * wanted.page).max(wanted.size)
}

/// A mapping that consists of allocations. It is unmapped when the last of them is dropped.
struct ArenaMapping {
    /// Dropped before `memory`, so that the device cannot reach freed memory: fields are dropped in order.
    mapping: DmaMapping,
    memory: Arc<Memory>,
    /// `None` if the mapping is one allocation.
    free: Option<Mutex<Free>>,
    _counted: Option<Counted>,
}

/// The free parts of a mapping.
struct Free {
    ranges: IovaAllocator,
    /// From this offset in the mapping on nothing was ever allocated: all bytes are zero.
    untouched: usize,
}

/// The size of a mapping, added to that of its arena.
struct Counted {
    arena: Arc<AtomicUsize>,
    size: usize,
}

impl Counted {
    fn new(arena: Arc<AtomicUsize>, size: usize) -> Self {
        arena.fetch_add(size, Ordering::Relaxed);
        Self { arena, size }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.arena.fetch_sub(self.size, Ordering::Relaxed);
    }
}

impl ArenaMapping {
    /// Makes a mapping for one allocation. `arena` is the size of its arena, if it has one.
    fn new(
        space: &DmaSpace,
        wanted: &Wanted,
        arena: Option<Arc<AtomicUsize>>,
    ) -> std::result::Result<Self, Refused> {
        Self::make(space, wanted, DmaSpace::map, arena)
    }

    /// Makes a mapping for many allocations.
    fn shared(
        space: &DmaSpace,
        wanted: &Wanted,
        arena: Arc<AtomicUsize>,
    ) -> std::result::Result<Arc<Self>, Refused> {
        let mut made = Self::make(space, wanted, DmaSpace::try_map, Some(arena))?;
        let first = made.mapping.iova().0;
        // This does not overflow: `map` has allocated these addresses.
        let ranges = IovaAllocator::new(&[first..=first + (wanted.size as u64 - 1)]);
        made.free = Some(Mutex::new(Free { ranges, untouched: 0 }));
        Ok(Arc::new(made))
    }

    fn make(
        space: &DmaSpace,
        wanted: &Wanted,
        map: impl FnOnce(&DmaSpace, DmaMemory, IovaPlacement, Access) -> Result<DmaMapping>,
        arena: Option<Arc<AtomicUsize>>,
    ) -> std::result::Result<Self, Refused> {
        let Wanted { size, page, huge, placement, .. } = *wanted;
        let (memory, fd, offset) = Memory::new(size, page, huge).map_err(Refused::Memory)?;
        let memory = Arc::new(memory);
        let DmaLimits { by_file, maps_files, .. } = *space.limits();
        let file = (by_file || maps_files).then(|| (Arc::new(fd), offset));
        let address = memory.first().as_ptr() as usize;
        // SAFETY: mapped while `memory` lives; accessed only by single accesses, here and in buffers.
        let shared = unsafe { DmaMemory::new(address, size, file, memory.clone()) };
        let mapping = map(space, shared.own(), placement, Access::ReadWrite);
        let mut mapping = mapping.map_err(Refused::Mapping)?;
        if !by_file {
            mapping.forget_file();
        }
        let _counted = arena.map(|arena| Counted::new(arena, size));
        Ok(Self { mapping, memory, free: None, _counted })
    }

    /// Makes the whole mapping one allocation.
    fn whole(self) -> Allocation {
        let (first, iova) = (self.memory.first(), self.mapping.iova());
        let size = self.memory.size();
        let (space, huge_pages_refused) = (self.mapping.address_space(), None);
        Allocation { mapping: Arc::new(self), first, iova, size, space, huge_pages_refused }
    }

    /// Allocates a part, if there is room.
    fn allocate(self: &Arc<Self>, wanted: &Wanted) -> Option<Allocation> {
        let IovaPlacement::Anywhere { alignment, limit } = wanted.placement else { return None };
        if !alignment.is_power_of_two() {
            return None;
        }
        let (size, alignment) = (wanted.size as u64, alignment.max(wanted.page as u64));
        let mut free = self.free()?;
        let start = free.ranges.allocate(size, alignment, limit)?;
        let offset = (start - self.mapping.iova().0) as usize;
        let used = free.untouched.saturating_sub(offset).min(wanted.size);
        free.untouched = free.untouched.max(offset + wanted.size);
        drop(free);
        // SAFETY: the range was free, so it lies in the mapping, and `offset` in its memory.
        let first = unsafe { self.memory.first().add(offset) };
        let (mapping, iova) = (self.clone(), Iova(start));
        let (space, huge_pages_refused) = (self.mapping.address_space(), None);
        let size = wanted.size;
        let allocation = Allocation { mapping, first, iova, size, space, huge_pages_refused };
        allocation.clear(used);
        Some(allocation)
    }

    fn free(&self) -> Option<MutexGuard<'_, Free>> {
        let free = self.free.as_ref()?;
        Some(free.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Memory of one buffer. The parts of the buffer share it. It is free again when the last part is dropped.
pub(super) struct Allocation {
    mapping: Arc<ArenaMapping>,
    first: NonNull<u8>,
    iova: Iova,
    size: usize,
    /// The address space that it is mapped in: a copy, because drivers ask for each transfer.
    space: AddressSpaceId,
    /// Why it has no huge pages although they were requested.
    pub(super) huge_pages_refused: Option<Error>,
}

// SAFETY: the memory is accessed by single accesses of `Width` only, which may race.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    pub(super) fn first(&self) -> NonNull<u8> {
        self.first
    }

    /// The first byte's address for the device.
    pub(super) fn iova(&self) -> Iova {
        self.iova
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    #[inline]
    pub(super) fn address_space(&self) -> AddressSpaceId {
        self.space
    }

    pub(super) fn mapped_by(&self) -> Option<MappedBy> {
        self.mapping.mapping.mapped_by()
    }

    /// Whether it consists of pages of 2 MiB.
    pub(super) fn is_huge(&self) -> bool {
        self.mapping.memory.is_huge()
    }

    /// The memory. It keeps the allocation alive.
    pub(super) fn memory(self: &Arc<Self>) -> DmaMemory {
        let ArenaMapping { mapping, free, .. } = &*self.mapping;
        if free.is_none() {
            return mapping.memory().clone();
        }
        // Without the file, which contains other allocations, too.
        // SAFETY: mapped while the allocation lives; accessed only by single accesses, here and in buffers.
        unsafe { DmaMemory::new(self.first.as_ptr() as usize, self.size, None, self.clone()) }
    }

    /// Zeroes the first `size` bytes. They are whole pages.
    fn clear(&self, size: usize) {
        let words = self.first.cast::<u64>();
        for word in 0..size / size_of::<u64>() {
            // SAFETY: the allocation has at least `size` bytes, begins at a page, and is mapped while `self`
            // lives.
            unsafe { u64::store_relaxed(words.add(word).as_ptr(), 0) };
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // In a child of fork(2) the mapping is the parent's, and a thread of the parent may hold the lock.
        if self.mapping.mapping.is_inherited() {
            return;
        }
        if let Some(mut free) = self.mapping.free() {
            free.ranges.free(self.iova.0, self.size as u64);
        }
    }
}
