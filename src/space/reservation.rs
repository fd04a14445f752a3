//! Reserved address space: nothing else in the process can be mapped into it.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

mod pool;

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Failed;
use super::limits::out_of_memory;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{self, fork, maps, mm};

pub use pool::ReservationPool;

/// A range of addresses that belongs to its holder. It is reserved (`PROT_NONE`) and reaches nothing.
///
/// [`Placement::In`](super::Placement::In) places a window in a reservation. Pieces of a split
/// reservation may be dropped in any order. The addresses are unmapped when the last piece, and the last
/// window placed in one, is dropped. Until then a dropped piece stays reserved, so that the whole never
/// has a hole.
#[must_use = "dropping it frees the addresses"]
pub struct Reservation {
    area: Arc<Area>,
    start: usize,
    size: usize,
}

/// A range that was reserved by one call.
struct Area {
    range: Range<usize>,
    /// An address plus this (wrapping) is its offset in the marker file.
    bias: u64,
    /// The process that reserved it: see [`fork::generation`].
    generation: u32,
    /// Ranges that other code may have taken after a failing system call unmapped them.
    lost: Mutex<Vec<Range<usize>>>,
}

impl Area {
    fn new(start: usize, size: usize, offset: u64) -> Self {
        let bias = offset.wrapping_sub(start as u64);
        let generation = fork::generation();
        Self { range: start..start + size, bias, generation, lost: Mutex::default() }
    }

    fn offset_of(&self, address: usize) -> u64 {
        self.bias.wrapping_add(address as u64)
    }
}

impl Area {
    /// Gives up a range: it is never unmapped.
    fn lose(&self, range: Range<usize>) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).push(range);
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        let lost = self.lost.get_mut().unwrap_or_else(PoisonError::into_inner);
        lost.sort_by_key(|range| range.start);
        let mut start = self.range.start;
        let end = self.range.end;
        for hole in lost.iter().cloned().chain([end..end]) {
            if start < hole.start {
                // SAFETY: the area is ours and its last holder is dropped, so nothing uses the range. Lost
                // ranges are left out.
                unsafe { unmap_or_leak(&(start..hole.start)) };
            }
            start = start.max(hole.end);
        }
    }
}

/// A mapping that could not be covered.
pub(super) struct CoverFailed {
    pub errno: Errno,
    /// Whether it is known to be still mapped.
    pub intact: bool,
}

/// The file that reservations map inaccessibly, each from offset 0 on.
///
/// The file distinguishes reservations from other mappings; anonymous memory would not. A failing FIXED
/// call unmaps the destination up to Linux 6.16, and mostly does not on later kernels. `/proc/self/maps`
/// then shows whether the reservation is still there: other code does not have the file, and no other
/// reservation is made while the [`MmapLock`] is held. The name of the file also explains the ranges to
/// people who read that list.
fn marker() -> Result<&'static OwnedFd> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file);
    }
    let file = sys::file::memory_file("vfio-remap-reserved", 0)
        .map_err(|errno| Error::os(errno, "create", "the memfd that marks reservations"))?;
    Ok(FILE.get_or_init(|| file))
}

/// Larger than any address space, and small enough that the sum of two does not overflow.
const MAX_SIZE: usize = 1 << 52;

fn show(range: &Range<usize>) -> String {
    format!("addresses {:#x}..{:#x}", range.start, range.end)
}

/// Rounds `size` up to whole pages. Fails if it is zero or too large.
fn pages(size: usize) -> Result<usize> {
    if size == 0 {
        return Err(Error::new(ErrorKind::OutOfRange, "reserve", "0 bytes")
            .with_reason("there is nothing to reserve")
            .with_advice("reserve one page or more"));
    }
    let size_in_pages = size.checked_next_multiple_of(sys::page_size());
    size_in_pages.filter(|size| *size <= MAX_SIZE).ok_or_else(|| no_such_space(size))
}

fn no_such_space(size: usize) -> Error {
    Error::new(ErrorKind::OutOfRange, "reserve", format!("{size:#x} bytes"))
        .with_reason("the address space is smaller than that")
        .with_advice("reserve less, or map parts as separate windows")
}

impl Reservation {
    /// Reserves `size` bytes, rounded up to whole pages, at an address that the kernel chooses.
    ///
    /// # Errors
    /// `OutOfRange` if `size` is zero or larger than an address space; `TooManyMappings`, `AddressSpace`
    /// or `LockedMemory` if a limit of the process is reached; `Os` with ENOMEM.
    pub fn new(size: usize) -> Result<Self> {
        Self::congruent(size, sys::page_size(), 0)
    }

    /// Reserves `size` bytes at a multiple of `alignment`, a power of two of at least a page.
    ///
    /// # Errors
    /// As [`new`](Self::new); `Unaligned` if `alignment` is not such a power of two.
    pub fn aligned(size: usize, alignment: usize) -> Result<Self> {
        Self::congruent(size, alignment, 0)
    }

    /// Reserves `size` bytes at an address that is congruent to `offset` modulo `modulus`. With a modulus
    /// of 2 MiB or 1 GiB and the offset of a window in its region, the kernel maps a window placed there
    /// by huge page-table entries (Linux 6.12 and newer).
    ///
    /// # Errors
    /// As [`aligned`](Self::aligned); `Unaligned` if `offset` is not a multiple of the page size.
    pub fn congruent(size: usize, modulus: usize, offset: u64) -> Result<Self> {
        let page = sys::page_size();
        let size = pages(size)?;
        if !modulus.is_power_of_two() || modulus < page {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", format!("{size:#x} bytes"))
                .with_reason(format!("{modulus:#x} is not a power of two of at least a page"))
                .with_advice(format!(
                    "align to {page:#x}, 2 MiB (0x200000) or 1 GiB (0x40000000)"
                )));
        }
        let want = (offset % modulus as u64) as usize;
        if !want.is_multiple_of(page) {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", format!("{size:#x} bytes"))
                .with_reason(format!("offset {offset:#x} is not a multiple of the page size"))
                .with_advice(format!("round it down to a multiple of {page:#x}")));
        }
        let room = size.checked_add(modulus - page).filter(|room| *room <= MAX_SIZE);
        let room = room.ok_or_else(|| no_such_space(size))?;
        let file = marker()?.as_fd();
        let lock = MmapLock::take();
        let failed = |errno| out_of_memory(errno, "reserve", format!("{size:#x} bytes"), size);
        let at = match mm::reserve(&lock, file, 0, room) {
            Ok(at) => at,
            Err(errno) if room == size => return Err(failed(errno)),
            // The size without room to align may still be below a limit.
            Err(errno) => {
                let start = search(&lock, file, size, modulus, want).map_err(|_| failed(errno))?;
                return Ok(Self::of(Area::new(start, size, 0)));
            }
        };
        let start = at + (want.wrapping_sub(at) & (modulus - 1));
        let end = at + room;
        for surplus in [at..start, start + size..end] {
            if !surplus.is_empty() {
                // SAFETY: the range was reserved above, and nothing else has its address.
                unsafe { unmap_or_leak(&surplus) };
            }
        }
        Ok(Self::of(Area::new(start, size, (start - at) as u64)))
    }

    /// Reserves `size` bytes, rounded up to whole pages, at `address`, if nothing is mapped there
    /// (`MAP_FIXED_NOREPLACE`, Linux 4.17).
    ///
    /// # Errors
    /// `AddressTaken` if something is mapped there, which the error names, or if the main thread's stack
    /// may grow into the range; `Unaligned` if `address` is not a multiple of the page size; `OutOfRange`
    /// if the range wraps around, is empty, or begins at 0, which only root may map.
    pub fn at(address: usize, size: usize) -> Result<Self> {
        let size = pages(size)?;
        let object = format!("{size:#x} bytes at {address:#x}");
        if !address.is_multiple_of(sys::page_size()) {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", object)
                .with_reason("the address is not a multiple of the page size")
                .with_advice(format!("choose a multiple of {:#x}", sys::page_size())));
        }
        let end = address.checked_add(size).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "reserve", &object)
                .with_reason("the range wraps around")
                .with_advice("choose a lower address, or Placement::Anywhere")
        })?;
        if address == 0 {
            return Err(Error::new(ErrorKind::OutOfRange, "reserve", object)
                .with_reason("a null pointer would reach what is mapped there")
                .with_advice("choose another address, or Placement::Anywhere"));
        }
        if stack_may_grow_into(&(address..end)) {
            return Err(Error::new(ErrorKind::AddressTaken, "reserve", object)
                .with_reason("the stack of the main thread may grow into it")
                .with_advice("choose another address, or Placement::Anywhere"));
        }
        let file = marker()?;
        let reserved = mm::reserve_at(&MmapLock::take(), address, file.as_fd(), 0, size);
        match reserved {
            Ok(()) => Ok(Self::of(Area::new(address, size, 0))),
            Err(Errno::EEXIST) => {
                let error = Error::new(ErrorKind::AddressTaken, "reserve", object);
                Err(match maps::overlapping(&(address..end)).first() {
                    Some(taken) if taken.name.is_empty() => error.with_reason(format!(
                        "anonymous memory is mapped at {:#x}..{:#x}",
                        taken.range.start, taken.range.end
                    )),
                    Some(taken) => error.with_reason(format!(
                        "{} is mapped at {:#x}..{:#x}",
                        taken.name, taken.range.start, taken.range.end
                    )),
                    None => error.with_reason("another mapping is there"),
                }
                .with_advice("choose another address, or Placement::Anywhere"))
            }
            Err(errno) => Err(out_of_memory(errno, "reserve", object, size)),
        }
    }

    /// The first address.
    pub fn address(&self) -> usize {
        self.start
    }

    /// The size in bytes, a multiple of the page size.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The addresses.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.size
    }

    /// Splits it into two pieces. The first has `size` bytes.
    ///
    /// # Errors
    /// `Unaligned` if `size` is not a multiple of the page size, `OutOfRange` if a piece would
    /// be empty. The failure gives the reservation back.
    pub fn split_at(self, size: usize) -> std::result::Result<(Self, Self), Failed> {
        let object = show(&self.range());
        let kind = if !size.is_multiple_of(sys::page_size()) {
            ErrorKind::Unaligned
        } else if size == 0 || size >= self.size {
            ErrorKind::OutOfRange
        } else {
            let Self { area, start, size: whole } = self;
            let second = Self { area: area.clone(), start: start + size, size: whole - size };
            return Ok((Self { area, start, size }, second));
        };
        let error = Error::new(kind, "split", object)
            .with_reason(format!("it cannot be split at {size:#x} bytes"))
            .with_advice(format!("split at a multiple of {:#x} inside it", sys::page_size()));
        Err(Failed::new(error, Some(self)))
    }

    /// Joins two pieces of one reservation. `next` must begin at the end of this one.
    ///
    /// # Errors
    /// Returns both pieces if they are not adjacent, or are pieces of different reservations.
    pub fn join(self, next: Self) -> std::result::Result<Self, (Self, Self)> {
        if Arc::ptr_eq(&self.area, &next.area) && self.start + self.size == next.start {
            Ok(Self { area: self.area, start: self.start, size: self.size + next.size })
        } else {
            Err((self, next))
        }
    }

    fn of(area: Area) -> Self {
        let Range { start, end } = area.range;
        Self { area: Arc::new(area), start, size: end - start }
    }

    /// Whether dropping this piece unmaps the addresses: no other piece of the same area exists, no
    /// window is placed in one, and this process reserved the area.
    pub(super) fn is_whole_area(&mut self) -> bool {
        Arc::get_mut(&mut self.area).is_some_and(|area| {
            area.generation == fork::generation()
                && area.range == (self.start..self.start + self.size)
        })
    }

    /// Makes the first `size` bytes inaccessible in one call, whatever is mapped there.
    ///
    /// # Safety
    /// Nothing reads or writes through the range any more.
    pub(super) unsafe fn cover(
        &self,
        lock: &MmapLock,
        size: usize,
    ) -> std::result::Result<(), Errno> {
        debug_assert!(size <= self.size);
        let file = marker().map_err(|_| Errno::EMFILE)?;
        // SAFETY: the reservation owns the range, and by the contract nothing uses it.
        unsafe { mm::cover(lock, self.start, file.as_fd(), self.area.offset_of(self.start), size) }
    }

    /// Fails if the limits do not allow `size` more bytes.
    pub(super) fn ensure_room(lock: &MmapLock, size: usize) -> std::result::Result<(), Errno> {
        let file = marker().map_err(|_| Errno::EMFILE)?;
        let at = mm::reserve(lock, file.as_fd(), 0, size)?;
        // SAFETY: the range was reserved on the line above, and nothing else has its address.
        unsafe { mm::munmap(at, size) }
    }

    /// Turns a mapping that the caller owns into a reservation, in one call.
    ///
    /// # Safety
    /// `[start, start + size)` is ours, and nothing reads or writes through it any more.
    pub(super) unsafe fn over(
        lock: &MmapLock,
        start: usize,
        size: usize,
    ) -> std::result::Result<Self, Errno> {
        let file = marker().map_err(|_| Errno::EMFILE)?;
        // SAFETY: by the contract the range is ours, and nothing uses it.
        unsafe { mm::cover(lock, start, file.as_fd(), 0, size) }?;
        Ok(Self::of(Area::new(start, size, 0)))
    }

    /// Reserves a range that a move or a failed call left as a hole. `None` if something is mapped there.
    pub(super) fn reserve_gap(lock: &MmapLock, start: usize, size: usize) -> Option<Self> {
        mm::reserve_at(lock, start, marker().ok()?.as_fd(), 0, size).ok()?;
        Some(Self::of(Area::new(start, size, 0)))
    }

    /// Reserves the first `size` bytes again, if needed, after a call over them failed. `lock` was taken
    /// before that call. Returns false if something is mapped there that is not known to be ours: the
    /// range is then given up.
    ///
    /// # Safety
    /// Nothing of ours is mapped in the range, except perhaps the marker file.
    pub(super) unsafe fn restore(&self, lock: &MmapLock, size: usize) -> bool {
        let range = self.start..self.start + size;
        // SAFETY: if the marker file is not there, nothing of ours is, by the contract.
        self.is_marker(&range) || unsafe { self.reserve_again(lock, size) }
    }

    /// Reserves the first `size` bytes again, which are a hole. Returns false as
    /// [`restore`](Self::restore) does.
    ///
    /// # Safety
    /// Nothing of ours is mapped in the range.
    pub(super) unsafe fn reserve_again(&self, lock: &MmapLock, size: usize) -> bool {
        let range = self.start..self.start + size;
        let reserved = marker().is_ok_and(|file| {
            let offset = self.area.offset_of(self.start);
            mm::reserve_at(lock, self.start, file.as_fd(), offset, size).is_ok()
        });
        if !reserved {
            self.area.lose(range.clone());
            log::error!(
                "gave up {}: after a failed call or a move, what is mapped there may belong to other code",
                show(&range)
            );
        }
        reserved
    }

    /// Completes a cover of the first `size` bytes that may have failed. If the mapping there is intact,
    /// this unmaps it and reserves the range again. Returns false if the mapping could not be unmapped,
    /// or if other code may have taken the range: the range is then no longer ours.
    ///
    /// # Safety
    /// Nothing reads or writes through the range any more.
    pub(super) unsafe fn clear(
        &self,
        lock: &MmapLock,
        size: usize,
        covered: std::result::Result<(), CoverFailed>,
    ) -> bool {
        match covered {
            Ok(()) => return true,
            Err(CoverFailed { intact: false, .. }) => {}
            Err(CoverFailed { intact: true, .. }) => {
                // SAFETY: the mapping is still there and ours, and by the contract nothing uses it.
                if let Err(errno) = unsafe { mm::munmap(self.start, size) } {
                    let range = self.start..self.start + size;
                    self.area.lose(range.clone());
                    log::error!("leaked a mapping at {}: {errno}", show(&range));
                    return false;
                }
            }
        }
        // SAFETY: nothing that is known to be ours is mapped there. A mapping that cannot be identified is
        // given up.
        unsafe { self.restore(lock, size) }
    }

    /// Unlocks the first `size` bytes if they still map the marker file. After `mlockall(MCL_FUTURE)` the
    /// kernel counts both a reservation and the mapping that replaces it as locked memory.
    pub(super) fn unlock(&self, size: usize) -> bool {
        let range = self.start..self.start + size;
        // SAFETY: the marker file is mapped there, and the reservation owns it.
        self.is_marker(&range) && unsafe { mm::munlock(self.start, size) }.is_ok()
    }

    /// Whether all of `range` still maps the marker file.
    fn is_marker(&self, range: &Range<usize>) -> bool {
        let identity = marker().ok().and_then(|file| sys::file::identity(file).ok());
        let offset = self.area.offset_of(range.start);
        identity.is_some_and(|identity| maps::is_reserved(range, identity, offset))
    }
}

/// Reserves exactly `size` bytes at an address that is `want` modulo `modulus`. It tries such addresses
/// downwards from the one that the kernel chooses, since the kernel allocates downwards too. The kernel may choose
/// a small gap above a large mapping.
fn search(
    lock: &MmapLock,
    file: BorrowedFd<'_>,
    size: usize,
    modulus: usize,
    want: usize,
) -> std::result::Result<usize, Errno> {
    let at = mm::reserve(lock, file, 0, size)?;
    let below = at.wrapping_sub(want) & (modulus - 1);
    if below == 0 {
        return Ok(at);
    }
    // SAFETY: the range was reserved above, and nothing else has its address.
    unsafe { unmap_or_leak(&(at..at + size)) };
    let start = at.checked_sub(below).ok_or(Errno::ENOMEM)?;
    search_below(lock, file, size, modulus, start)
}

/// Reserves exactly `size` bytes at `start`, or below at an address congruent to it modulo `modulus`. Each
/// attempt skips the mappings that were in the way of the last: one may be far larger than `modulus`.
fn search_below(
    lock: &MmapLock,
    file: BorrowedFd<'_>,
    size: usize,
    modulus: usize,
    mut start: usize,
) -> std::result::Result<usize, Errno> {
    const ATTEMPTS: usize = 64;
    for _ in 0..ATTEMPTS {
        if start == 0 {
            // Root may map it, and a null pointer would reach it.
            return Err(Errno::ENOMEM);
        }
        match mm::reserve_at(lock, start, file, 0, size) {
            Ok(()) => return Ok(start),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        let end = start + size;
        let taken = maps::overlapping(&(start..end)).first().map(|taken| taken.range.start);
        // At least 1, since what overlaps begins before the end.
        let excess = end - taken.unwrap_or(end - 1);
        let lower = start.checked_sub(excess.next_multiple_of(modulus));
        start = lower.ok_or(Errno::ENOMEM)?;
    }
    Err(Errno::ENOMEM)
}

/// # Safety
/// As [`mm::munmap`].
unsafe fn unmap_or_leak(range: &Range<usize>) {
    // SAFETY: the contract is that of `munmap`.
    if let Err(errno) = unsafe { mm::munmap(range.start, range.len()) } {
        log::error!("leaked {}: {errno}", show(range));
    }
}

/// Whether the stack of the main thread may grow into `range`. The kernel maps the stack as it is used;
/// if a mapping blocks its growth, the process gets SIGSEGV.
fn stack_may_grow_into(range: &Range<usize>) -> bool {
    /// The end of the stack, which does not change.
    static END: OnceLock<Option<usize>> = OnceLock::new();
    let find = || {
        let all = maps::overlapping(&(0..usize::MAX));
        all.iter().find(|mapped| mapped.name == "[stack]").map(|stack| stack.range.end)
    };
    let Some(end) = *END.get_or_init(find) else { return false };
    let limit = getrlimit(Resource::RLIMIT_STACK).map_or(RLIM_INFINITY, |(limit, _)| limit);
    let floor =
        stack_floor(end, limit).unwrap_or_else(|| end_below(&maps::overlapping(&(0..end)), end));
    range.start < end && floor < range.end
}

/// The lowest address that a stack ending at `end` may reach, including the gap that the kernel keeps
/// below it. `None` without a limit.
fn stack_floor(end: usize, limit: u64) -> Option<usize> {
    const GAP: usize = 1 << 20;
    const LEAST: u64 = 8 << 20;
    if limit == RLIM_INFINITY {
        return None;
    }
    end.checked_sub(usize::try_from(limit.max(LEAST)).ok()?)?.checked_sub(GAP)
}

/// The end of the mapping below the one that ends at `end`.
fn end_below(mappings: &[maps::Mapped], end: usize) -> usize {
    let index = mappings.iter().position(|mapped| mapped.range.end == end).unwrap_or(0);
    mappings[..index].last().map_or(0, |below| below.range.end)
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({:#x}..{:#x})", self.start, self.start + self.size)
    }
}

#[cfg(test)]
mod tests;
