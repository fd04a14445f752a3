//! DMA: which memory a device reaches, and at which addresses.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dma_addresses::Addresses;
use super::dma_buffer::{BufferRequest, DmaBuffer};
use super::iova::Iova;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::fork;
use crate::transport::{DmaLimits, Transport};

/// The addresses that a device has for memory: what is mapped where, and what is free.
///
/// The device reaches it while [`Config::set_bus_mastering`](super::Config::set_bus_mastering) is on; while
/// it is off, what the device is told to read or write silently does not happen.
///
/// Clones are the same space.
#[derive(Clone)]
pub struct DmaSpace {
    inner: Arc<Inner>,
}

struct Inner {
    limits: DmaLimits,
    addresses: Arc<Addresses>,
    /// How many mappings there are, or are being made.
    mappings: AtomicUsize,
    /// What could not be unmapped again, and is nobody's any more.
    lost: Mutex<Vec<Iova>>,
    transport: Arc<dyn Transport>,
}

/// Where memory is to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IovaPlacement {
    /// Where there is room: above 4 GiB while there is any and `limit` allows it, so that addresses of 32 bits
    /// are left to devices that have no others and share the space; in the smallest free range that has it.
    /// Never at 0, which devices take for none.
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
        // No byte of it lies past the last address.
        let last = (memory.size() as u64).checked_sub(1).and_then(|extent| at.checked_add(extent));
        let Some(last) = last else { return false };
        match self {
            Self::Anywhere { alignment, limit } => {
                at.0.is_multiple_of(alignment) && last.0 <= limit
            }
            Self::At(wanted) => at == wanted,
            Self::SameAsAddress => at.0 == memory.address() as u64,
        }
    }
}

impl Default for IovaPlacement {
    /// Anywhere at all, for a device of 64 address bits: above 4 GiB while there is room.
    fn default() -> Self {
        Self::Anywhere { alignment: 1, limit: u64::MAX }
    }
}

impl DmaSpace {
    pub(super) fn new(transport: Arc<dyn Transport>) -> Result<Self> {
        let limits = transport.dma_limits()?;
        if !limits.page_size.is_power_of_two() {
            let object = format!("the DMA limits of {}", transport.info().name);
            return Err(Error::new(ErrorKind::Malformed, "read", object)
                .because(format!(
                    "its page size of {:#x} bytes is not a power of two",
                    limits.page_size
                ))
                .remedy("have the transport answer with a power of two: DmaLimits::page_size"));
        }
        let addresses = Addresses::of(transport.address_space(), &limits.ranges);
        let (mappings, lost) = (AtomicUsize::new(0), Mutex::default());
        Ok(Self { inner: Arc::new(Inner { limits, addresses, mappings, lost, transport }) })
    }

    /// What the IOMMU maps.
    pub fn limits(&self) -> &DmaLimits {
        &self.inner.limits
    }

    /// How many mappings there are of this device's.
    pub fn mappings(&self) -> usize {
        self.inner.mappings.load(Ordering::Relaxed)
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
    ///
    /// Where others share the address space, and have taken what was chosen, further places are tried for two
    /// seconds: it takes no longer than that, and one answer of the transport's.
    // Inlined, as what it calls: beside two system calls each call shows, most of all in an emulator, where
    // it costs as much as two hundred instructions. What goes wrong is made out of line.
    #[inline(always)]
    pub fn map(
        &self,
        memory: DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<DmaMapping> {
        let taken = self.inner.take(&memory, placement)?;
        let (taken, iova) = match self.inner.map(taken, &memory, placement, access) {
            Ok(iova) => (taken, iova),
            Err(error) => self.inner.map_elsewhere(taken, error, &memory, placement, access)?,
        };
        let generation = fork::generation();
        Ok(DmaMapping { space: self.clone(), memory, taken, iova, generation })
    }

    /// What is mapped, for errors: how much, and the first few places. `None` if nothing is.
    pub(super) fn describe(&self, most: usize) -> Option<String> {
        let count = self.mappings();
        if count == 0 {
            return None;
        }
        let places = self.inner.addresses.taken();
        let mut named: Vec<_> = places
            .iter()
            .take(most)
            .map(|place| format!("{:#x}..={:#x}", place.start(), place.end()))
            .collect();
        if places.len() > most {
            named.push(format!("{} more places", places.len() - most));
        }
        let named = named.join(", ");
        // Which of them are whose nobody has noted.
        Some(match Arc::strong_count(&self.inner.addresses) {
            1 => format!("{count} DMA mappings at IOVA {named}"),
            _ => {
                format!("{count} of the DMA mappings at IOVA {named}, where other devices are, too")
            }
        })
    }

    /// Whether somebody else holds the space, too.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }
}

impl Inner {
    /// How long one mapping looks for a place.
    const TIME: Duration = Duration::from_secs(2);

    fn lost(&self) -> MutexGuard<'_, Vec<Iova>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what was taken for one mapping.
    #[inline]
    fn give_back(&self, taken: Iova, size: u64) {
        self.addresses.free(taken, size);
        self.mappings.fetch_sub(1, Ordering::Relaxed);
    }

    /// Maps `memory` at `iova`: the address by which the device reaches it.
    #[inline(always)]
    fn map(
        &self,
        iova: Iova,
        memory: &DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<Iova> {
        self.transport.dma_map(iova.0, memory, access)?;
        if self.limits.translated { Ok(iova) } else { self.locate(iova, memory, placement) }
    }

    /// Where the device finds `memory`, which is mapped at `iova` but not translated, and is what
    /// `placement` is about. Unmapped again, if that is not where it may be.
    fn locate(&self, iova: Iova, memory: &DmaMemory, placement: IovaPlacement) -> Result<Iova> {
        let size = memory.size() as u64;
        let found = self.transport.dma_address(iova.0, size).map(Iova).and_then(|device| {
            if placement.admits(device, memory) {
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
                leak(memory, &error);
                self.lost().push(iova);
            }
        })
    }

    /// Maps memory that could not be mapped where it was to be. Somebody who shares the address space, and
    /// not our stock of addresses, may have mapped something there: others are tried, where that is allowed.
    ///
    /// Each is twice as far from the last one as that was from the one before, so that neighbours who have
    /// mapped much cost some dozens of questions, and not one for each page. What was passed over is tried
    /// when nothing else is left. No more places are tried once [`TIME`](Self::TIME) has passed: a transport
    /// may take long for each.
    #[cold]
    fn map_elsewhere(
        &self,
        taken: Iova,
        error: Error,
        memory: &DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<(Iova, Iova)> {
        const ATTEMPTS: usize = 256;
        let begun = Instant::now();
        let size = memory.size() as u64;
        let choice = match placement {
            // Where nothing translates, the address is a key, and any will do.
            _ if !self.limits.translated => Some((1, u64::MAX)),
            IovaPlacement::Anywhere { alignment, limit } => Some((alignment, limit)),
            IovaPlacement::At(_) | IovaPlacement::SameAsAddress => None,
        };
        // What is passed over is kept meanwhile, so that nobody is offered it again.
        let mut passed = vec![(taken, size)];
        let mut result = Err(error);
        let (mut block, mut grows) = (size, true);
        while let (Err(error), Some((alignment, limit))) = (&result, choice)
            && error.kind() == ErrorKind::AddressTaken
            && passed.len() < ATTEMPTS
            && begun.elapsed() < Self::TIME
        {
            if let Some(larger) = block.checked_mul(2).filter(|_| grows) {
                block = larger;
            }
            let alignment = alignment.max(self.limits.page_size);
            let Some(start) = self.addresses.allocate(block, alignment, limit) else {
                grows = false;
                if block > size {
                    block /= 2;
                    continue;
                }
                let mut rests = passed.iter_mut().filter(|(_, block)| *block > size).peekable();
                if rests.peek().is_none() {
                    break;
                }
                rests.for_each(|(start, block)| self.keep_first(*start, size, block));
                continue;
            };
            result = self.map(start, memory, placement, access).map(|iova| (start, iova));
            let mut taken = block;
            if result.is_ok() {
                self.keep_first(start, size, &mut taken);
            } else {
                passed.push((start, taken));
            }
        }
        let tried = passed.len();
        let lost = self.lost();
        for (start, mut block) in passed {
            if lost.contains(&start) {
                self.keep_first(start, size, &mut block);
                // It is a mapping still.
                self.mappings.fetch_add(1, Ordering::Relaxed);
            } else {
                self.addresses.free(start, block);
            }
        }
        drop(lost);
        result.map_err(|error| {
            self.mappings.fetch_sub(1, Ordering::Relaxed);
            if tried == 1 {
                return error;
            }
            error
                .because(format!("all {tried} addresses that were tried are mapped by others"))
                .remedy("unmap what they have mapped, or choose a free address: IovaPlacement::At")
        })
    }

    /// Gives back all but the first `size` of the `taken` bytes at `start`.
    fn keep_first(&self, start: Iova, size: u64, taken: &mut u64) {
        if let Some(rest) = start.checked_add(size) {
            self.addresses.free(rest, *taken - size);
        }
        *taken = size;
    }

    /// Takes addresses for `memory`.
    #[inline(always)]
    fn take(&self, memory: &DmaMemory, placement: IovaPlacement) -> Result<Iova> {
        let size = memory.size() as u64;
        let page = self.limits.page_size;
        // Masks, since a division takes longer than all else here.
        let inside_page = page - 1;
        if size == 0 || (size | memory.address() as u64) & inside_page != 0 {
            return Err(self.not_pages(size));
        }
        if let IovaPlacement::Anywhere { alignment, .. } = placement
            && !alignment.is_power_of_two()
        {
            return Err(no_alignment(size, alignment));
        }
        // Where nothing translates, the address is a key to the mapping and no more.
        let placement = if self.limits.translated { placement } else { IovaPlacement::default() };
        let start = match placement {
            IovaPlacement::Anywhere { alignment, limit } => {
                let Some(start) = self.addresses.allocate(size, alignment.max(page), limit) else {
                    return Err(no_room(size, limit));
                };
                self.mappings.fetch_add(1, Ordering::Relaxed);
                return Ok(start);
            }
            IovaPlacement::At(iova) => iova.0,
            IovaPlacement::SameAsAddress => memory.address() as u64,
        };
        if start & inside_page == 0 && self.addresses.allocate_at(Iova(start), size) {
            self.mappings.fetch_add(1, Ordering::Relaxed);
            return Ok(Iova(start));
        }
        if start & inside_page != 0 || !self.addresses.contain(start, size) {
            return Err(self.not_there(start, size));
        }
        Err(Error::new(
            ErrorKind::AddressTaken,
            "map for DMA",
            format!("{size:#x} bytes at {start:#x}"),
        )
        .because("a part of it is mapped already")
        .remedy("unmap that first, or map it anywhere"))
    }

    /// Memory that is no whole pages.
    #[cold]
    fn not_pages(&self, size: u64) -> Error {
        let error = |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes"));
        if size == 0 {
            return error(ErrorKind::OutOfRange)
                .because("there is nothing to map")
                .remedy("map one page or more");
        }
        error(ErrorKind::Unaligned)
            .because(format!("the IOMMU maps pages of {:#x} bytes", self.limits.page_size))
            .remedy("map whole pages")
    }

    /// Addresses that are no pages', or that the IOMMU does not have.
    #[cold]
    fn not_there(&self, start: u64, size: u64) -> Error {
        let page_size = self.limits.page_size;
        let error =
            |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes at {start:#x}"));
        if !start.is_multiple_of(page_size) {
            return error(ErrorKind::Unaligned)
                .because(format!("the IOMMU maps pages of {page_size:#x} bytes"))
                .remedy("map at a multiple of that");
        }
        let ranges: Vec<_> = self
            .addresses
            .ranges()
            .iter()
            .map(|range| format!("{:#x}..={:#x}", range.start(), range.end()))
            .collect();
        error(ErrorKind::OutOfRange)
            .because(format!("the IOMMU maps {}", ranges.join(", ")))
            .remedy("map it inside one of those ranges, or anywhere")
    }
}

/// Keeps memory that could not be unmapped for ever.
#[cold]
fn leak(memory: &DmaMemory, error: &Error) {
    log::error!("leaked what the device may still reach: {error}");
    std::mem::forget(memory.clone());
}

#[cold]
fn no_alignment(size: u64, alignment: u64) -> Error {
    Error::new(ErrorKind::Unaligned, "map for DMA", format!("{size:#x} bytes"))
        .because(format!("an alignment of {alignment:#x} is not a power of two"))
        .remedy("ask for 1, or a power of two")
}

#[cold]
fn no_room(size: u64, limit: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, "map for DMA", format!("{size:#x} bytes"))
        .because(format!("no free range up to {limit:#x} is large enough"))
        .remedy("unmap something, or allow higher addresses if the device has the bits")
}

/// Memory that the device reaches. Dropping it takes the memory away from the device again.
pub struct DmaMapping {
    space: DmaSpace,
    memory: DmaMemory,
    /// What it is unmapped by.
    taken: Iova,
    /// What the device is given.
    iova: Iova,
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
    // Into the glue that drops the fields, which is the caller's.
    #[inline]
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // The parent's mapping, through a file that both have.
            return;
        }
        let size = self.memory.size() as u64;
        let inner = &self.space.inner;
        match inner.transport.dma_unmap(self.taken.0, size) {
            Ok(()) => inner.give_back(self.taken, size),
            // Neither the memory nor the addresses may become anybody else's.
            Err(error) => leak(&self.memory, &error),
        }
    }
}

impl fmt::Debug for DmaMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaMapping({:#x} bytes at {})", self.size(), self.iova)
    }
}

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.inner.addresses.free_ranges();
        write!(f, "DmaSpace({} mappings, {free} free ranges)", self.mappings())
    }
}
