//! Memory allocated for DMA.
//!
//! `unsafe` is here because a device changes the memory at any time. It is accessed as registers are, by single
//! accesses of `Width`, never by plain ones, and no reference to its contents is made.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use super::buffer_failed::BufferFailed;
use super::dma::DmaSpace;
use super::dma_arena::{Allocation, Refused, Wanted};
use super::dma_memory::HUGE_PAGE;
use super::dma_placement::IovaPlacement;
use super::iova::Iova;
use super::register_access::Width;
use super::register_copy::store_bytes;
use crate::error::{Error, ErrorKind, Result};
use crate::space::DmaMemory;
use crate::sys;
use crate::transport::{AddressSpaceId, MappedBy};

/// The size and the options of a buffer.
#[must_use = "it makes no buffer: pass it to DmaSpace::buffer_with"]
#[derive(Clone, Copy, Debug)]
pub struct BufferRequest {
    size: usize,
    placement: IovaPlacement,
    huge_pages: bool,
    own_mapping: bool,
}

impl BufferRequest {
    /// `size` bytes, rounded up to whole pages.
    pub fn new(size: usize) -> Self {
        let placement = IovaPlacement::default();
        Self { size, placement, huge_pages: false, own_mapping: false }
    }

    /// The placement of the buffer in the device's addresses.
    pub fn placement(self, placement: IovaPlacement) -> Self {
        Self { placement, ..self }
    }

    /// Uses pages of 2 MiB from the pool (`vm.nr_hugepages`), and an IOVA that is a multiple of 2 MiB if the
    /// placement allows it. If the pool has too few, ordinary pages are used, and
    /// [`DmaBuffer::huge_pages_refused`] says why.
    pub fn huge_pages(self) -> Self {
        Self { huge_pages: true, ..self }
    }

    /// Makes a mapping for this buffer alone, instead of one that buffers share ([`DmaSpace::buffer`]). The
    /// device reaches nothing else through it, and nothing at all once the buffer and its parts are dropped.
    /// Mappings are limited: some vfio-user servers accept 16.
    ///
    /// A buffer always has a mapping of its own if its [placement](Self::placement) is a given address, or if
    /// no IOMMU translates the device's addresses.
    pub fn own_mapping(self) -> Self {
        Self { own_mapping: true, ..self }
    }
}

/// Memory that this process and the device share: a part of a memory file, mapped at a multiple of the IOMMU's
/// page size, pinned, and mapped for the device at an [`Iova`].
///
/// [`split_at`](Self::split_at) makes parts that share the memory. When the last part is dropped, another buffer
/// may get the memory: see [`DmaSpace::buffer`]. Stores happen before a later
/// [`Register::write`](super::Register::write) that notifies the device.
///
/// DMA needs [`Config::set_bus_mastering`](super::Config::set_bus_mastering): without it the device reads and
/// writes nothing, and reports no error.
#[must_use = "dropping its last part frees the memory"]
pub struct DmaBuffer {
    first: NonNull<u8>,
    /// The first byte's address for the device.
    iova: Iova,
    size: usize,
    /// Keeps the memory mapped, and shares it with the other parts.
    allocation: Shared,
}

/// An allocation that the parts of a buffer share.
///
/// The drop of a plain `Arc` takes its address, for which the compiler would keep the whole buffer in memory. This
/// one passes it by value, so that a buffer moves in registers.
#[derive(Clone)]
struct Shared(ManuallyDrop<Arc<Allocation>>);

impl Shared {
    fn new(allocation: Allocation) -> Self {
        Self(ManuallyDrop::new(Arc::new(allocation)))
    }
}

impl Deref for Shared {
    type Target = Arc<Allocation>;

    fn deref(&self) -> &Arc<Allocation> {
        &self.0
    }
}

impl Drop for Shared {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: a value is dropped once, and nothing uses the field afterwards.
        release(unsafe { ManuallyDrop::take(&mut self.0) });
    }
}

#[cold]
#[inline(never)]
fn release(allocation: Arc<Allocation>) {
    drop(allocation);
}

// SAFETY: the memory is accessed by single accesses of `Width` only, which may race.
unsafe impl Send for DmaBuffer {}
// SAFETY: as above.
unsafe impl Sync for DmaBuffer {}

impl DmaBuffer {
    pub(super) fn new(space: &DmaSpace, request: BufferRequest) -> Result<Self> {
        let object = || format!("{:#x} bytes for DMA", request.size);
        let round = |page: usize| {
            let size = request.size.checked_next_multiple_of(page).filter(|size| *size > 0);
            size.filter(|size| *size < isize::MAX as usize).ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, "allocate", object())
                    .with_reason(
                        "a buffer has at least one byte and must fit into the address space",
                    )
                    .with_advice("ask for another size")
            })
        };
        let page = sys::page_size().max(space.limits().page_size as usize);
        let allocate = |size, page, placement, huge| {
            let alone = request.own_mapping;
            space.arenas().allocate(space, &Wanted { size, page, huge, placement, alone })
        };
        let ordinary = || Ok(allocate(round(page)?, page, request.placement, false)?);
        if !request.huge_pages {
            return ordinary().map(Self::whole);
        }
        let placement = match request.placement {
            IovaPlacement::Anywhere { alignment, limit } => {
                IovaPlacement::Anywhere { alignment: alignment.max(HUGE_PAGE as u64), limit }
            }
            other => other,
        };
        let huge_page = HUGE_PAGE.max(page);
        match allocate(round(huge_page)?, huge_page, placement, true) {
            Ok(allocation) => Ok(Self::whole(allocation)),
            Err(Refused::Memory(refused)) => {
                log::info!("ordinary pages instead: {refused}");
                let mut allocation = ordinary()?;
                allocation.huge_pages_refused = Some(refused);
                Ok(Self::whole(allocation))
            }
            Err(Refused::Mapping(error)) => Err(error),
        }
    }

    fn whole(allocation: Allocation) -> Self {
        let (first, iova, size) = (allocation.first(), allocation.iova(), allocation.size());
        Self { first, iova, size, allocation: Shared::new(allocation) }
    }

    /// The size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The first byte's address for the device.
    #[inline]
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The address space that it is mapped in. All devices in this address space reach it at its
    /// [`iova`](Self::iova). For any other device that address is not mapped, or is other memory: before you give
    /// a buffer to a device, compare this with [`DmaSpace::address_space`].
    #[inline]
    pub fn address_space(&self) -> AddressSpaceId {
        self.allocation.address_space()
    }

    /// The memory of this buffer, to map it for another device, too: all of the buffer that was allocated, if
    /// this is a [part](Self::split_at) of it. The memory is not given to another buffer while this value or a
    /// [`DmaMapping`](super::DmaMapping) of it lives.
    ///
    /// It has its file if the device's transport passes memory by file
    /// ([`DmaLimits::by_file`](crate::transport::DmaLimits::by_file)) and the buffer has a
    /// [mapping of its own](BufferRequest::own_mapping): the file of a shared mapping contains other buffers. The
    /// kernel's transports do not need the file once the buffer is mapped; a vfio-user server that gets memory without
    /// a file reaches it by messages.
    pub fn memory(&self) -> DmaMemory {
        self.allocation.memory()
    }

    /// How its memory was named to the kernel: by its file, if that is possible. `None` if the transport does not say,
    /// or is not the kernel's.
    pub fn mapped_by(&self) -> Option<MappedBy> {
        self.allocation.mapped_by()
    }

    /// Whether it consists of pages of 2 MiB.
    pub fn has_huge_pages(&self) -> bool {
        self.allocation.is_huge()
    }

    /// Why it consists of ordinary pages although huge ones were requested, and what to do about it.
    pub fn huge_pages_refused(&self) -> Option<&Error> {
        self.allocation.huge_pages_refused.as_ref()
    }

    /// Points to its first byte. Use atomic or volatile accesses only, while the buffer lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.first.as_ptr()
    }

    /// Splits the buffer into two parts, the first of `size` bytes.
    ///
    /// # Errors
    /// The buffer, with `OutOfRange` if a part would be empty.
    pub fn split_at(self, size: usize) -> std::result::Result<(Self, Self), BufferFailed> {
        if size == 0 || size >= self.size {
            let reason = format!("a part of it would be empty: the first has {size:#x} bytes");
            let advice = "use the whole buffer, or split it inside";
            return Err(BufferFailed::new(ErrorKind::OutOfRange, "split", self, reason, advice));
        }
        // SAFETY: `size` is less than the buffer's.
        let first = unsafe { self.first.add(size) };
        let (iova, rest) = (self.iova + size as u64, self.size - size);
        let second = Self { first, iova, size: rest, allocation: self.allocation.clone() };
        Ok((Self { size, ..self }, second))
    }

    /// Reads a little-endian value at `offset` bytes by one access. Later accesses happen after it (acquire
    /// order): if a flag is read as set, later reads see what was written before
    /// [`store_release`](Self::store_release) or the device set it.
    ///
    /// # Panics
    /// If it leaves the buffer or is not aligned, as for slices.
    #[inline]
    #[track_caller]
    pub fn load<T: Width>(&self, offset: usize) -> T {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::load(self.word::<T>(offset)) }
    }

    /// Writes a little-endian value at `offset` bytes by one access. It is ordered only before a later
    /// [`Register::write`](super::Register::write) or [`store_release`](Self::store_release).
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline]
    #[track_caller]
    pub fn store<T: Width>(&self, offset: usize, value: T) {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::store_relaxed(self.word::<T>(offset), value) }
    }

    /// Writes a little-endian value at `offset` bytes by one access. Earlier accesses to memory happen before
    /// it (release order). Use it for a ring that is published by a flag or an index in memory, not by a
    /// register. On x86-64 it is the same instruction as [`store`](Self::store); on aarch64 a barrier comes
    /// first.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline]
    #[track_caller]
    pub fn store_release<T: Width>(&self, offset: usize, value: T) {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::store(self.word::<T>(offset), value) }
    }

    /// Copies bytes out of the buffer, starting at `offset`.
    ///
    /// # Panics
    /// If they leave the buffer, as for slices.
    #[track_caller]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        let mut at = offset;
        let (head, words, tail) = split(self.as_ptr() as usize + offset, bytes.len());
        for byte in &mut bytes[..head] {
            *byte = self.load(at);
            at += 1;
        }
        for word in bytes[head..head + words].chunks_exact_mut(8) {
            word.copy_from_slice(&self.load::<u64>(at).to_le_bytes());
            at += 8;
        }
        for byte in &mut bytes[head + words..head + words + tail] {
            *byte = self.load(at);
            at += 1;
        }
    }

    /// Copies bytes into the buffer, starting at `offset`.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    #[track_caller]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the bytes were checked to lie in this buffer, which is mapped for writing while `self` lives.
        unsafe { store_bytes(self.at(offset), bytes) };
    }

    #[inline]
    #[track_caller]
    fn check(&self, offset: usize, len: usize) {
        let size = self.size;
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= size),
            "{len} bytes at {offset:#x} leave a buffer of {size:#x}"
        );
    }

    #[inline]
    #[track_caller]
    fn word<T: Width>(&self, offset: usize) -> *mut T {
        self.check(offset, size_of::<T>());
        let at = self.at(offset).as_ptr();
        assert!(at.addr().is_multiple_of(size_of::<T>()), "offset {offset:#x} is not aligned");
        at.cast()
    }

    #[inline]
    fn at(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: the callers have checked that the offset lies in this part, which lies in the mapping.
        unsafe { self.first.add(offset) }
    }
}

/// Splits `len` bytes at `address`: the bytes before the first aligned word, the bytes of whole words, the
/// rest.
pub(super) fn split(address: usize, len: usize) -> (usize, usize, usize) {
    let head = (address.wrapping_neg() % 8).min(len);
    let words = (len - head) / 8 * 8;
    (head, words, len - head - words)
}

impl fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaBuffer({:#x} bytes at {})", self.size, self.iova())
    }
}
