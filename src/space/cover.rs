//! How the addresses of a mapping are taken back: they are covered in one call, and are never a hole.

#![expect(unsafe_code, reason = "addresses are owned by convention")]

use std::ops::Range;

use nix::errno::Errno;

use super::reservation::{CoverFailed, Reservation};
use super::revocation::Shown;
use crate::sys::mmap_lock::MmapLock;
use crate::sys::{maps, mm};

/// Covers a mapping in `range`, which lies at the start of `home` if it has one and shows `shown`, and returns
/// its addresses as a reservation. On failure nothing has changed. On success the mapping owns nothing: the caller
/// sets its address or its length.
///
/// # Safety
/// The range is a mapping's. Nothing reads or writes through it any more, and no handler revokes it.
#[inline(always)]
pub(super) unsafe fn release(
    home: &mut Option<Reservation>,
    range: Range<usize>,
    shown: Shown,
) -> std::result::Result<Released, Errno> {
    let lock = MmapLock::take();
    let (address, size) = (range.start, range.len());
    let taken = home.take();
    // SAFETY: the mapping owns its range, and by the contract nothing uses it.
    let cover = || unsafe {
        match &taken {
            Some(home) => home.cover(&lock, size).map(|()| None),
            None => Reservation::over(&lock, address, size).map(Some),
        }
    };
    let covered = try_cover(&lock, shown, range, cover);
    match (covered, taken) {
        (Ok(made), taken) => Ok(made.or(taken).map_or(Released::Lost, Released::Whole)),
        (Err(CoverFailed { errno, intact: true }), taken) => {
            *home = taken;
            Err(errno)
        }
        // The failing call has unmapped the range, or that cannot be determined.
        (Err(_), taken) => {
            let reserved = match taken {
                // SAFETY: nothing that is known to be ours is mapped there. A mapping that cannot be
                // identified is given up.
                Some(home) => unsafe { home.restore(&lock, size) }.then_some(home),
                None => Reservation::reserve_gap(&lock, address, size),
            };
            Ok(reserved.map_or(Released::Lost, Released::WithGap))
        }
    }
}

/// Covers the mapping in `range`, which shows `shown`.
///
/// The kernel checks the limits on mappings, address space and locked memory before it changes the range
/// (`do_mmap`, `mmap_region`; Linux 5.10 to 7.3). If it runs out of memory later, it has already unmapped
/// the range, and other code may have mapped something there since.
pub(super) fn try_cover<T>(
    lock: &MmapLock,
    shown: Shown,
    range: Range<usize>,
    cover: impl Fn() -> std::result::Result<T, Errno>,
) -> std::result::Result<T, CoverFailed> {
    let Some(file) = shown.file else {
        // After a failed call, this mapping could not be told from others. So the limits are checked
        // first, by a reservation elsewhere.
        Reservation::ensure_room(lock, range.len())
            .map_err(|errno| CoverFailed { errno, intact: true })?;
        return cover().map_err(|errno| CoverFailed { errno, intact: false });
    };
    if shown.is_revoked {
        // So that the pages can be told from another mapping if the call fails.
        // SAFETY: the range is ours.
        let _ = unsafe { mm::keep_from_children(range.start, range.len()) };
    }
    // A mapping of the same bytes of the same file that children do not inherit is a window of this
    // crate, or the pages of one. It is this one, since the lock was taken before the call.
    let is_intact = || maps::is_kept_from_children(&range, file, shown.offset).unwrap_or(false);
    let refused = |errno| CoverFailed { errno, intact: is_intact() };
    let locked = match cover().map_err(refused) {
        Err(uncovered) if uncovered.errno == Errno::EAGAIN && uncovered.intact => uncovered,
        other => return other,
    };
    // After mlockall(MCL_FUTURE) both the mapping and its cover would count as locked memory. Neither
    // needs to.
    // SAFETY: the range is ours; what is mapped there is the mapping, or what covers it.
    let unlock = || unsafe { mm::munlock(range.start, range.len()) };
    unlock().map_err(|_| locked)?;
    let covered = cover().map_err(refused)?;
    let _ = unlock();
    Ok(covered)
}

/// What happened to the addresses of a mapping that was covered.
pub(super) enum Released {
    /// They are reserved, and were never a hole.
    Whole(Reservation),
    /// They are reserved, and were a hole for an instant.
    WithGap(Reservation),
    /// They may have been a hole, and what is mapped there now may belong to other code.
    Lost,
}
