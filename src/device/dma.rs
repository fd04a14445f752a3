//! DMA: the memory that a device reaches, and at which addresses.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dma_addresses::Addresses;
use super::dma_arena::Arenas;
use super::dma_buffer::{BufferRequest, DmaBuffer};
use super::dma_placement::IovaPlacement;
use super::iova::Iova;
use super::outage::{PeerMapping, map_peer};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::fork;
use crate::transport::{AddressSpaceId, DmaLimits, MappedBy, Transport};

/// The IOVA space of a device: which addresses are mapped to memory, and which are free.
///
/// DMA needs [`Config::set_bus_mastering`](super::Config::set_bus_mastering): without it the device reads and
/// writes nothing, and reports no error.
///
/// Clones are the same space.
#[derive(Clone)]
pub struct DmaSpace {
    inner: Arc<Inner>,
}

struct Inner {
    id: AddressSpaceId,
    limits: DmaLimits,
    addresses: Arc<Addresses>,
    arenas: Arenas,
    /// How many mappings there are, including those in the making.
    mappings: AtomicUsize,
    /// Addresses that could not be unmapped. They are never used again.
    lost: Mutex<Vec<Iova>>,
    transport: Arc<dyn Transport>,
}

impl DmaSpace {
    pub(super) fn new(transport: Arc<dyn Transport>) -> Result<Self> {
        let limits = transport.dma_limits()?;
        if !limits.page_size.is_power_of_two() {
            let object = format!("the DMA limits of {}", transport.info().name);
            return Err(Error::new(ErrorKind::Malformed, "read", object)
                .with_reason(format!(
                    "its page size of {:#x} bytes is not a power of two",
                    limits.page_size
                ))
                .with_advice("make the transport return a power of two: DmaLimits::page_size"));
        }
        let shared = transport.address_space();
        let addresses = Addresses::of(shared, &limits.ranges);
        let id = shared.unwrap_or_else(AddressSpaceId::unique);
        let (arenas, mappings, lost) = (Arenas::new(), AtomicUsize::new(0), Mutex::default());
        let inner = Inner { id, limits, addresses, arenas, mappings, lost, transport };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The limits of the IOMMU, as they were when the space was made. `available_mappings` does not follow the
    /// mappings that were made since: [`Transport::dma_limits`] returns the present number.
    pub fn limits(&self) -> &DmaLimits {
        &self.inner.limits
    }

    /// The address space. The device reaches all [buffers](DmaBuffer::address_space) that have the same one, also
    /// those that were made by other devices: see
    /// [`Device::open_beside`](super::Device::open_beside).
    #[inline]
    pub fn address_space(&self) -> AddressSpaceId {
        self.inner.id
    }

    /// How many mappings this device has. [Buffers](Self::buffer) share some.
    pub fn mapping_count(&self) -> usize {
        self.inner.mappings.load(Ordering::Relaxed)
    }

    /// A buffer of `size` bytes, rounded up to whole pages, that the device can read and write. All bytes are
    /// zero.
    ///
    /// Buffers share a few large mappings: a vfio-user server may accept no more than 16, and each mapping costs
    /// system calls. If the mappings have no room, a new one is made, as large as all before it together: at
    /// least 64 KiB, at most 64 MiB, and at most a quarter of the memory that the process may still lock. A
    /// buffer that needs more than that gets a mapping of its own size. A mapping is unmapped when its last
    /// buffer is dropped. This sharing has consequences:
    ///
    /// - The device reaches the memory of a dropped buffer until the mapping is unmapped, and a later buffer may
    ///   get the same memory, zeroed. Do not drop a buffer that the device may still write to, for example after
    ///   a command timed out: stop the device first, or keep the buffer (`std::mem::forget`).
    /// - A device that writes past the end of a buffer may write to another buffer.
    /// - Memory is locked before it is used.
    ///
    /// [`BufferRequest::own_mapping`] asks for a mapping that is not shared.
    ///
    /// # Address bits
    /// Its address is above 4 GiB, if the IOMMU has such addresses. A device with fewer than 64 address bits
    /// drops the upper ones and reaches something else, or nothing, and no error is reported: use
    /// [`buffer_with`](Self::buffer_with) and [`IovaPlacement::below_bits`].
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use vfio_remap::{Device, emulated::{Edu, Emulated}};
    /// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
    /// use vfio_remap::device::{BufferRequest, IovaPlacement};
    ///
    /// // QEMU's edu has 28 address bits.
    /// let request = BufferRequest::new(4096).placement(IovaPlacement::below_bits(28));
    /// let buffer = device.dma()?.buffer_with(request)?;
    /// assert!(buffer.iova().0 < 1 << 28);
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`map`](Self::map); `Os` if the kernel has no memory.
    pub fn buffer(&self, size: usize) -> Result<DmaBuffer> {
        self.buffer_with(BufferRequest::new(size))
    }

    /// A buffer with options: its placement, huge pages, a mapping of its own.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub fn buffer_with(&self, request: BufferRequest) -> Result<DmaBuffer> {
        DmaBuffer::new(self, request)
    }

    /// Maps `memory` for the device, until the mapping is dropped.
    ///
    /// # Errors
    /// `OutOfRange` if the address lies outside the ranges of the IOMMU, or no free range is large enough;
    /// `AddressTaken`; `Unaligned` if memory or address is not a multiple of the IOMMU's page size;
    /// `LockedMemory`, `TooManyMappings`; the transport's error.
    ///
    /// If others share the address space and have taken the chosen address, other addresses are tried for at
    /// most two seconds plus one call of the transport. A [buffer](Self::buffer) may take half a second and one
    /// call more.
    // Inlined, with its callees: compared with two system calls, each function call counts, most of all in an
    // emulator, which takes as long for one as for two hundred instructions. Errors are made out of line.
    #[inline(always)]
    pub fn map(
        &self,
        memory: DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<DmaMapping> {
        self.map_by(&Search::LONG, memory, placement, access)
    }

    /// As [`map`](Self::map), but with a shorter search, because the caller has an alternative.
    pub(super) fn try_map(
        &self,
        memory: DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<DmaMapping> {
        self.map_by(&Search::SHORT, memory, placement, access)
    }

    #[inline(always)]
    fn map_by(
        &self,
        search: &Search,
        memory: DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<DmaMapping> {
        let map = || {
            let taken = self.inner.take(&memory, placement)?;
            match self.inner.map(taken, &memory, placement, access) {
                Ok(place) => Ok((taken, place)),
                Err(error) => {
                    self.inner.map_elsewhere(search, taken, error, &memory, placement, access)
                }
            }
        };
        let ((taken, Place { iova, by }), peer) = if memory.is_kept_by_kernel() {
            (map()?, None)
        } else {
            map_peer(&self.inner.transport, &memory, access, map, |(taken, _)| taken.0)?
        };
        let generation = fork::generation();
        let mapping = DmaMapping { space: self.clone(), memory, taken, iova, by, peer, generation };
        if let Some(peer) = &mapping.peer {
            // Dropped, it is unmapped.
            peer.check()?;
        }
        Ok(mapping)
    }

    pub(super) fn arenas(&self) -> &Arenas {
        &self.inner.arenas
    }

    /// How many more bytes can be locked now. `None` if that is not limited, 0 if the transport cannot say.
    pub(super) fn lockable_bytes(&self) -> Option<u64> {
        self.inner.transport.dma_limits().map_or(Some(0), |limits| limits.lockable_bytes)
    }

    /// The mappings, for errors: how many, and the first addresses. `None` if there are none.
    pub(super) fn describe(&self, most: usize) -> Option<String> {
        let count = self.mapping_count();
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
            named.push(format!("{} more ranges", places.len() - most));
        }
        let named = named.join(", ");
        // Which device a range belongs to is not recorded.
        Some(match Arc::strong_count(&self.inner.addresses) {
            1 => format!("{count} DMA mappings at IOVA {named}"),
            _ => {
                format!("{count} of the DMA mappings at IOVA {named}, which other devices share")
            }
        })
    }

    /// Whether anything else holds the space, too.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }
}

/// A mapping that was made.
struct Place {
    /// The address by which the device reaches the memory.
    iova: Iova,
    by: Option<MappedBy>,
}

/// How many addresses are tried for a mapping, and for how long.
struct Search {
    attempts: usize,
    time: Duration,
}

impl Search {
    const LONG: Self = Self { attempts: 256, time: Duration::from_secs(2) };
    /// The distance doubles 31 times, which is further than what others are likely to have mapped.
    const SHORT: Self = Self { attempts: 32, time: Duration::from_millis(500) };
}

impl Inner {
    fn lost(&self) -> MutexGuard<'_, Vec<Iova>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees the addresses of one mapping.
    #[inline]
    fn give_back(&self, taken: Iova, size: u64) {
        self.addresses.free(taken, size);
        self.mappings.fetch_sub(1, Ordering::Relaxed);
    }

    /// Maps `memory` at `iova`. Returns the address by which the device reaches it.
    #[inline(always)]
    fn map(
        &self,
        iova: Iova,
        memory: &DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<Place> {
        let by = self.transport.dma_map_named(iova.0, memory, access)?;
        let translated = self.limits.translated;
        let iova = if translated { iova } else { self.locate(iova, memory, placement)? };
        Ok(Place { iova, by })
    }

    /// The address of `memory` for the device, if no IOMMU translates: `memory` is mapped at `iova`. If
    /// `placement` does not admit the address, `memory` is unmapped again.
    fn locate(&self, iova: Iova, memory: &DmaMemory, placement: IovaPlacement) -> Result<Iova> {
        let size = memory.size() as u64;
        let found = self.transport.dma_address(iova.0, size).map(Iova).and_then(|device| {
            if placement.admits(device, memory) {
                return Ok(device);
            }
            Err(Error::new(ErrorKind::OutOfRange, "map for DMA", format!("{size:#x} bytes"))
                .with_reason(format!(
                    "no IOMMU translates the device's addresses, and the memory is at {device}"
                ))
                .with_advice("accept any address: IovaPlacement::default"))
        });
        found.inspect_err(|_| {
            if let Err(error) = self.transport.dma_unmap(iova.0, size) {
                leak(memory, &error);
                self.lost().push(iova);
            }
        })
    }

    /// Maps memory that could not be mapped at its first address. A process that shares the address space, but
    /// not our allocator, may have mapped something there. Other addresses are tried if the placement allows
    /// that.
    ///
    /// The distance between two attempts doubles each time, so that large mappings of others cost some dozens
    /// of attempts, not one for each page. Skipped addresses are tried when no others are left. Attempts end
    /// after the time of the search, because each may take the transport long.
    #[cold]
    fn map_elsewhere(
        &self,
        search: &Search,
        taken: Iova,
        error: Error,
        memory: &DmaMemory,
        placement: IovaPlacement,
        access: Access,
    ) -> Result<(Iova, Place)> {
        let begun = Instant::now();
        let size = memory.size() as u64;
        let choice = match placement {
            // Without translation the address is only a key, and any will do.
            _ if !self.limits.translated => Some((1, u64::MAX)),
            IovaPlacement::Anywhere { alignment, limit } => Some((alignment, limit)),
            IovaPlacement::At(_) | IovaPlacement::SameAsAddress => None,
        };
        // Skipped addresses stay allocated meanwhile, so that they are not returned again.
        let mut passed = vec![(taken, size)];
        let mut result = Err(error);
        let (mut block, mut grows) = (size, true);
        while let (Err(error), Some((alignment, limit))) = (&result, choice)
            && error.kind() == ErrorKind::AddressTaken
            && passed.len() < search.attempts
            && begun.elapsed() < search.time
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
            result = self.map(start, memory, placement, access).map(|place| (start, place));
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
                // It is still a mapping.
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
                .with_reason(format!("all {tried} addresses that were tried are mapped by others"))
                .with_advice("unmap those, or choose a free address: IovaPlacement::At")
        })
    }

    /// Frees all but the first `size` of the `taken` bytes at `start`.
    fn keep_first(&self, start: Iova, size: u64, taken: &mut u64) {
        if let Some(rest) = start.checked_add(size) {
            self.addresses.free(rest, *taken - size);
        }
        *taken = size;
    }

    /// Allocates addresses for `memory`.
    #[inline(always)]
    fn take(&self, memory: &DmaMemory, placement: IovaPlacement) -> Result<Iova> {
        let size = memory.size() as u64;
        let page = self.limits.page_size;
        // Masks, because a division takes longer than everything else here.
        let inside_page = page - 1;
        if size == 0 || (size | memory.address() as u64) & inside_page != 0 {
            return Err(self.not_pages(size));
        }
        if let IovaPlacement::Anywhere { alignment, .. } = placement
            && !alignment.is_power_of_two()
        {
            return Err(no_alignment(size, alignment));
        }
        // Without translation the address is only a key of the mapping.
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
        .with_reason("a part of it is mapped already")
        .with_advice("unmap it first, or use IovaPlacement::default"))
    }

    /// The error for memory that does not consist of whole pages.
    #[cold]
    fn not_pages(&self, size: u64) -> Error {
        let error = |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes"));
        if size == 0 {
            return error(ErrorKind::OutOfRange)
                .with_reason("there is nothing to map")
                .with_advice("map at least one page");
        }
        error(ErrorKind::Unaligned)
            .with_reason(format!("the IOMMU maps pages of {:#x} bytes", self.limits.page_size))
            .with_advice("map whole pages")
    }

    /// The error for addresses that are not at a page, or not in the ranges of the IOMMU.
    #[cold]
    fn not_there(&self, start: u64, size: u64) -> Error {
        let page_size = self.limits.page_size;
        let error =
            |kind| Error::new(kind, "map for DMA", format!("{size:#x} bytes at {start:#x}"));
        if !start.is_multiple_of(page_size) {
            return error(ErrorKind::Unaligned)
                .with_reason(format!("the IOMMU maps pages of {page_size:#x} bytes"))
                .with_advice("use a multiple of that");
        }
        let ranges: Vec<_> = self
            .addresses
            .ranges()
            .iter()
            .map(|range| format!("{:#x}..={:#x}", range.start(), range.end()))
            .collect();
        error(ErrorKind::OutOfRange)
            .with_reason(format!("the IOMMU maps {}", ranges.join(", ")))
            .with_advice("use an address in those ranges, or IovaPlacement::default")
    }
}

/// Keeps memory for ever, because it could not be unmapped.
#[cold]
fn leak(memory: &DmaMemory, error: &Error) {
    log::error!("leaked memory that the device may still reach: {error}");
    std::mem::forget(memory.clone());
}

#[cold]
fn no_alignment(size: u64, alignment: u64) -> Error {
    Error::new(ErrorKind::Unaligned, "map for DMA", format!("{size:#x} bytes"))
        .with_reason(format!("an alignment of {alignment:#x} is not a power of two"))
        .with_advice("use 1 or another power of two")
}

#[cold]
fn no_room(size: u64, limit: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, "map for DMA", format!("{size:#x} bytes"))
        .with_reason(format!("no free range up to {limit:#x} is large enough"))
        .with_advice("unmap something, or allow higher addresses if the device supports them")
}

/// Memory that is mapped for the device. Dropping this unmaps it.
#[must_use = "dropping it unmaps the memory for the device"]
pub struct DmaMapping {
    space: DmaSpace,
    memory: DmaMemory,
    /// The address to unmap.
    taken: Iova,
    /// The address for the device.
    iova: Iova,
    by: Option<MappedBy>,
    /// If the memory is a window of another device.
    peer: Option<PeerMapping>,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

impl DmaMapping {
    /// The first byte's address for the device: a physical address if no IOMMU translates
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

    /// How the memory was named to the kernel. `None` if the transport does not say, or is not the kernel's.
    pub fn mapped_by(&self) -> Option<MappedBy> {
        self.by
    }

    /// Closes the file of the memory, which is of no use to the transport any more.
    pub(super) fn forget_file(&mut self) {
        self.memory = self.memory.clone().without_file();
    }

    /// The address space that it is in.
    pub(super) fn address_space(&self) -> AddressSpaceId {
        self.space.address_space()
    }

    /// Whether it was mapped by this space, and not by that of another device, even if both share the addresses.
    #[cfg(feature = "passthrough")]
    pub(crate) fn is_of(&self, space: &DmaSpace) -> bool {
        Arc::ptr_eq(&self.space.inner, &space.inner)
    }

    /// Whether this is a child of `fork(2)`, and the mapping is its parent's.
    #[inline]
    pub(super) fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }
}

impl Drop for DmaMapping {
    // Inlined into the caller, as the drops of the fields are.
    #[inline]
    fn drop(&mut self) {
        if self.is_inherited() {
            // The mapping is the parent's; both processes share the file.
            return;
        }
        let size = self.memory.size() as u64;
        let inner = &self.space.inner;
        let unmapped = match &self.peer {
            Some(peer) => peer.end(),
            None => inner.transport.dma_unmap(self.taken.0, size),
        };
        match unmapped {
            Ok(()) => inner.give_back(self.taken, size),
            // Neither the memory nor the addresses may be used again.
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
        let free = self.inner.addresses.free_range_count();
        write!(f, "DmaSpace({} mappings, {free} free ranges)", self.mapping_count())
    }
}
