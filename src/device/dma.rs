//! DMA: which memory a device reaches, and at which addresses.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::dma_buffer::{BufferRequest, DmaBuffer};
use super::iova::{Iova, IovaAllocator};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::fork;
use crate::transport::{DmaLimits, Transport};

/// The addresses that a device has for memory: what is mapped where, and what is free.
///
/// Clones are the same space.
#[derive(Clone)]
pub struct DmaSpace {
    inner: Arc<Inner>,
}

struct Inner {
    limits: DmaLimits,
    state: Mutex<State>,
    transport: Arc<dyn Transport>,
}

struct State {
    free: IovaAllocator,
    /// What is mapped: address and size.
    mapped: Slab<(Iova, u64)>,
}

/// Where memory is to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IovaPlacement {
    /// Where there is room: in the smallest free range that has it. The first address of all may be 0: for a
    /// device that takes that for none, map a page there before.
    Anywhere {
        /// A multiple of this, a power of two; the IOMMU's page size where that is larger.
        alignment: u64,
        /// No byte above this address: a device of 32 address bits has a limit of 0xffff_ffff.
        limit: u64,
    },
    /// Here.
    At(Iova),
    /// At the address that it has in this process.
    SameAsAddress,
}

impl IovaPlacement {
    /// Anywhere that a device of `bits` address bits reaches.
    pub fn below_bits(bits: u32) -> Self {
        let limit = 1u64.checked_shl(bits).map_or(u64::MAX, |end| end - 1);
        Self::Anywhere { alignment: 1, limit }
    }

    /// Whether memory that the device finds at `at`, and cannot elsewhere, is where this wants it.
    fn admits(self, at: Iova, memory: &DmaMemory) -> bool {
        match self {
            Self::Anywhere { alignment, limit } => {
                let last = (memory.size() as u64).checked_sub(1).and_then(|n| at.checked_add(n));
                at.0.is_multiple_of(alignment) && last.is_some_and(|last| last.0 <= limit)
            }
            Self::At(wanted) => at == wanted,
            Self::SameAsAddress => at.0 == memory.address() as u64,
        }
    }
}

impl Default for IovaPlacement {
    /// Anywhere at all.
    fn default() -> Self {
        Self::Anywhere { alignment: 1, limit: u64::MAX }
    }
}

impl DmaSpace {
    pub(super) fn new(transport: Arc<dyn Transport>) -> Result<Self> {
        let limits = transport.dma_limits()?;
        let state = State { free: IovaAllocator::new(&limits.ranges), mapped: Slab::new() };
        Ok(Self { inner: Arc::new(Inner { limits, state: Mutex::new(state), transport }) })
    }

    /// What the IOMMU maps.
    pub fn limits(&self) -> &DmaLimits {
        &self.inner.limits
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.inner.state().mapped.len()
    }

    /// A buffer of `size` bytes, rounded up to whole pages, that the device can read and write.
    ///
    /// # Errors
    /// As [`map`](Self::map); `Os` where there is no memory.
    pub fn buffer(&self, size: usize) -> Result<DmaBuffer> {
        self.buffer_with(BufferRequest::new(size))
    }

    /// A buffer with wishes: its place, huge pages.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn buffer_with(&self, request: BufferRequest) -> Result<DmaBuffer> {
        DmaBuffer::new(self, request)
    }

    /// Lets the device reach `memory`, until the mapping is dropped.
    ///
    /// # Errors
    /// `OutOfRange` where the address lies outside of what the IOMMU maps, or no free range is large
    /// enough; `AddressTaken`; `Unaligned` where memory or address are not multiples of its page size;
    /// `LockedMemory`, `TooManyMappings`; what the transport answers.
    pub fn map(
        &self,
        memory: DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<DmaMapping> {
        const ATTEMPTS: usize = 1024;
        let size = memory.size() as u64;
        let anywhere = matches!(placement, IovaPlacement::Anywhere { .. });
        let mut refused = Vec::new();
        let result = loop {
            let iova = match self.inner.take(&memory, placement) {
                Ok(iova) => iova,
                Err(error) => break Err(error),
            };
            match self.inner.map(iova, &memory, placement, access) {
                Ok(device) => break Ok((iova, device)),
                Err(error) => {
                    refused.push(iova);
                    // A device that shares the address space has mapped something there: others are tried.
                    let taken = anywhere && error.kind() == ErrorKind::AddressTaken;
                    if !taken || refused.len() == ATTEMPTS {
                        break Err(error);
                    }
                }
            }
        };
        let mut state = self.inner.state();
        for iova in refused {
            state.free.free(iova.0, size);
        }
        let (mapped_at, iova) = result?;
        let slot = state.mapped.insert((iova, size));
        drop(state);
        let generation = fork::generation();
        Ok(DmaMapping { space: self.clone(), memory, mapped_at, iova, slot, generation })
    }

    /// What is mapped, for errors: the first few.
    pub(super) fn describe(&self, most: usize) -> Vec<String> {
        let state = self.inner.state();
        let named = state.mapped.iter().take(most);
        let mut lines: Vec<_> = named
            .map(|(_, (iova, size))| format!("{size:#x} bytes mapped for DMA at {iova}"))
            .collect();
        if state.mapped.len() > most {
            lines.push(format!("{} more DMA mappings", state.mapped.len() - most));
        }
        lines
    }

    /// Whether somebody else holds the space, too.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `memory` at `iova`: the address by which the device reaches it, which is the same where it is
    /// translated, and else what `placement` is about.
    fn map(
        &self,
        iova: Iova,
        memory: &DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<Iova> {
        let size = memory.size() as u64;
        self.transport.dma_map(iova.0, memory, access)?;
        let found = self.transport.dma_address(iova.0, size).map(Iova).and_then(|device| {
            if self.limits.translated || placement.admits(device, memory) {
                return Ok(device);
            }
            Err(Error::new(ErrorKind::OutOfRange, "map for DMA", format!("{size:#x} bytes"))
                .because(format!(
                    "no IOMMU translates the device's addresses, and the memory is at {device}"
                ))
                .remedy("take the memory where it is: IovaPlacement::default"))
        });
        found.inspect_err(|_| {
            if let Err(error) = self.transport.dma_unmap(iova.0, size) {
                log::error!("leaked what the device may still reach: {error}");
                std::mem::forget(memory.clone());
            }
        })
    }

    /// Takes addresses for `memory`.
    fn take(&self, memory: &DmaMemory, placement: IovaPlacement) -> Result<Iova> {
        let size = memory.size() as u64;
        let page = self.limits.page_size;
        let error = |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes"));
        if size == 0 {
            return Err(error(ErrorKind::OutOfRange)
                .because("there is nothing to map")
                .remedy("map one page or more"));
        }
        if !size.is_multiple_of(page) || !(memory.address() as u64).is_multiple_of(page) {
            return Err(error(ErrorKind::Unaligned)
                .because(format!("the IOMMU maps pages of {page:#x} bytes"))
                .remedy("map whole pages"));
        }
        if let IovaPlacement::Anywhere { alignment, .. } = placement
            && !alignment.is_power_of_two()
        {
            return Err(error(ErrorKind::Unaligned)
                .because(format!("an alignment of {alignment:#x} is no power of two"))
                .remedy("ask for 1, or a power of two"));
        }
        // Where nothing translates, the address is a key to the mapping and no more.
        let placement = if self.limits.translated { placement } else { IovaPlacement::default() };
        let start = match placement {
            IovaPlacement::Anywhere { alignment, limit } => {
                let found = self.state().free.allocate(size, alignment.max(page), limit);
                return found.map(Iova).ok_or_else(|| {
                    error(ErrorKind::OutOfRange)
                        .because(format!("no free range up to {limit:#x} is large enough"))
                        .remedy(
                            "unmap something, or allow higher addresses if the device has the bits",
                        )
                });
            }
            IovaPlacement::At(iova) => iova.0,
            IovaPlacement::SameAsAddress => memory.address() as u64,
        };
        let error =
            |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes at {start:#x}"));
        if !start.is_multiple_of(page) {
            return Err(error(ErrorKind::Unaligned)
                .because(format!("the IOMMU maps pages of {page:#x} bytes"))
                .remedy("map at a multiple of that"));
        }
        let inside = start.checked_add(size - 1).is_some_and(|end| {
            self.limits.ranges.iter().any(|range| range.contains(&start) && range.contains(&end))
        });
        if !inside {
            let ranges: Vec<_> = self
                .limits
                .ranges
                .iter()
                .map(|r| format!("{:#x}..={:#x}", r.start(), r.end()))
                .collect();
            return Err(error(ErrorKind::OutOfRange)
                .because(format!("the IOMMU maps {}", ranges.join(", ")))
                .remedy("map it inside one of those ranges, or anywhere"));
        }
        if self.state().free.allocate_at(start, size) {
            return Ok(Iova(start));
        }
        Err(error(ErrorKind::AddressTaken)
            .because("a part of it is mapped already")
            .remedy("unmap that first, or map it anywhere"))
    }
}

/// Memory that the device reaches. Dropping it takes the memory away from the device again.
pub struct DmaMapping {
    space: DmaSpace,
    memory: DmaMemory,
    /// What it is unmapped by.
    mapped_at: Iova,
    /// What the device is given.
    iova: Iova,
    slot: usize,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

impl DmaMapping {
    /// Where the device finds its first byte: a physical address where no IOMMU translates
    /// ([`Vfio::open_noiommu`](crate::transport::Vfio::open_noiommu)).
    #[inline]
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The size in bytes.
    pub fn size(&self) -> usize {
        self.memory.size()
    }

    /// The memory.
    pub fn memory(&self) -> &DmaMemory {
        &self.memory
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // The parent's mapping, through a file that both have.
            return;
        }
        let size = self.memory.size() as u64;
        let inner = &self.space.inner;
        if let Err(error) = inner.transport.dma_unmap(self.mapped_at.0, size) {
            log::error!("leaked what the device may still reach: {error}");
            // Neither the memory nor the addresses may become anybody else's.
            std::mem::forget(self.memory.clone());
            return;
        }
        let mut state = inner.state();
        state.mapped.try_remove(self.slot);
        state.free.free(self.mapped_at.0, size);
    }
}

impl fmt::Debug for DmaMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMapping({:#x} bytes at {})", self.size(), self.iova)
    }
}

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.inner.state().free.ranges().count();
        write!(f, "DmaSpace({} mappings, {free} free ranges)", self.mappings())
    }
}
