//! Helpers for the tests of `space`.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Access, Backing, BackingKind, Mapping, Placement, Reservation};
use crate::sys::{file, maps};

pub(super) const PAGE: usize = 4096;
pub(super) const MIB: usize = 1 << 20;

pub(super) fn backing(size: usize, kind: BackingKind) -> Backing {
    let fd = file::memory_file("vfio-remap-test", size as u64).unwrap();
    Backing::new("bar 0 of test", Arc::new(fd), 0, size as u64, kind).unwrap()
}

pub(super) fn map(backing: &Arc<Backing>, len: usize) -> Mapping {
    Mapping::new(backing.clone(), 0, len, Access::ReadWrite, Placement::Anywhere).unwrap()
}

pub(super) fn shared(len: usize) -> Mapping {
    map(&Arc::new(backing(len, BackingKind::SharedMemory)), len)
}

pub(super) fn read(mapping: &Mapping, offset: usize) -> u32 {
    // SAFETY: the mapping is alive and at least a page long.
    unsafe { ((mapping.range().start + offset) as *const u32).read_volatile() }
}

pub(super) fn write(mapping: &Mapping, offset: usize, value: u32) {
    // SAFETY: as above.
    unsafe { ((mapping.range().start + offset) as *mut u32).write_volatile(value) }
}

/// How many bytes of the range are mapped accessibly, and how many are reserved.
pub(super) fn state(range: &Range<usize>) -> (usize, usize) {
    let (mut accessible, mut reserved) = (0, 0);
    for mapped in maps::overlapping(range) {
        let len = mapped.range.end.min(range.end) - mapped.range.start.max(range.start);
        if mapped.inaccessible {
            reserved += len;
        } else {
            accessible += len;
        }
    }
    (accessible, reserved)
}

/// A reservation far below the addresses that the kernel chooses: concurrent tests do not get the hole
/// that a test makes there.
pub(super) fn secluded(len: usize) -> Reservation {
    static NEXT: AtomicUsize = AtomicUsize::new(0x10_0000_0000);
    let step = len.next_multiple_of(2 * MIB);
    Reservation::at(NEXT.fetch_add(step, Ordering::Relaxed), len).unwrap()
}

/// Unmaps the range, as a failing FIXED call does, and then maps `file` or anonymous memory there, as other
/// code of the process may do.
///
/// # Safety
/// The range is the caller's to replace.
pub(super) unsafe fn unmap_and_let_in(range: Range<usize>, file: Option<BorrowedFd<'_>>) {
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    let (flags, fd) = match &file {
        Some(file) => (fixed, file.as_fd().as_raw_fd()),
        None => (fixed | libc::MAP_ANONYMOUS, -1),
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: by the contract the caller may replace the range.
    let at = unsafe {
        assert_eq!(libc::munmap(range.start as *mut _, range.len()), 0);
        libc::mmap64(range.start as *mut _, range.len(), prot, flags, fd, 0)
    };
    assert_eq!(at as usize, range.start, "{}", std::io::Error::last_os_error());
}
