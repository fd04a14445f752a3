//! Memory for DMA: memory files that are sealed, and mapped in this process.
//!
//! `unsafe` is here because memory is mapped and unmapped.

#![expect(unsafe_code, reason = "a device changes this memory at any time")]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Error, Result};
use crate::space::out_of_memory;
use crate::sys;
use crate::sys::mmap_lock::MmapLock;

/// The size of a huge page in bytes.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// The mapping in this process.
pub(super) struct Memory {
    at: NonNull<u8>,
    size: usize,
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
    /// size cannot change, so no access to the mapping faults. All bytes are zero.
    pub(super) fn new(size: usize, alignment: usize, huge: bool) -> Result<(Self, OwnedFd, u64)> {
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
        sys::file::fix_size(&fd).map_err(failed)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let lock = MmapLock::take();
        // SAFETY: the kernel chooses an unused range.
        let at = unsafe { mmap(None, room, protection, MapFlags::MAP_SHARED, fd.as_fd(), 0) };
        drop(lock);
        let no_room = |errno| {
            if huge { failed(errno) } else { out_of_memory(errno, "allocate", object(), size) }
        };
        let at = at.map_err(no_room)?.cast();
        let mut memory = Self { at, size: room.get(), huge };
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

    /// The first byte.
    pub(super) fn first(&self) -> NonNull<u8> {
        self.at
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Whether it consists of pages of 2 MiB.
    pub(super) fn is_huge(&self) -> bool {
        self.huge
    }
}

/// How many huge pages are free and not reserved. `None` if the kernel does not say.
pub(super) fn free_huge_pages() -> Option<u64> {
    let count = |name: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Some(count("free_hugepages")?.saturating_sub(count("resv_hugepages")?))
}
