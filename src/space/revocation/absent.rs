//! What a revoked window shows: the all-ones of a device that does not answer.
//!
//! The pages are private ones of a memfd that is filled with 0xFF before a window needs it, because a signal handler
//! cannot fill it. There is one for each power of two that a window has needed. It never changes and is never
//! closed, so what a window shows is fixed when the window is mapped. A store makes a copy of its page, which nothing
//! else sees.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use crate::space::KernelVersion;
use crate::sys::async_safe::{self, Private};
use crate::sys::mm::Access;
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{file, maps};

/// 64 MiB.
const DEFAULT_LIMIT: usize = 64 << 20;

static LIMIT: AtomicUsize = AtomicUsize::new(DEFAULT_LIMIT);
/// The file of 2^`k` bytes; -1 before there is one.
static FILES: [AtomicI32; 64] = [const { AtomicI32::new(-1) }; 64];
/// Whether pages are made elsewhere and moved over a window: see [`replace`].
static BY_MOVE: AtomicBool = AtomicBool::new(true);

/// The size in bytes up to which a revoked window reads all ones: 64 MiB unless
/// [`set_revocable_size`] has changed it.
pub fn revocable_size() -> usize {
    LIMIT.load(Ordering::Relaxed)
}

/// Sets the [size up to which a revoked window reads all ones](revocable_size), for windows that are mapped
/// from now on. A larger window reads zeros when it is revoked.
///
/// The crate keeps as much memory as the largest window up to this size has, rounded up to a power of two, once for
/// the process, from the time at which that window is mapped. If smaller windows were mapped before, it keeps up to
/// as much again. Memory that it has is not given back.
pub fn set_revocable_size(size: usize) {
    LIMIT.store(size, Ordering::Relaxed);
}

/// Whether pages are made elsewhere and moved over a window, so that replacing a window takes more than the window
/// itself: see [`replace`].
pub(super) fn moves_pages() -> bool {
    BY_MOVE.load(Ordering::Relaxed)
}

/// The pages that a window shows when it is revoked: zeros, or the file of 2^`n` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages(u8);

impl Pages {
    /// How many bits it has.
    pub(super) const BITS: u32 = 6;

    /// Those that are there for a window of `size` bytes.
    pub(super) fn of(size: usize) -> Self {
        let is_there = |class: &u8| FILES[usize::from(*class)].load(Ordering::Acquire) >= 0;
        Self((class_of(size)..64).find(is_there).unwrap_or(0))
    }

    pub(super) fn are_ones(self) -> bool {
        self.0 != 0
    }

    pub(super) fn bits(self) -> usize {
        usize::from(self.0)
    }

    pub(super) fn from_bits(bits: usize) -> Self {
        Self((bits & 63) as u8)
    }

    fn file(self) -> Option<i32> {
        self.are_ones().then(|| FILES[usize::from(self.0)].load(Ordering::Acquire))
    }

    fn private(self) -> Private {
        self.file().map_or(Private::Anonymous, Private::File)
    }

    /// The device and inode number of the file; `None` for anonymous memory.
    pub(super) fn identity(self) -> Option<(u64, u64)> {
        // SAFETY: the file is never closed.
        self.file().and_then(|fd| file::identity(unsafe { BorrowedFd::borrow_raw(fd) }).ok())
    }

    /// As [`identity`](Self::identity), in `/proc/self/maps`.
    pub(super) fn in_maps(self) -> (u64, u64) {
        self.identity().unwrap_or(maps::ANONYMOUS)
    }
}

/// The logarithm of a size that is rounded up to a power of two.
fn class_of(size: usize) -> u8 {
    size.next_power_of_two().trailing_zeros().clamp(1, 63) as u8
}

/// Makes the pages for a window of `size` bytes, unless that is more than the limit.
pub(super) fn prepare(size: usize) {
    if KernelVersion::running() >= KernelVersion::new(6, 12) && !tests_move() {
        BY_MOVE.store(false, Ordering::Relaxed);
    }
    if Pages::of(size).are_ones() || size > revocable_size() {
        return;
    }
    let lock = MmapLock::take();
    if let Err(error) = fill(&lock, class_of(size)) {
        log::warn!("windows of {size:#x} bytes and more read zeros when they are revoked: {error}");
    }
}

/// The lock serializes threads.
fn fill(_: &MmapLock, class: u8) -> io::Result<()> {
    const CHUNK: usize = 1 << 16;
    let size = 1usize << class;
    let place = &FILES[usize::from(class)];
    if place.load(Ordering::Relaxed) >= 0 {
        return Ok(());
    }
    // Beyond it, a write raises SIGXFSZ, which ends the process.
    let (most, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if (size as u64) > most {
        return Err(io::Error::other(format!(
            "{size:#x} bytes are needed, and files may have {most:#x} (RLIMIT_FSIZE)"
        )));
    }
    let file = file::constant_memory("vfio-remap-revoked", |file| {
        let ones = vec![0xff; CHUNK.min(size)];
        (0..size / ones.len()).try_for_each(|_| file.write_all(&ones))
    })?;
    place.store(file.into_raw_fd(), Ordering::Release);
    Ok(())
}

/// Why a window was not replaced.
#[derive(Debug)]
pub(super) struct Refused {
    pub errno: Errno,
    pub left: Left,
}

/// What a call that failed has left in the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// What was there.
    Untouched,
    /// What was there, unless it was a hole for an instant, in which another thread has mapped something.
    Unknown,
    /// Inaccessible memory: it was a hole.
    Plugged,
    /// A hole, or part of one.
    Hole,
}

/// Replaces a window by these pages. If that fails, the window is what it was, as far as the kernel allows.
///
/// From Linux 6.12 on, `mmap` checks all limits before it unmaps what it replaces, and keeps that if it fails later.
/// An older one refuses a limit on committed memory afterwards, so there the pages are made elsewhere and moved. Then
/// it fails with the window unmapped only if it has no memory for its own tables.
///
/// The pages lack MADV_DONTFORK, which would take a seventh of the time. It is left to whoever needs it:
/// [before a fork](super::keep_revoked_from_children), and before a call that may fail and leave something else there,
/// from which that flag tells the pages.
///
/// It may run in a signal handler.
///
/// # Safety
/// The range is a window's, and the caller keeps it from being unmapped or given to another.
pub(super) unsafe fn replace(
    address: usize,
    size: usize,
    access: Access,
    pages: Pages,
) -> Result<(), Refused> {
    // SAFETY: by the contract.
    let mut result = unsafe { put(address, size, access, pages) };
    if let Err(Refused { errno: Errno::EAGAIN, left: Left::Untouched }) = result {
        // After mlockall(MCL_FUTURE) both the window and these pages count as locked memory.
        // SAFETY: the range is a window's.
        unsafe {
            if async_safe::munlock(address, size).is_ok() {
                result = put(address, size, access, pages);
            }
            if result.is_ok() {
                let _ = async_safe::munlock(address, size);
            }
        }
    }
    match result {
        Ok(()) => {}
        Err(refused) => match fill_gap(address, size, access, pages) {
            Ok(()) => {}
            Err(Left::Untouched) => return Err(refused),
            Err(left) => return Err(Refused { left, ..refused }),
        },
    }
    Ok(())
}

/// # Safety
/// As [`replace`].
unsafe fn put(address: usize, size: usize, access: Access, pages: Pages) -> Result<(), Refused> {
    let untouched = |errno| Refused { errno, left: Left::Untouched };
    let with = pages.private();
    if !moves_pages() {
        // SAFETY: by the contract the range is a window's. Registers access it by single instructions, and
        // expect any value.
        return unsafe { async_safe::replace(address, size, access, with) }.map_err(untouched);
    }
    let new = async_safe::map_elsewhere(size, access, with).map_err(untouched)?;
    // SAFETY: the mapping was made above; as above for the range.
    unsafe { async_safe::move_over(new, size, address) }.map_err(|errno| {
        // SAFETY: the mapping was made above, and nothing else has its address.
        let _ = unsafe { async_safe::unmap(new, size) };
        Refused { errno, left: Left::Unknown }
    })
}

/// After a call that failed and may have unmapped the range: fills it with the pages if it is a hole. Otherwise says
/// what it is: [`Left::Untouched`] if something is mapped there.
pub(super) fn fill_gap(
    address: usize,
    size: usize,
    access: Access,
    pages: Pages,
) -> Result<(), Left> {
    match async_safe::fill_gap(address, size, access, pages.private()) {
        Ok(()) => return Ok(()),
        Err(Errno::EEXIST) => {}
        Err(_) => {
            if async_safe::plug_gap(address, size).is_ok() {
                return Err(Left::Plugged);
            }
        }
    }
    let has_no_hole = async_safe::has_no_hole(address, size);
    Err(if has_no_hole { Left::Untouched } else { Left::Hole })
}

#[cfg(not(test))]
fn tests_move() -> bool {
    false
}

#[cfg(test)]
use in_tests::tests_move;
#[cfg(test)]
pub(super) use in_tests::{always_move, file_of};

#[cfg(test)]
mod in_tests {
    use super::*;

    static MOVE: AtomicBool = AtomicBool::new(false);

    pub(super) fn tests_move() -> bool {
        MOVE.load(Ordering::Relaxed)
    }

    /// Moves pages over windows, as on an old kernel, in this process.
    pub(crate) fn always_move() {
        MOVE.store(true, Ordering::Relaxed);
        BY_MOVE.store(true, Ordering::Relaxed);
    }

    /// The file that a revoked window of `size` bytes shows.
    pub(crate) fn file_of(size: usize) -> Option<BorrowedFd<'static>> {
        // SAFETY: the file is never closed.
        Pages::of(size).file().map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }
}
