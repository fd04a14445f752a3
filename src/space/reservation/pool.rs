//! Pieces of a reservation, by address.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{Area, Reservation, show};
use crate::error::{Error, ErrorKind, Result};
use crate::space::Failed;
use crate::sys;

/// A reservation of which any range can be taken out and given back.
///
/// A virtual machine monitor places windows in one at the addresses that the guest chooses.
///
/// A window that is placed in a piece owns it. [`Window::relocate`](crate::Window::relocate) and
/// [`Window::into_reservation`](crate::Window::into_reservation) return it; give it back then. The addresses of a
/// window that is only dropped stay reserved, and cannot be taken again.
///
/// ```
/// use vfio_remap::{Reservation, space::ReservationPool};
///
/// let mut pool = ReservationPool::new(Reservation::new(1 << 20)?);
/// let start = pool.range().start;
/// let piece = pool.take(start + 0x4_0000..start + 0x5_0000)?;
/// assert!(pool.take(start..start + 0x5_0000).is_err(), "a part of it is taken");
/// pool.give(piece)?;
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[must_use = "dropping it frees the addresses"]
pub struct ReservationPool {
    area: Arc<Area>,
    range: Range<usize>,
    /// By their addresses. No two are adjacent.
    free: BTreeMap<usize, Reservation>,
}

impl ReservationPool {
    /// The whole of `reservation`.
    pub fn new(reservation: Reservation) -> Self {
        let (area, range) = (reservation.area.clone(), reservation.range());
        Self { area, range, free: BTreeMap::from([(reservation.address(), reservation)]) }
    }

    /// The addresses of the pool, taken or not.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Takes the piece with exactly these addresses out of the pool.
    ///
    /// # Errors
    /// `Unaligned` if the range does not begin and end at a multiple of the page size; `OutOfRange` if it is empty
    /// or leaves the pool; `AddressTaken` if a part of it was taken and not given back.
    pub fn take(&mut self, range: Range<usize>) -> Result<Reservation> {
        let refused =
            |kind, reason: String| Err(Error::new(kind, "take", show(&range)).with_reason(reason));
        let page = sys::page_size();
        if !range.start.is_multiple_of(page) || !range.end.is_multiple_of(page) {
            return refused(ErrorKind::Unaligned, format!("they are not whole pages of {page:#x}"));
        }
        if range.is_empty() || range.start < self.range.start || range.end > self.range.end {
            let reason = format!("the pool has {}", show(&self.range));
            return refused(ErrorKind::OutOfRange, reason);
        }
        let below = self.free.range(..=range.start).next_back();
        let around = below.filter(|(_, piece)| piece.range().end >= range.end);
        let start = around.map_or(range.start, |(start, _)| *start);
        let Some(mut piece) = around.is_some().then(|| self.free.remove(&start)).flatten() else {
            return refused(ErrorKind::AddressTaken, "a part of them is taken".to_owned());
        };
        if start < range.start {
            let (before, rest) = piece.split_at(range.start - start)?;
            self.free.insert(start, before);
            piece = rest;
        }
        if range.end < piece.range().end {
            let (wanted, after) = piece.split_at(range.len())?;
            self.free.insert(range.end, after);
            piece = wanted;
        }
        Ok(piece)
    }

    /// Gives a piece back, or a part of one.
    ///
    /// # Errors
    /// `OutOfRange` if it is not of this pool. The failure gives it back.
    pub fn give(&mut self, piece: Reservation) -> std::result::Result<(), Failed> {
        let range = piece.range();
        let inside = self.range.start <= range.start && range.end <= self.range.end;
        if !inside || !Arc::ptr_eq(&self.area, &piece.area) {
            let error = Error::new(ErrorKind::OutOfRange, "give back", show(&range))
                .with_reason(format!("they were not taken from the pool of {}", show(&self.range)));
            return Err(Failed::new(error, Some(piece)));
        }
        // Each address has one owner, so the pieces do not overlap.
        let mut whole = piece;
        let below = self.free.range(..range.start).next_back().map(|(start, _)| *start);
        for neighbour in [below, Some(range.end)].into_iter().flatten() {
            let Some(other) = self.free.remove(&neighbour) else { continue };
            let (first, second) =
                if neighbour < range.start { (other, whole) } else { (whole, other) };
            whole = first.join(second).unwrap_or_else(|(first, second)| {
                // They are not adjacent.
                let (other, whole) =
                    if neighbour < range.start { (first, second) } else { (second, first) };
                self.free.insert(neighbour, other);
                whole
            });
        }
        self.free.insert(whole.address(), whole);
        Ok(())
    }
}

impl fmt::Debug for ReservationPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free: usize = self.free.values().map(Reservation::size).sum();
        write!(f, "ReservationPool({}, {free:#x} bytes free)", show(&self.range))
    }
}
