//! `mmap(2)` and its relatives, each use of it under a name of its own.
//!
//! Addresses are `usize`: these functions rearrange address space and never look at what is in it.
//! Lengths and addresses are multiples of the page size. A range is *ours* when nobody but the caller
//! uses or replaces it: a reservation, or a mapping whose last user is the caller.
//!
//! Calls that give addresses out, or replace what is mapped, take the [`Turn`].

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{MAP_FIXED, MAP_SHARED, PROT_NONE};
use nix::errno::Errno;

use super::spy::{self, Call};
use super::turn::Turn;

type Result<T> = std::result::Result<T, Errno>;

/// Whether a mapping can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `PROT_READ`
    ReadOnly,
    /// `PROT_READ|PROT_WRITE`
    ReadWrite,
}

impl Access {
    fn prot(self) -> libc::c_int {
        match self {
            Self::ReadOnly => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// A range of addresses that a kernel may let devices reach.
#[derive(Clone, Copy)]
pub(crate) struct Shareable {
    pub(super) address: usize,
    pub(super) size: usize,
}

impl Shareable {
    /// `size` bytes at `address`.
    ///
    /// # Safety
    /// Nothing makes a reference to what lies there as long as a device may reach it: from the call that
    /// maps it for DMA until the one that unmaps it, or the end of the device's file. That holds of memory
    /// that is kept as long, and of pages that are given back to the kernel before, which keeps them
    /// pinned and gives them to nobody.
    #[inline]
    pub(crate) const unsafe fn new(address: usize, size: usize) -> Self {
        Self { address, size }
    }
}

/// `mmap(2)` with a raw fd, for the wrappers below.
///
/// # Safety
/// With `MAP_FIXED`, `[address, address + len)` is ours.
unsafe fn mmap(
    address: usize,
    len: usize,
    prot: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: u64,
) -> Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: without MAP_FIXED the kernel chooses a range that nobody uses; with it the caller vouches.
    let at = unsafe { libc::mmap64(address as *mut _, len, prot, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(at as usize) }
}

/// `mmap(NULL, len, PROT_NONE, MAP_SHARED, placeholder, offset)`: reserves address space.
pub(crate) fn reserve(
    _: &Turn,
    placeholder: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<usize> {
    spy::call(Call::Reserve)?;
    // SAFETY: no MAP_FIXED.
    unsafe { mmap(0, len, PROT_NONE, MAP_SHARED, placeholder.as_raw_fd(), offset) }
}

/// The same at `address`, by `MAP_FIXED_NOREPLACE` (Linux 4.17): EEXIST where something is there.
pub(crate) fn reserve_at(
    _: &Turn,
    address: usize,
    placeholder: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<()> {
    spy::call(Call::ReserveAt { address })?;
    let flags = MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE never touches what is there.
    let at = unsafe { mmap(address, len, PROT_NONE, flags, placeholder.as_raw_fd(), offset)? };
    if at == address {
        return Ok(());
    }
    // A kernel before 4.17 takes the address as a hint.
    // SAFETY: the range was made on the line above, and nobody knows of it.
    let _ = unsafe { munmap(at, len) };
    Err(Errno::EEXIST)
}

/// Makes `[address, address + len)` inaccessible in one step, whatever is mapped there: at no
/// instant is it a hole that another `mmap` could take.
///
/// # Safety
/// The range is ours, and nothing reads or writes through it any more.
pub(crate) unsafe fn cover(
    _: &Turn,
    address: usize,
    placeholder: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<()> {
    spy::call(Call::Cover { address, len })?;
    let flags = MAP_SHARED | MAP_FIXED;
    // SAFETY: the caller owns the range.
    unsafe { mmap(address, len, PROT_NONE, flags, placeholder.as_raw_fd(), offset) }.map(drop)
}

/// `mmap(NULL, len, prot, MAP_SHARED, fd, offset)`
pub(crate) fn map(
    _: &Turn,
    fd: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    access: Access,
) -> Result<usize> {
    spy::call(Call::Map { len })?;
    // SAFETY: no MAP_FIXED.
    unsafe { mmap(0, len, access.prot(), MAP_SHARED, fd.as_raw_fd(), offset) }
}

/// `mmap(address, len, prot, MAP_SHARED|MAP_FIXED, fd, offset)`
///
/// When the driver behind `fd` refuses, the kernel has unmapped the range already: the caller plugs
/// the hole.
///
/// # Safety
/// The range is ours, and nothing reads or writes through it.
pub(crate) unsafe fn map_fixed(
    _: &Turn,
    address: usize,
    fd: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    access: Access,
) -> Result<()> {
    spy::call(Call::MapFixed { address, len })?;
    let flags = MAP_SHARED | MAP_FIXED;
    // SAFETY: the caller owns the range.
    unsafe { mmap(address, len, access.prot(), flags, fd.as_raw_fd(), offset) }.map(drop)
}

/// `munmap(address, len)`
///
/// # Safety
/// The range is ours, and nothing reads or writes through it any more.
pub(crate) unsafe fn munmap(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Unmap)?;
    // SAFETY: the caller owns the range.
    Errno::result(unsafe { libc::munmap(address as *mut _, len) }).map(drop)
}

/// `mprotect(address, len, PROT_READ)`
///
/// # Safety
/// The range is ours, and nothing writes through it any more.
pub(crate) unsafe fn protect_read_only(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Protect)?;
    // SAFETY: the caller owns the range; taking rights away invalidates no other memory.
    Errno::result(unsafe { libc::mprotect(address as *mut _, len, libc::PROT_READ) }).map(drop)
}

/// `munlock(address, len)`: takes the range off the count of locked memory. `mlockall(MCL_FUTURE)` puts on it
/// what is mapped.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn munlock(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Unlock)?;
    // SAFETY: the caller owns the range; what is there stays there.
    Errno::result(unsafe { libc::munlock(address as *const _, len) }).map(drop)
}

/// `madvise(address, len, MADV_DONTFORK)`: a child gets a hole instead of the device.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn keep_from_children(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Advise)?;
    // SAFETY: the caller owns the range; this process's view of it does not change.
    Errno::result(unsafe { libc::madvise(address as *mut _, len, libc::MADV_DONTFORK) }).map(drop)
}

/// `madvise(address, len, MADV_HUGEPAGE)`: where transparent huge pages are set to `madvise`, Linux
/// 6.12 and newer map a BAR by 2 MiB and 1 GiB entries only where this was said.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn prefer_huge_pages(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Advise)?;
    // SAFETY: the caller owns the range; the advice changes how faults are served, not what is there.
    Errno::result(unsafe { libc::madvise(address as *mut _, len, libc::MADV_HUGEPAGE) }).map(drop)
}

/// `mremap(2)` with all five arguments, as the kernel takes them: the C wrapper is variadic, and a
/// fifth argument that was not passed is garbage that the kernel may reject.
///
/// # Safety
/// The old range is ours; with `MREMAP_FIXED` so is the new one.
unsafe fn mremap(old: usize, len: usize, flags: libc::c_int, new: usize) -> Result<usize> {
    // SAFETY: the caller owns both ranges; the length does not change.
    let at = unsafe {
        libc::mremap(
            old as *mut _,
            len,
            len,
            libc::MREMAP_MAYMOVE | flags,
            ptr::without_provenance_mut::<libc::c_void>(new),
        )
    };
    if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(at as usize) }
}

/// `mremap(old, len, len, MREMAP_MAYMOVE|MREMAP_DONTUNMAP, NULL)` (Linux 5.7): the page tables go to a
/// range that the kernel chooses, and the old mapping stays, empty, to be filled again by faults.
///
/// # Safety
/// The old range is one mapping of ours, of a backing that fills it again.
pub(crate) unsafe fn dont_unmap(_: &Turn, old: usize, len: usize) -> Result<usize> {
    spy::call(Call::DontUnmap)?;
    // SAFETY: the caller owns the old range; no MREMAP_FIXED.
    unsafe { mremap(old, len, libc::MREMAP_DONTUNMAP, 0) }
}

/// The same to `new`, by `MREMAP_FIXED`. Up to Linux 6.16 a refusal comes after the destination was
/// unmapped: the caller plugs the hole.
///
/// # Safety
/// As [`dont_unmap`], and the new range is ours and unused.
pub(crate) unsafe fn dont_unmap_fixed(_: &Turn, old: usize, len: usize, new: usize) -> Result<()> {
    spy::call(Call::DontUnmapFixed { address: new, len })?;
    // SAFETY: the caller owns both ranges.
    unsafe { mremap(old, len, libc::MREMAP_DONTUNMAP | libc::MREMAP_FIXED, new) }.map(drop)
}

/// `mremap(old, len, len, MREMAP_MAYMOVE|MREMAP_FIXED, new)`: the mapping goes to `new` and leaves a
/// hole. A refusal may come after the destination was unmapped.
///
/// # Safety
/// Both ranges are ours; nothing reads or writes through either.
pub(crate) unsafe fn move_fixed(_: &Turn, old: usize, len: usize, new: usize) -> Result<()> {
    spy::call(Call::MoveFixed { address: new, len })?;
    // SAFETY: the caller owns both ranges.
    unsafe { mremap(old, len, libc::MREMAP_FIXED, new) }.map(drop)
}
