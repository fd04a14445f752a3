//! System calls on bare addresses, and single accesses there.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

pub use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED};
pub use libc::{MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE};
use libc::{PROT_NONE, PROT_READ, PROT_WRITE};

pub const PAGE: usize = 4096;
pub const GIB: usize = 1 << 30;

fn answer(address: *mut libc::c_void) -> Result<usize> {
    if address == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(address as usize) }
}

/// `mmap(address, len, PROT_READ|PROT_WRITE, flags, fd, offset)`
///
/// # Safety
/// With `MAP_FIXED`, the range is the caller's.
pub unsafe fn map_file(
    address: usize,
    len: usize,
    flags: i32,
    fd: BorrowedFd<'_>,
    offset: u64,
) -> Result<usize> {
    let prot = PROT_READ | PROT_WRITE;
    // SAFETY: the caller vouches for a fixed range; elsewhere the kernel finds a free one.
    answer(unsafe {
        libc::mmap64(address as *mut _, len, prot, flags, fd.as_raw_fd(), offset as i64)
    })
}

/// Anonymous memory somewhere.
pub fn map_memory(len: usize) -> usize {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: no MAP_FIXED.
    answer(unsafe { libc::mmap64(std::ptr::null_mut(), len, PROT_READ | PROT_WRITE, flags, -1, 0) })
        .unwrap()
}

/// Anonymous memory in place of whatever is there.
///
/// # Safety
/// The range is the caller's.
pub unsafe fn cover_with_memory(address: usize, len: usize) {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    // SAFETY: the caller vouches for the range.
    let at = unsafe { libc::mmap64(address as *mut _, len, PROT_READ | PROT_WRITE, flags, -1, 0) };
    assert_eq!(answer(at).unwrap(), address);
}

/// Address space that reaches nothing, in place of whatever is there.
///
/// # Safety
/// The range is the caller's.
pub unsafe fn reserve_fixed(address: usize, len: usize) {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    // SAFETY: the caller vouches for the range.
    let at = unsafe { libc::mmap64(address as *mut _, len, PROT_NONE, flags, -1, 0) };
    assert_eq!(answer(at).unwrap(), address);
}

/// Address space of `len` bytes that reaches nothing, from a multiple of `align` on.
pub fn reserve(len: usize, align: usize) -> usize {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: no MAP_FIXED.
    let at =
        answer(unsafe { libc::mmap64(std::ptr::null_mut(), len + align, PROT_NONE, flags, -1, 0) });
    let at = at.unwrap();
    let place = at.next_multiple_of(align);
    // What is left on both sides is given back.
    for (start, end) in [(at, place), (place + len, at + len + align)] {
        if start < end {
            // SAFETY: it was reserved above, and nobody knows of it.
            unsafe { munmap(start, end - start) };
        }
    }
    place
}

/// `mremap(old, len, len, flags, new)`. All five arguments, always: the C function is variadic, and
/// a new address out of thin air is refused, too.
///
/// # Safety
/// The old range is the caller's, and with `MREMAP_FIXED` so is the new one.
pub unsafe fn mremap(old: usize, len: usize, flags: i32, new: usize) -> Result<usize> {
    // SAFETY: the caller vouches for the ranges.
    answer(unsafe { libc::mremap(old as *mut _, len, len, flags, new as *mut libc::c_void) })
}

/// `mremap(old, 0, len, flags, new)`: a second mapping of what is at `old`.
///
/// # Safety
/// With `MREMAP_FIXED`, the new range is the caller's.
pub unsafe fn duplicate(old: usize, len: usize, flags: i32, new: usize) -> Result<usize> {
    // SAFETY: the old range does not change, and the caller vouches for the new one.
    answer(unsafe { libc::mremap(old as *mut _, 0, len, flags, new as *mut libc::c_void) })
}

/// `munmap(address, len)`
///
/// # Safety
/// The range is the caller's.
pub unsafe fn munmap(address: usize, len: usize) {
    // SAFETY: the caller vouches for the range.
    let done = unsafe { libc::munmap(address as *mut _, len) };
    assert_eq!(done, 0, "{}", Error::last_os_error());
}

/// One load by this program itself, through its own TLB.
///
/// # Safety
/// Something readable is mapped there.
pub unsafe fn peek(address: usize) -> u32 {
    // SAFETY: the caller vouches for it; the address is aligned.
    unsafe { (address as *const u32).read_volatile() }
}

/// One store.
///
/// # Safety
/// Something is mapped there that may be written.
pub unsafe fn poke(address: usize, value: u32) {
    // SAFETY: the caller vouches for it; the address is aligned.
    unsafe { (address as *mut u32).write_volatile(value) }
}
