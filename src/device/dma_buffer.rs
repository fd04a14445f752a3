//! Memory allocated for DMA.
//!
//! `unsafe` is here because a device changes the memory at any time. It is accessed as registers are, by single
//! accesses of `Width`, never by plain ones, and no reference to its contents is made.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::buffer_failed::BufferFailed;
use super::dma::{DmaMapping, DmaSpace, IovaPlacement};
use super::iova::Iova;
use super::register_access::Width;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory, out_of_memory};
use crate::sys;
use crate::sys::mmap_lock::MmapLock;
use crate::transport::DmaLimits;

const HUGE_PAGE: usize = 2 << 20;

/// The size and the options of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct BufferRequest {
    size: usize,
    placement: IovaPlacement,
    huge_pages: bool,
}

impl BufferRequest {
    /// `size` bytes, rounded up to whole pages.
    pub fn new(size: usize) -> Self {
        Self { size, placement: IovaPlacement::default(), huge_pages: false }
    }

    /// The placement of the buffer in the device's addresses.
    #[must_use]
    pub fn placement(self, placement: IovaPlacement) -> Self {
        Self { placement, ..self }
    }

    /// Uses pages of 2 MiB from the pool (`vm.nr_hugepages`), and an IOVA that is a multiple of 2 MiB if the
    /// placement allows it. If the pool has too few, ordinary pages are used, and
    /// [`DmaBuffer::huge_pages_refused`] says why.
    #[must_use]
    pub fn huge_pages(self) -> Self {
        Self { huge_pages: true, ..self }
    }
}

/// Memory that this process and the device share: a memory file of its own, mapped at a multiple of the IOMMU's
/// page size, pinned, and mapped for the device at an [`Iova`].
///
/// [`split_at`](Self::split_at) makes parts that share the memory. It is freed when the last part is dropped,
/// after the device can no longer reach it. Stores happen before a later
/// [`Register::write`](super::Register::write) that notifies the device.
///
/// DMA needs [`Config::set_bus_mastering`](super::Config::set_bus_mastering): without it the device reads and
/// writes nothing, and reports no error.
pub struct DmaBuffer {
    whole: Arc<Whole>,
    offset: usize,
    size: usize,
}

struct Whole {
    /// Dropped before `memory`, so that the device cannot reach freed memory: fields are dropped in order.
    mapping: DmaMapping,
    memory: Arc<Memory>,
}

/// The mapping in this process.
struct Memory {
    at: NonNull<u8>,
    size: usize,
    /// Why it has no huge pages although they were requested.
    refused: Option<Error>,
    huge: bool,
}

// SAFETY: the memory is accessed by single accesses of `Width` only, which may race.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `Memory::new` made the mapping, and this drops its last user.
        if let Err(errno) = unsafe { munmap(self.at.cast(), self.size) } {
            log::error!("leaked {:#x} bytes of DMA memory: {errno}", self.size);
        }
    }
}

impl Memory {
    /// Makes a sealed memory file of at least `size` bytes and maps `size` of them, at a multiple of
    /// `alignment` bytes, a power of two. Returns the file and the offset of the mapping in it, too. The file's
    /// size cannot change, so no access to the mapping faults.
    fn new(size: usize, alignment: usize, huge: bool) -> Result<(Self, OwnedFd, u64)> {
        let object = || format!("{size:#x} bytes for DMA");
        let failed = |errno| {
            let error = Error::os(errno, "allocate", object());
            if !huge {
                return error;
            }
            let pages = size / HUGE_PAGE;
            error
                .with_reason(format!("there are fewer than {pages} free pages of 2 MiB"))
                .with_advice(format!("reserve some: sysctl vm.nr_hugepages={pages}, or more"))
        };
        let page = if huge { HUGE_PAGE } else { sys::page_size() };
        // A mapping of this size contains an aligned range of `size` bytes, at any address.
        let room = size.checked_add(alignment.saturating_sub(page)).and_then(NonZeroUsize::new);
        let room = room.ok_or_else(|| failed(Errno::ENOMEM))?;
        let huge_flags =
            if huge { MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB } else { MFdFlags::empty() };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge_flags;
        let fd = memfd_create("vfio-remap-dma", flags).map_err(failed)?;
        nix::unistd::ftruncate(&fd, room.get() as i64).map_err(failed)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let lock = MmapLock::take();
        // SAFETY: the kernel chooses an unused range.
        let at = unsafe { mmap(None, room, protection, MapFlags::MAP_SHARED, fd.as_fd(), 0) };
        drop(lock);
        let no_room = |errno| {
            if huge { failed(errno) } else { out_of_memory(errno, "allocate", object(), size) }
        };
        let at = at.map_err(no_room)?.cast();
        let mut memory = Self { at, size: room.get(), refused: None, huge };
        let skipped = memory.at.addr().get().wrapping_neg() & (alignment - 1);
        memory.trim(skipped, size).map_err(failed)?;
        Ok((memory, fd, skipped as u64))
    }

    /// Unmaps all but the `size` bytes after the first `skipped`. Both are whole pages.
    fn trim(&mut self, skipped: usize, size: usize) -> nix::Result<()> {
        if skipped > 0 {
            // SAFETY: the head of the mapping that `new` made; nothing else uses it yet.
            unsafe { munmap(self.at.cast(), skipped) }?;
            // SAFETY: in the mapping, or at its end.
            self.at = unsafe { self.at.add(skipped) };
            self.size -= skipped;
        }
        if self.size > size {
            // SAFETY: in the mapping.
            let tail = unsafe { self.at.add(size) };
            // SAFETY: the tail of the mapping that `new` made; nothing else uses it yet.
            unsafe { munmap(tail.cast(), self.size - size) }?;
            self.size = size;
        }
        Ok(())
    }
}

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
        let DmaLimits { page_size, by_file, .. } = *space.limits();
        let page = sys::page_size().max(page_size as usize);
        let huge_page = HUGE_PAGE.max(page);
        let huge = request.huge_pages.then(|| round(huge_page)).transpose()?;
        let (memory, fd, offset) = match huge.map(|size| Memory::new(size, huge_page, true)) {
            Some(Ok(made)) => made,
            Some(Err(refused)) => {
                log::info!("ordinary pages instead: {refused}");
                let (mut memory, fd, offset) = Memory::new(round(page)?, page, false)?;
                memory.refused = Some(refused);
                (memory, fd, offset)
            }
            None => Memory::new(round(page)?, page, false)?,
        };
        let placement = match request.placement {
            IovaPlacement::Anywhere { alignment, limit } if memory.huge => {
                IovaPlacement::Anywhere { alignment: alignment.max(HUGE_PAGE as u64), limit }
            }
            other => other,
        };
        let (address, size) = (memory.at.as_ptr() as usize, memory.size);
        let memory = Arc::new(memory);
        let file = by_file.then(|| (Arc::new(fd), offset));
        // SAFETY: mapped while `memory` lives; accessed only by single accesses, in this file and `dma_array`.
        let shared = unsafe { DmaMemory::new(address, size, file, memory.clone()) };
        let mapping = space.map(shared.own(), placement, Access::ReadWrite)?;
        Ok(Self { whole: Arc::new(Whole { mapping, memory }), offset: 0, size })
    }

    /// The size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.size
    }

    /// The first byte's address for the device.
    #[inline]
    pub fn iova(&self) -> Iova {
        Iova(self.whole.mapping.iova().0 + self.offset as u64)
    }

    /// All of the memory that this is a part of, to map it for another device, too. It has its file if the
    /// device's transport passes memory by file ([`DmaLimits::by_file`]). The kernel's transports do not; a
    /// vfio-user server that gets memory without a file reaches it by messages.
    pub fn memory(&self) -> &DmaMemory {
        self.whole.mapping.memory()
    }

    /// Whether it consists of pages of 2 MiB.
    pub fn has_huge_pages(&self) -> bool {
        self.whole.memory.huge
    }

    /// Why it consists of ordinary pages although huge ones were requested, and what to do about it.
    pub fn huge_pages_refused(&self) -> Option<&Error> {
        self.whole.memory.refused.as_ref()
    }

    /// Points to its first byte. Use atomic or volatile accesses only, while the buffer lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.at(0).as_ptr()
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
        let Self { whole, offset, size: all } = self;
        let second = Self { whole: whole.clone(), offset: offset + size, size: all - size };
        Ok((Self { whole, offset, size }, second))
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
        let mut at = offset;
        let (head, words, tail) = split(self.as_ptr() as usize + offset, bytes.len());
        for &byte in &bytes[..head] {
            self.store(at, byte);
            at += 1;
        }
        for word in bytes[head..head + words].chunks_exact(8) {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            self.store(at, u64::from_le_bytes(value));
            at += 8;
        }
        for &byte in &bytes[head + words..head + words + tail] {
            self.store(at, byte);
            at += 1;
        }
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
        unsafe { self.whole.memory.at.add(self.offset + offset) }
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
