//! `mmap(2)`, `mremap(2)` and related calls, with one function for each use.
//!
//! Addresses are `usize`: these functions change mappings and never access memory. Lengths and addresses
//! are multiples of the page size. A range is *ours* if only the caller uses or replaces it: it is a
//! reservation, or a mapping whose last user is the caller.
//!
//! Calls that create or replace mappings take the [`MmapLock`].

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{MAP_FIXED, MAP_SHARED, PROT_NONE};
use nix::errno::Errno;

use super::mmap_lock::MmapLock;
use super::spy::{self, Call};

type Result<T> = std::result::Result<T, Errno>;

/// Whether a mapping can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Access {
    /// `PROT_READ`
    ReadOnly,
    /// `PROT_READ|PROT_WRITE`
    ReadWrite,
}

impl Access {
    pub(super) fn prot(self) -> libc::c_int {
        match self {
            Self::ReadOnly => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// A range of addresses that may be mapped for DMA.
#[derive(Clone, Copy)]
pub(crate) struct Shareable {
    pub(super) address: usize,
    pub(super) size: usize,
}

impl Shareable {
    /// `size` bytes at `address`.
    ///
    /// # Safety
    /// No reference to the memory exists while a device may reach it: from the call that maps it for DMA
    /// until the call that unmaps it, or until the device's file is closed. For that time the caller keeps
    /// the memory. Or it unmaps the pages earlier and gives them to no one else: the kernel keeps them
    /// pinned and does not reuse them.
    #[inline]
    pub(crate) const unsafe fn new(address: usize, size: usize) -> Self {
        Self { address, size }
    }
}

/// Pages of a file that may be mapped for DMA.
#[derive(Clone, Copy)]
pub(crate) struct ShareableFile<'f> {
    pub(super) file: BorrowedFd<'f>,
    /// The offset of the first page in the file, in bytes.
    pub(super) start: u64,
    pub(super) size: usize,
}

impl<'f> ShareableFile<'f> {
    /// `size` bytes of `file` from `start` on.
    ///
    /// # Safety
    /// No reference to these bytes exists in any mapping of the file while a device may reach them: see
    /// [`Shareable::new`].
    #[inline]
    pub(crate) const unsafe fn new(file: BorrowedFd<'f>, start: u64, size: usize) -> Self {
        Self { file, start, size }
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
    // SAFETY: without MAP_FIXED the kernel chooses an unused range; with it the range is the caller's, by
    // the contract above.
    let at = unsafe { libc::mmap64(address as *mut _, len, prot, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(at as usize) }
}

/// `mmap(NULL, len, PROT_NONE, MAP_SHARED, marker, offset)`: reserves address space.
pub(crate) fn reserve(
    _: &MmapLock,
    marker: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<usize> {
    spy::call(Call::Reserve)?;
    // SAFETY: no MAP_FIXED.
    unsafe { mmap(0, len, PROT_NONE, MAP_SHARED, marker.as_raw_fd(), offset) }
}

/// As [`reserve`], at `address` (`MAP_FIXED_NOREPLACE`, Linux 4.17): EEXIST if something is mapped there.
pub(crate) fn reserve_at(
    _: &MmapLock,
    address: usize,
    marker: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<()> {
    spy::call(Call::ReserveAt { address })?;
    let flags = MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE never replaces a mapping.
    let at = unsafe { mmap(address, len, PROT_NONE, flags, marker.as_raw_fd(), offset)? };
    if at == address {
        return Ok(());
    }
    // A kernel before 4.17 takes the address as a hint.
    // SAFETY: the mapping was made above, and nothing else has its address.
    let _ = unsafe { munmap(at, len) };
    Err(Errno::EEXIST)
}

/// Makes `[address, address + len)` inaccessible in one call, whatever is mapped there. It is never a hole
/// that another `mmap` could take.
///
/// # Safety
/// The range is ours, and nothing reads or writes through it any more.
pub(crate) unsafe fn cover(
    _: &MmapLock,
    address: usize,
    marker: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> Result<()> {
    spy::call(Call::Cover { address, len })?;
    let flags = MAP_SHARED | MAP_FIXED;
    // SAFETY: the caller owns the range.
    unsafe { mmap(address, len, PROT_NONE, flags, marker.as_raw_fd(), offset) }.map(drop)
}

/// `mmap(NULL, len, prot, MAP_SHARED, fd, offset)`
pub(crate) fn map(
    _: &MmapLock,
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
/// If the driver behind `fd` refuses, the kernel may already have unmapped the range. The caller then
/// reserves it again.
///
/// # Safety
/// The range is ours, and nothing reads or writes through it.
pub(crate) unsafe fn map_fixed(
    _: &MmapLock,
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

/// `munlock(address, len)`: the range no longer counts as locked memory. After `mlockall(MCL_FUTURE)`
/// each new mapping does.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn munlock(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Unlock)?;
    // SAFETY: the caller owns the range; the mapping does not change.
    Errno::result(unsafe { libc::munlock(address as *const _, len) }).map(drop)
}

/// `mseal(address, len, 0)` (Linux 6.10): the mapping cannot be unmapped, replaced, moved or protected any
/// more. ENOSYS on an older kernel.
///
/// # Safety
/// The range is ours, and is never unmapped or replaced from now on.
pub(crate) unsafe fn seal(address: usize, len: usize) -> Result<()> {
    /// The same on every machine.
    const MSEAL: libc::c_long = 462;
    // SAFETY: the caller owns the range; what is mapped there does not change.
    Errno::result(unsafe { libc::syscall(MSEAL, address, len, 0 as libc::c_long) }).map(drop)
}

/// `madvise(address, len, MADV_DONTFORK)`: children do not inherit the mapping.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn keep_from_children(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Advise)?;
    // SAFETY: the caller owns the range; in this process the mapping does not change.
    Errno::result(unsafe { libc::madvise(address as *mut _, len, libc::MADV_DONTFORK) }).map(drop)
}

/// `madvise(address, size, MADV_POPULATE_READ)` (Linux 5.14): brings in the pages as an access would, by the rules of the
/// mapping and of this thread: where they lie (`mbind(2)`, `man 2 set_mempolicy`), and how large they are
/// (`MADV_HUGEPAGE`). It changes no contents.
pub(crate) fn populate(memory: Shareable) -> Result<()> {
    let Shareable { address, size } = memory;
    // SAFETY: the kernel reads in what is mapped there, as any load may, and changes no mapping.
    Errno::result(unsafe { libc::madvise(address as *mut _, size, libc::MADV_POPULATE_READ) })
        .map(drop)
}

/// `madvise(address, len, MADV_HUGEPAGE)`: if transparent huge pages are set to `madvise`, Linux 6.12 and
/// newer map a BAR by 2 MiB and 1 GiB entries only after this call.
///
/// # Safety
/// The range is ours.
pub(crate) unsafe fn prefer_huge_pages(address: usize, len: usize) -> Result<()> {
    spy::call(Call::Advise)?;
    // SAFETY: the caller owns the range; the advice changes how faults are handled, not what is mapped.
    Errno::result(unsafe { libc::madvise(address as *mut _, len, libc::MADV_HUGEPAGE) }).map(drop)
}

/// `mremap(2)` with all five arguments. The C wrapper is variadic: if the fifth argument is not passed, the
/// kernel gets an arbitrary value, which it may reject.
///
/// # Safety
/// The `old_len` bytes at `old` are ours; with `MREMAP_FIXED` so are the `len` bytes at `new`.
unsafe fn mremap(
    old: usize,
    old_len: usize,
    len: usize,
    flags: libc::c_int,
    new: usize,
) -> Result<usize> {
    // SAFETY: the caller owns both ranges.
    let at = unsafe {
        libc::mremap(
            old as *mut _,
            old_len,
            len,
            libc::MREMAP_MAYMOVE | flags,
            ptr::without_provenance_mut::<libc::c_void>(new),
        )
    };
    if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(at as usize) }
}

/// `mremap(old, len, len, MREMAP_MAYMOVE|MREMAP_DONTUNMAP, NULL)` (Linux 5.7): moves the page tables to a
/// range that the kernel chooses. The old mapping stays, with empty page tables, and faults fill them
/// again.
///
/// # Safety
/// The old range is one mapping of ours, and its backing serves faults in it again.
pub(crate) unsafe fn dont_unmap(_: &MmapLock, old: usize, len: usize) -> Result<usize> {
    spy::call(Call::DontUnmap)?;
    // SAFETY: the caller owns the old range; no MREMAP_FIXED.
    unsafe { mremap(old, len, len, libc::MREMAP_DONTUNMAP, 0) }
}

/// As [`dont_unmap`], to `new` (`MREMAP_FIXED`). Up to Linux 6.16 a failing call has already unmapped the
/// destination. The caller then reserves it again.
///
/// # Safety
/// As [`dont_unmap`], and the new range is ours and unused.
pub(crate) unsafe fn dont_unmap_fixed(
    _: &MmapLock,
    old: usize,
    len: usize,
    new: usize,
) -> Result<()> {
    spy::call(Call::DontUnmapFixed { address: new, len })?;
    // SAFETY: the caller owns both ranges.
    unsafe { mremap(old, len, len, libc::MREMAP_DONTUNMAP | libc::MREMAP_FIXED, new) }.map(drop)
}

/// `mremap(old, 0, len, MREMAP_MAYMOVE, NULL)`: makes a second mapping of the same bytes, at an address that
/// the kernel chooses (`man 2 mremap`, on an `old_size` of zero). The old mapping does not change; the new
/// one has its protection and its flags, such as `VM_DONTCOPY`, and empty page tables.
///
/// Nothing is unmapped, so the call has no condition of safety, even if nothing of ours is mapped at `old`.
pub(crate) fn old_len_zero(_: &MmapLock, old: usize, len: usize) -> Result<usize> {
    spy::call(Call::OldLenZero)?;
    // SAFETY: an old range of no bytes; no MREMAP_FIXED.
    unsafe { mremap(old, 0, len, 0, 0) }
}

/// As [`old_len_zero`], to `new` (`MREMAP_FIXED`). Up to Linux 6.16 a failing call has already unmapped the
/// destination. The caller then reserves it again.
///
/// # Safety
/// The new range is ours and unused.
pub(crate) unsafe fn old_len_zero_fixed(
    _: &MmapLock,
    old: usize,
    len: usize,
    new: usize,
) -> Result<()> {
    spy::call(Call::OldLenZeroFixed { address: new, len })?;
    // SAFETY: an old range of no bytes; the caller owns the new one.
    unsafe { mremap(old, 0, len, libc::MREMAP_FIXED, new) }.map(drop)
}

/// `mremap(old, len, len, MREMAP_MAYMOVE|MREMAP_FIXED, new)`: moves the mapping to `new` and leaves a
/// hole. A failing call may already have unmapped the destination.
///
/// # Safety
/// Both ranges are ours; nothing reads or writes through either.
pub(crate) unsafe fn move_fixed(_: &MmapLock, old: usize, len: usize, new: usize) -> Result<()> {
    spy::call(Call::MoveFixed { address: new, len })?;
    // SAFETY: the caller owns both ranges.
    unsafe { mremap(old, len, len, libc::MREMAP_FIXED, new) }.map(drop)
}
