//! Memory made for DMA.
//!
//! `unsafe` is here because a device changes the memory at any time. It is touched by the same single
//! accesses as registers are, never by plain ones, and no reference to its contents is made.

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

/// A buffer to be made: its size, and wishes.
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

    /// Where the device is to find it.
    #[must_use]
    pub fn placement(self, placement: IovaPlacement) -> Self {
        Self { placement, ..self }
    }

    /// Of pages of 2 MiB, if there are any in the pool (`vm.nr_hugepages`), and then at a multiple of
    /// 2 MiB where the place is free to choose; otherwise of ordinary ones:
    /// [`DmaBuffer::huge_pages_refused`] says why.
    #[must_use]
    pub fn huge_pages(self) -> Self {
        Self { huge_pages: true, ..self }
    }
}

/// Memory that this process and the device share: a file of its own, mapped at a multiple of the IOMMU's
/// page size, pinned, and known to the device by an [`Iova`].
///
/// [`split_at`](Self::split_at) gives parts of it away; the memory goes when the last part is dropped,
/// after the device can no longer reach it. What a device is told of by
/// [`Register::write`](super::Register::write) is written before.
///
/// The device reaches it while [`Config::set_bus_mastering`](super::Config::set_bus_mastering) is on; while
/// it is off, what the device is told to read or write here silently does not happen.
pub struct DmaBuffer {
    whole: Arc<Whole>,
    offset: usize,
    size: usize,
}

struct Whole {
    /// Before the memory goes, the device lets go of it: fields are dropped in order.
    mapping: DmaMapping,
    memory: Arc<Memory>,
}

/// The mapping in this process.
struct Memory {
    at: NonNull<u8>,
    size: usize,
    /// Why it has no huge pages, where they were asked for.
    refused: Option<Error>,
    huge: bool,
}

// SAFETY: the memory is reached by single accesses in assembly only, which may race.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `Memory::new`, and its last user is going.
        if let Err(errno) = unsafe { munmap(self.at.cast(), self.size) } {
            log::error!("leaked {:#x} bytes of DMA memory: {errno}", self.size);
        }
    }
}

impl Memory {
    /// A sealed memory file of `size` bytes or more, of which `size` are mapped, at a multiple of `alignment`
    /// bytes, a power of two; and where in the file they begin. The file's length cannot change: no access
    /// to the mapping ever faults.
    fn new(size: usize, alignment: usize, huge: bool) -> Result<(Self, OwnedFd, u64)> {
        let object = || format!("{size:#x} bytes for DMA");
        let failed = |errno| {
            let error = Error::os(errno, "allocate", object());
            if !huge {
                return error;
            }
            let pages = size / HUGE_PAGE;
            error
                .because(format!("there are not {pages} free pages of 2 MiB"))
                .remedy(format!("reserve some: sysctl vm.nr_hugepages={pages}, or more"))
        };
        let page = if huge { HUGE_PAGE } else { sys::page_size() };
        // Wherever the kernel maps this much, there is a multiple of the alignment with room behind it.
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
        // SAFETY: the kernel chooses a range that nobody uses.
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

    /// Unmaps all but the `size` bytes behind the first `skipped`, whole pages both.
    fn trim(&mut self, skipped: usize, size: usize) -> nix::Result<()> {
        if skipped > 0 {
            // SAFETY: the head of what `new` has mapped, and nobody has seen yet.
            unsafe { munmap(self.at.cast(), skipped) }?;
            // SAFETY: within what is mapped, or at its end.
            self.at = unsafe { self.at.add(skipped) };
            self.size -= skipped;
        }
        if self.size > size {
            // SAFETY: within what is mapped.
            let tail = unsafe { self.at.add(size) };
            // SAFETY: the tail of what `new` has mapped, and nobody has seen yet.
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
                    .because("a buffer needs one byte or more, and must fit into memory")
                    .remedy("ask for another size")
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
        // SAFETY: mapped as long as `memory` lives; reached by single accesses only, below.
        let shared = unsafe { DmaMemory::new(address, size, file, memory.clone()) };
        let mapping = space.map(shared.own(), placement, Access::ReadWrite)?;
        Ok(Self { whole: Arc::new(Whole { mapping, memory }), offset: 0, size })
    }

    /// The size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Where the device finds its first byte.
    #[inline]
    pub fn iova(&self) -> Iova {
        Iova(self.whole.mapping.iova().0 + self.offset as u64)
    }

    /// All of the memory that it is a part of, to be mapped elsewhere, too. Its file is there where the
    /// device's transport hands memory on by that ([`DmaLimits::by_file`]): the kernel's does not, and a
    /// server that is given the memory of such a device, too, reaches it by messages.
    pub fn memory(&self) -> &DmaMemory {
        self.whole.mapping.memory()
    }

    /// Whether it consists of pages of 2 MiB.
    pub fn has_huge_pages(&self) -> bool {
        self.whole.memory.huge
    }

    /// Why it consists of ordinary pages although huge ones were asked for, and what to do about it.
    pub fn huge_pages_refused(&self) -> Option<&Error> {
        self.whole.memory.refused.as_ref()
    }

    /// Points to its first byte. What is read or written there is to be read or written by atomic or
    /// volatile accesses, while the buffer lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.at(0).as_ptr()
    }

    /// Splits it in two, the first of `size` bytes.
    ///
    /// # Errors
    /// The buffer, with `OutOfRange` where a part would be empty.
    pub fn split_at(self, size: usize) -> std::result::Result<(Self, Self), BufferFailed> {
        if size == 0 || size >= self.size {
            let reason = format!("a part of it would be empty: the first has {size:#x} bytes");
            let remedy = "take it whole, or split it inside";
            return Err(BufferFailed::new(ErrorKind::OutOfRange, "split", self, reason, remedy));
        }
        let Self { whole, offset, size: all } = self;
        let second = Self { whole: whole.clone(), offset: offset + size, size: all - size };
        Ok((Self { whole, offset, size }, second))
    }

    /// Reads a little-endian value at `offset` bytes, by one access; those that follow are made after it
    /// (acquire order): once a flag reads as set, what was written before
    /// [`store_release`](Self::store_release) set it, or before a device did, is there.
    ///
    /// # Panics
    /// Where it leaves the buffer or is not aligned, as slices do.
    #[inline]
    #[track_caller]
    pub fn load<T: Width>(&self, offset: usize) -> T {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::load(self.word::<T>(offset)) }
    }

    /// Writes a little-endian value at `offset` bytes, by one access, in no order with others but those of
    /// [`Register::write`](super::Register::write) and [`store_release`](Self::store_release).
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline]
    #[track_caller]
    pub fn store<T: Width>(&self, offset: usize, value: T) {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::store_relaxed(self.word::<T>(offset), value) }
    }

    /// Writes a little-endian value at `offset` bytes, by one access, after all accesses to memory before it
    /// (release order): a ring that a device reads is published by a flag or an index in memory so, not by
    /// a register. On x86-64 it is the instruction of [`store`](Self::store); on aarch64 a barrier besides.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    #[inline]
    #[track_caller]
    pub fn store_release<T: Width>(&self, offset: usize, value: T) {
        // SAFETY: checked by `word`; mapped while `self` lives.
        unsafe { T::store(self.word::<T>(offset), value) }
    }

    /// Copies bytes out, from `offset` on.
    ///
    /// # Panics
    /// Where they leave the buffer, as slices do.
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

    /// Copies bytes in, from `offset` on.
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
        // SAFETY: callers have checked that the offset lies within this part, which lies in the mapping.
        unsafe { self.whole.memory.at.add(self.offset + offset) }
    }
}

/// A run of `len` bytes from `address` on: bytes before the first aligned word, bytes of words, rest.
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
