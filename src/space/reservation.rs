//! Address space that is set aside, and that nothing else in the process can be mapped into.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Failed;
use super::limits::out_of_memory;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::turn::Turn;
use crate::sys::{self, fork, maps, mm};

/// A range of addresses that belongs to its holder: reserved (`PROT_NONE`), reaching nothing, and
/// in nobody else's way.
///
/// Windows are placed in reservations by [`Placement::In`](super::Placement::In). Pieces of a split
/// reservation may be dropped in any order: the addresses go back to the process when the last piece,
/// and the last window placed in one, has gone; until then a dropped piece stays reserved, so that
/// the whole never gets a hole.
pub struct Reservation {
    area: Arc<Area>,
    start: usize,
    size: usize,
}

/// What was reserved in one go.
struct Area {
    range: Range<usize>,
    /// What to add (wrapping) to an address for its offset in the placeholder file.
    bias: u64,
    /// The process that reserved it: see [`fork::generation`].
    generation: u32,
    /// Ranges that somebody else may have taken while a failing system call had them unmapped.
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
    /// Gives up a range for good.
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
                // SAFETY: the area's last holder has gone, and with it every user of the range; what
                // others took is left out.
                unsafe { unmap_or_leak(&(start..hole.start)) };
            }
            start = start.max(hole.end);
        }
    }
}

/// A mapping that could not be covered.
pub(super) struct Uncovered {
    pub errno: Errno,
    /// Whether it is known to be there still.
    pub intact: bool,
}

/// The file that reservations map, inaccessibly, each from offset 0 on.
///
/// Reservations could be anonymous memory; the file makes them known. After a failing FIXED call, which up
/// to Linux 6.16 has unmapped the destination and on later ones mostly has not, `/proc/self/maps` tells
/// whether it is there still: other code does not have the file, and no reservation is made within the
/// [`Turn`] of the call. The file's name also tells people who read that list whose the ranges are.
fn placeholder() -> Result<&'static OwnedFd> {
    static FILE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file);
    }
    let file = sys::file::memory_file("vfio-remap-reserved", 0)
        .map_err(|errno| Error::os(errno, "create", "the memfd that marks reservations"))?;
    Ok(FILE.get_or_init(|| file))
}

/// More than any address space has, and little enough that no sum of two overflows.
const MAX_SIZE: usize = 1 << 52;

fn show(range: &Range<usize>) -> String {
    format!("addresses {:#x}..{:#x}", range.start, range.end)
}

/// `size` rounded up to whole pages; an error where it is zero or too large.
fn pages(size: usize) -> Result<usize> {
    if size == 0 {
        return Err(Error::new(ErrorKind::OutOfRange, "reserve", "0 bytes")
            .because("there is nothing to reserve")
            .remedy("reserve one page or more"));
    }
    let size_in_pages = size.checked_next_multiple_of(sys::page_size());
    size_in_pages.filter(|size| *size <= MAX_SIZE).ok_or_else(|| no_such_space(size))
}

fn no_such_space(size: usize) -> Error {
    Error::new(ErrorKind::OutOfRange, "reserve", format!("{size:#x} bytes"))
        .because("there is no such address space")
        .remedy("reserve less, or map parts as windows of their own")
}

impl Reservation {
    /// Reserves `size` bytes, rounded up to whole pages, where there is room.
    ///
    /// # Errors
    /// `OutOfRange` for zero, and for more than an address space holds; `TooManyMappings`, `AddressSpace`
    /// and `LockedMemory` where a limit of the process is met; `Os` with ENOMEM.
    pub fn new(size: usize) -> Result<Self> {
        Self::congruent(size, sys::page_size(), 0)
    }

    /// Reserves `size` bytes at a multiple of `alignment`, a power of two of at least a page.
    ///
    /// # Errors
    /// As [`new`](Self::new); `Unaligned` where `alignment` is not such a number.
    pub fn aligned(size: usize, alignment: usize) -> Result<Self> {
        Self::congruent(size, alignment, 0)
    }

    /// Reserves `size` bytes at an address that is `offset` modulo `modulus`: with a modulus of 2 MiB
    /// or 1 GiB and the offset of a window in its region, the window placed there is mapped by huge
    /// page-table entries (Linux 6.12 and newer).
    ///
    /// # Errors
    /// As [`aligned`](Self::aligned); `Unaligned` where `offset` is not a multiple of the page size.
    pub fn congruent(size: usize, modulus: usize, offset: u64) -> Result<Self> {
        let page = sys::page_size();
        let size = pages(size)?;
        if !modulus.is_power_of_two() || modulus < page {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", format!("{size:#x} bytes"))
                .because(format!("{modulus:#x} is not a power of two of at least a page"))
                .remedy(format!("align to {page:#x}, 2 MiB (0x200000) or 1 GiB (0x40000000)")));
        }
        let want = (offset % modulus as u64) as usize;
        if !want.is_multiple_of(page) {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", format!("{size:#x} bytes"))
                .because(format!("offset {offset:#x} is not a multiple of the page size"))
                .remedy(format!("round it down to a multiple of {page:#x}")));
        }
        let room = size.checked_add(modulus - page).filter(|room| *room <= MAX_SIZE);
        let room = room.ok_or_else(|| no_such_space(size))?;
        let file = placeholder()?.as_fd();
        let turn = Turn::take();
        let failed = |errno| out_of_memory(errno, "reserve", format!("{size:#x} bytes"), size);
        let at = match mm::reserve(&turn, file, 0, room) {
            Ok(at) => at,
            Err(errno) if room == size => return Err(failed(errno)),
            // A limit may allow the size alone.
            Err(errno) => {
                let start = search(&turn, file, size, modulus, want).map_err(|_| failed(errno))?;
                return Ok(Self::of(Area::new(start, size, 0)));
            }
        };
        let start = at + (want.wrapping_sub(at) & (modulus - 1));
        let end = at + room;
        for surplus in [at..start, start + size..end] {
            if !surplus.is_empty() {
                // SAFETY: the range was reserved above, and nobody knows of it.
                unsafe { unmap_or_leak(&surplus) };
            }
        }
        Ok(Self::of(Area::new(start, size, (start - at) as u64)))
    }

    /// Reserves `size` bytes, rounded up to whole pages, at `address`, if nothing is mapped there
    /// (`MAP_FIXED_NOREPLACE`, Linux 4.17).
    ///
    /// # Errors
    /// `AddressTaken`, naming what is there, or that the main thread's stack may grow into it; `Unaligned` where `address` is not a multiple of the
    /// page size; `OutOfRange` where the range wraps around or is empty.
    pub fn at(address: usize, size: usize) -> Result<Self> {
        let size = pages(size)?;
        let object = format!("{size:#x} bytes at {address:#x}");
        if !address.is_multiple_of(sys::page_size()) {
            return Err(Error::new(ErrorKind::Unaligned, "reserve", object)
                .because("the address is not a multiple of the page size")
                .remedy(format!("choose a multiple of {:#x}", sys::page_size())));
        }
        let end = address.checked_add(size).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "reserve", &object)
                .because("the range wraps around")
                .remedy("choose a lower address, or Placement::Anywhere")
        })?;
        if stack_may_grow_into(&(address..end)) {
            return Err(Error::new(ErrorKind::AddressTaken, "reserve", object)
                .because("the stack of the main thread may grow into it")
                .remedy("choose another address, or Placement::Anywhere"));
        }
        let file = placeholder()?;
        let reserved = mm::reserve_at(&Turn::take(), address, file.as_fd(), 0, size);
        match reserved {
            Ok(()) => Ok(Self::of(Area::new(address, size, 0))),
            Err(Errno::EEXIST) => {
                let error = Error::new(ErrorKind::AddressTaken, "reserve", object);
                Err(match maps::overlapping(&(address..end)).first() {
                    Some(taken) if taken.name.is_empty() => error.because(format!(
                        "anonymous memory is mapped at {:#x}..{:#x}",
                        taken.range.start, taken.range.end
                    )),
                    Some(taken) => error.because(format!(
                        "{} is mapped at {:#x}..{:#x}",
                        taken.name, taken.range.start, taken.range.end
                    )),
                    None => error.because("something is mapped there"),
                }
                .remedy("choose another address, or Placement::Anywhere"))
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

    /// Splits it in two, the first of `size` bytes.
    ///
    /// # Errors
    /// `Unaligned` where `size` is not a multiple of the page size, `OutOfRange` where a piece would
    /// be empty; the failure gives the reservation back.
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
            .because(format!("not at {size:#x} bytes"))
            .remedy(format!("split at a multiple of {:#x}, within it", sys::page_size()));
        Err(Failed::new(error, Some(self)))
    }

    /// Joins two pieces of one reservation again, this one ending where `next` begins.
    ///
    /// # Errors
    /// Both pieces, where they are not neighbours or stem from different reservations.
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

    /// Whether the addresses go back to the process with this piece: no other piece of the same area, and
    /// no window placed in one, exists, and it was this process that reserved them.
    pub(super) fn is_whole_area(&mut self) -> bool {
        Arc::get_mut(&mut self.area).is_some_and(|area| {
            area.generation == fork::generation()
                && area.range == (self.start..self.start + self.size)
        })
    }

    /// Makes the first `size` bytes inaccessible in one step, whatever is mapped there.
    ///
    /// # Safety
    /// Nothing reads or writes through the range any more.
    pub(super) unsafe fn cover(&self, turn: &Turn, size: usize) -> std::result::Result<(), Errno> {
        debug_assert!(size <= self.size);
        let file = placeholder().map_err(|_| Errno::EMFILE)?;
        // SAFETY: the reservation owns the range; the caller vouches for its users.
        unsafe { mm::cover(turn, self.start, file.as_fd(), self.area.offset_of(self.start), size) }
    }

    /// Whether there is room for `size` bytes more.
    pub(super) fn try_room(turn: &Turn, size: usize) -> std::result::Result<(), Errno> {
        let file = placeholder().map_err(|_| Errno::EMFILE)?;
        let at = mm::reserve(turn, file.as_fd(), 0, size)?;
        // SAFETY: the range was reserved on the line above, and nobody knows of it.
        unsafe { mm::munmap(at, size) }
    }

    /// Turns a mapping that the caller owns into a reservation, in one step.
    ///
    /// # Safety
    /// `[start, start + size)` is ours, and nothing reads or writes through it any more.
    pub(super) unsafe fn over(
        turn: &Turn,
        start: usize,
        size: usize,
    ) -> std::result::Result<Self, Errno> {
        let file = placeholder().map_err(|_| Errno::EMFILE)?;
        // SAFETY: the caller's own contract.
        unsafe { mm::cover(turn, start, file.as_fd(), 0, size) }?;
        Ok(Self::of(Area::new(start, size, 0)))
    }

    /// Reserves again what a move has left as a hole; `None` where somebody was quicker.
    pub(super) fn over_gap(turn: &Turn, start: usize, size: usize) -> Option<Self> {
        mm::reserve_at(turn, start, placeholder().ok()?.as_fd(), 0, size).ok()?;
        Some(Self::of(Area::new(start, size, 0)))
    }

    /// After a call within this turn that has failed over the first `size` bytes: plugs the hole, if there
    /// is one. False where something is mapped that is not known to be ours: the range is then left alone
    /// for good.
    ///
    /// # Safety
    /// Nothing of ours is mapped in the range but, perhaps, the placeholder itself.
    pub(super) unsafe fn plug(&self, turn: &Turn, size: usize) -> bool {
        let range = self.start..self.start + size;
        // SAFETY: the caller's own contract.
        self.holds_placeholder(&range) || unsafe { self.fill(turn, size) }
    }

    /// Reserves the first `size` bytes again, which are a hole. False as for [`plug`](Self::plug).
    ///
    /// # Safety
    /// Nothing of ours is mapped in the range.
    pub(super) unsafe fn fill(&self, turn: &Turn, size: usize) -> bool {
        let range = self.start..self.start + size;
        let filled = placeholder().is_ok_and(|file| {
            let offset = self.area.offset_of(self.start);
            mm::reserve_at(turn, self.start, file.as_fd(), offset, size).is_ok()
        });
        if !filled {
            self.area.lose(range.clone());
            log::error!(
                "gave up {}: after a failed call or a move, what is mapped there is another's, or cannot \
                 be told from another's",
                show(&range)
            );
        }
        filled
    }

    /// After the first `size` bytes were to be covered, and that may have failed: makes them the
    /// placeholder again by whatever it takes. Where there is no room for the mapping that covers another,
    /// that is by unmapping the other first. False where that left a mapping behind, or let somebody else
    /// in: the range is then no longer ours.
    ///
    /// # Safety
    /// Nothing reads or writes through the range any more.
    pub(super) unsafe fn clear(
        &self,
        turn: &Turn,
        size: usize,
        covered: std::result::Result<(), Uncovered>,
    ) -> bool {
        match covered {
            Ok(()) => return true,
            Err(Uncovered { intact: false, .. }) => {}
            Err(Uncovered { intact: true, .. }) => {
                // SAFETY: the mapping is ours and there still; the caller vouches for its users.
                if let Err(errno) = unsafe { mm::munmap(self.start, size) } {
                    let range = self.start..self.start + size;
                    self.area.lose(range.clone());
                    log::error!("leaked a mapping at {}: {errno}", show(&range));
                    return false;
                }
            }
        }
        // SAFETY: nothing that is known to be ours is mapped there.
        unsafe { self.plug(turn, size) }
    }

    /// Takes the first `size` bytes, if they are the placeholder still, off the count of locked memory:
    /// after `mlockall(MCL_FUTURE)` the kernel counts a reservation, and what is about to replace it.
    pub(super) fn unlock(&self, size: usize) -> bool {
        let range = self.start..self.start + size;
        // SAFETY: the reservation owns what is mapped there.
        self.holds_placeholder(&range) && unsafe { mm::munlock(self.start, size) }.is_ok()
    }

    /// Whether all of `range` is our placeholder still.
    fn holds_placeholder(&self, range: &Range<usize>) -> bool {
        let identity = placeholder().ok().and_then(|file| sys::file::identity(file).ok());
        let offset = self.area.offset_of(range.start);
        identity.is_some_and(|identity| maps::is_reserved(range, identity, offset))
    }
}

/// Reserves `size` bytes at an address that is `want` modulo `modulus`, and never more than that: at the
/// first such addresses below the one that the kernel chooses, which goes downwards.
fn search(
    turn: &Turn,
    file: BorrowedFd<'_>,
    size: usize,
    modulus: usize,
    want: usize,
) -> std::result::Result<usize, Errno> {
    const TRIES: usize = 64;
    let at = mm::reserve(turn, file, 0, size)?;
    let below = at.wrapping_sub(want) & (modulus - 1);
    if below == 0 {
        return Ok(at);
    }
    // SAFETY: the range was reserved above, and nobody knows of it.
    unsafe { unmap_or_leak(&(at..at + size)) };
    for step in 0..TRIES {
        let Some(start) = at.checked_sub(below + step * modulus) else { break };
        match mm::reserve_at(turn, start, file, 0, size) {
            Ok(()) => return Ok(start),
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::ENOMEM)
}

/// # Safety
/// As [`mm::munmap`].
unsafe fn unmap_or_leak(range: &Range<usize>) {
    // SAFETY: the caller's own contract.
    if let Err(errno) = unsafe { mm::munmap(range.start, range.len()) } {
        log::error!("leaked {}: {errno}", show(range));
    }
}

/// Whether the stack of the main thread, which is mapped as it is used, may come to lie in `range`: the
/// kernel keeps it from growing into a mapping, but only where it has to be grown at all.
fn stack_may_grow_into(range: &Range<usize>) -> bool {
    /// One past the stack's highest byte, which stays as it is.
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

/// The lowest address that a stack that ends at `end` may come to, with the gap that the kernel keeps below
/// it; `None` without a limit.
fn stack_floor(end: usize, limit: u64) -> Option<usize> {
    const GAP: usize = 1 << 20;
    const LEAST: u64 = 8 << 20;
    if limit == RLIM_INFINITY {
        return None;
    }
    end.checked_sub(usize::try_from(limit.max(LEAST)).ok()?)?.checked_sub(GAP)
}

/// Where the mapping ends that is the next below the one that ends at `end`.
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
