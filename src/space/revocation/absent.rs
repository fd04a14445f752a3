//! What a revoked window shows: the all-ones of a device that does not answer.
//!
//! The pages are private ones of a single memfd that is filled with 0xFF before a window needs it, because a
//! signal handler cannot fill it. A store makes a copy of its page, which nothing else sees.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

use nix::errno::Errno;

use crate::sys::async_safe::{self, Private};
use crate::sys::mm::Access;
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{self, file};

/// 64 MiB.
const DEFAULT_LIMIT: usize = 64 << 20;

static LIMIT: AtomicUsize = AtomicUsize::new(DEFAULT_LIMIT);
/// The file, for a signal handler; -1 before there is one.
static FD: AtomicI32 = AtomicI32::new(-1);
/// How many bytes of the file are filled. They only become more.
static READY: AtomicUsize = AtomicUsize::new(0);
/// Whether private mappings count as committed memory although they are MAP_NORESERVE.
static COMMITS: AtomicBool = AtomicBool::new(false);

/// The size in bytes up to which a revoked window reads all ones: 64 MiB unless
/// [`set_revocable_size`] has changed it.
pub fn revocable_size() -> usize {
    LIMIT.load(Ordering::Relaxed)
}

/// Sets the [size up to which a revoked window reads all ones](revocable_size), for windows that are mapped
/// from now on. A larger window reads zeros when it is revoked.
///
/// The crate keeps as much memory as the largest window up to this size has, once for the process, from the
/// time at which that window is mapped. Memory that it has is not given back.
pub fn set_revocable_size(size: usize) {
    LIMIT.store(size, Ordering::Relaxed);
}

/// Fills the file so that a window of `size` bytes can be revoked to all ones, unless that is more than the
/// limit. Whether it can is [`reads_ones`].
pub(super) fn prepare(size: usize) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| COMMITS.store(commits_private_mappings(), Ordering::Relaxed));
    if reads_ones(size) || size > revocable_size() {
        return;
    }
    let lock = MmapLock::take();
    if let Err(error) = fill(&lock, size) {
        log::warn!("windows of {size:#x} bytes and more read zeros when they are revoked: {error}");
    }
}

/// Whether a window of `size` bytes reads all ones when it is revoked. If so, it stays so.
pub(super) fn reads_ones(size: usize) -> bool {
    size <= READY.load(Ordering::Acquire)
}

/// The lock serializes threads, and is free in children of `fork(2)`.
fn fill(_: &MmapLock, size: usize) -> Result<(), std::io::Error> {
    static FILE: OnceLock<File> = OnceLock::new();
    let file = match FILE.get() {
        Some(file) => file,
        None => {
            let fd: OwnedFd = file::memory_file("vfio-remap-revoked", 0)?;
            FILE.get_or_init(|| File::from(fd))
        }
    };
    const CHUNK: usize = 1 << 16;
    let ones = vec![0xff; CHUNK.min(size)];
    // Written, not truncated to a size: a child of `fork(2)` has the same file, and may have filled more.
    let mut at = READY.load(Ordering::Relaxed);
    while at < size {
        let len = ones.len().min(size - at);
        file.write_all_at(&ones[..len], at as u64)?;
        at += len;
    }
    FD.store(file.as_raw_fd(), Ordering::Relaxed);
    READY.fetch_max(size, Ordering::Release);
    Ok(())
}

/// Whether `vm.overcommit_memory` is 2: the kernel then ignores `MAP_NORESERVE` (`man 5 proc`).
fn commits_private_mappings() -> bool {
    let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
    mode.is_ok_and(|mode| mode.trim() == "2")
}

fn pages(size: usize) -> Private {
    if reads_ones(size) { Private::File(FD.load(Ordering::Relaxed)) } else { Private::Anonymous }
}

/// The device and inode number of what a revoked window of `size` bytes maps; `None` for anonymous memory.
pub(super) fn identity(size: usize) -> Option<(u64, u64)> {
    match pages(size) {
        Private::File(fd) => {
            // SAFETY: the file is never closed.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            sys::file::identity(fd).ok()
        }
        Private::Anonymous => None,
    }
}

/// Replaces a window by these pages. If that fails, the window is what it was, unless the kernel ran out of
/// memory for its own tables on Linux 6.11 or older: then it may be a hole, which [`fill_gap`] fills.
///
/// It may run in a signal handler.
///
/// # Safety
/// The range is a window's, and the caller keeps it from being unmapped or given to another.
pub(super) unsafe fn replace(address: usize, size: usize, access: Access) -> Result<(), Errno> {
    let with = pages(size);
    let call = || {
        // SAFETY: by the contract the range is a window's. Registers access it by single instructions, and
        // expect any value.
        unsafe {
            // If the pages count as committed memory, the kernel may refuse after it has unmapped the range.
            if COMMITS.load(Ordering::Relaxed) {
                async_safe::replace_by_move(address, size, access, with)
            } else {
                async_safe::replace(address, size, access, with)
            }
        }
    };
    match call() {
        // After mlockall(MCL_FUTURE) both the window and these pages count as locked memory.
        Err(Errno::EAGAIN) => {
            // SAFETY: the range is a window's.
            unsafe { async_safe::munlock(address, size) }?;
            call()?;
            // SAFETY: as above.
            let _ = unsafe { async_safe::munlock(address, size) };
        }
        result => result?,
    }
    // A child that inherits the pages in between finds ones there, and must not access the range anyway.
    // SAFETY: as above.
    let _ = unsafe { async_safe::keep_from_children(address, size) };
    Ok(())
}

/// As [`replace`], if the range is a hole: true if it was one and now has the pages.
pub(super) fn fill_gap(address: usize, size: usize, access: Access) -> bool {
    let filled = async_safe::fill_gap(address, size, access, pages(size)).is_ok();
    if filled {
        // SAFETY: the range was mapped above.
        let _ = unsafe { async_safe::keep_from_children(address, size) };
    }
    filled
}

/// Behaves as if the kernel counted the pages as committed memory.
#[cfg(test)]
pub(super) fn count_as_committed() {
    COMMITS.store(true, Ordering::Relaxed);
}
