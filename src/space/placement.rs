//! Where a mapping goes, by which strategies, and what a failure returns.

use std::fmt;

use super::{Reservation, Verb};
use crate::error::{Error, gives_back};

/// A way to duplicate or relocate a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// `mremap(MREMAP_MAYMOVE|MREMAP_DONTUNMAP)`: the page tables move to the new side. The old side stays
    /// mapped, and faults fill its page tables again. Linux 5.13 and newer accept it for shared memory; no
    /// released kernel accepts it for a BAR.
    ///
    /// If the old side is locked (`mlock`, `mlockall`), the kernel counts both sides as locked memory,
    /// and one of them until the process ends: `dontunmap_complete` clears `VM_LOCKED` but does not lower
    /// the count (observed on Linux 6.18; 7.3 has the same code). If RLIMIT_MEMLOCK is low, request
    /// [`MapAgain`](Self::MapAgain).
    DontUnmap,
    /// `mremap` with an old length of 0: a second mapping is made from the first, without a file descriptor.
    /// It duplicates only. No page tables move, so the source stays warm, and it cannot be harmed. The new
    /// side inherits the protection of the source. Every kernel accepts it for shared memory; no released
    /// kernel accepts it for a BAR (`man 2 mremap`; `check_prep_vma` of Linux 7.3 returns EFAULT for
    /// `VM_PFNMAP`).
    OldLenZero,
    /// A second `mmap` of the same file and offset. Works on every kernel.
    MapAgain,
    /// `mremap(MREMAP_MAYMOVE|MREMAP_FIXED)`: relocates only, and leaves a hole at the old addresses for an
    /// instant, which another `mmap` may take. Used only on request.
    Move,
}

impl Strategy {
    /// The strategies that are tried, in this order, unless others are requested. A relocation leaves out
    /// [`OldLenZero`](Self::OldLenZero).
    pub const DEFAULT_ORDER: &'static [Strategy] =
        &[Strategy::DontUnmap, Strategy::OldLenZero, Strategy::MapAgain];

    /// How many there are.
    pub(crate) const COUNT: usize = 4;
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where a mapping goes.
#[derive(Debug)]
#[non_exhaustive]
pub enum Placement {
    /// At an address that the kernel chooses. From a size of 2 MiB on, the address is congruent to the
    /// offset in the region modulo 2 MiB (from 1 GiB on, modulo 1 GiB), so that Linux 6.12 and newer use
    /// huge page-table entries.
    Anywhere,
    /// At this address, if nothing is mapped there (`MAP_FIXED_NOREPLACE`). From 2 MiB on, the address
    /// must be congruent as for [`In`](Self::In).
    At(usize),
    /// At the start of a reservation, which must be at least as large as the mapping. From 2 MiB on, its
    /// address must be congruent to the offset in the region modulo 2 MiB. A failure gives the
    /// reservation back ([`Failed::into_reservation`]), except with `ReservationLost`.
    In(Reservation),
}

impl Placement {
    /// This placement, by one strategy only. It is tried again even if the kernel is known to refuse it.
    #[must_use]
    pub fn only(self, strategy: Strategy) -> Request {
        let mut order = [None; Strategy::COUNT];
        order[0] = Some(strategy);
        Request { placement: self, order: Order::Requested(order), pinned: true }
    }

    /// This placement, by these strategies in this order. Repetitions are ignored. If there are none, the verb
    /// is `Refused`.
    #[must_use]
    pub fn by(self, strategies: &[Strategy]) -> Request {
        let mut order = [None; Strategy::COUNT];
        let mut free = order.iter_mut();
        for (index, strategy) in strategies.iter().enumerate() {
            if !strategies[..index].contains(strategy)
                && let Some(place) = free.next()
            {
                *place = Some(*strategy);
            }
        }
        Request { placement: self, order: Order::Requested(order), pinned: false }
    }

    /// This placement, by the strategies that are tried unless others are requested, in the order of what
    /// they cost: until all that is mapped afterwards has been accessed again.
    ///
    /// - A duplicate: [`OldLenZero`](Strategy::OldLenZero), [`MapAgain`](Strategy::MapAgain), then
    ///   [`DontUnmap`](Strategy::DontUnmap), after which the source has to fault again.
    /// - A relocation: [`DontUnmap`](Strategy::DontUnmap), which keeps the page tables, then
    ///   [`MapAgain`](Strategy::MapAgain). The other way round for 2 MiB and more of a BAR: they have few
    ///   page-table entries, and to fault them in again costs less than to move them.
    ///
    /// This is what `docs/kernel-matrix.md` shows for windows that have been accessed all over.
    #[must_use]
    pub fn cheapest(self) -> Request {
        Request { placement: self, order: Order::Cheapest, pinned: false }
    }
}

/// A placement and the strategies to try. A [`Placement`] alone converts into a request with
/// [`Strategy::DEFAULT_ORDER`].
#[derive(Debug)]
pub struct Request {
    pub(crate) placement: Placement,
    pub(crate) order: Order,
    /// Whether the kernel is asked again although its refusal is remembered.
    pub(crate) pinned: bool,
}

/// Which strategies are tried, in which order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    Default,
    Cheapest,
    Requested([Option<Strategy>; Strategy::COUNT]),
}

impl Order {
    /// The strategies for a verb. `huge`: whether the mapping has huge page-table entries.
    pub(super) fn strategies(self, verb: Verb, huge: bool) -> [Option<Strategy>; Strategy::COUNT] {
        use Strategy::{DontUnmap, MapAgain, OldLenZero};
        match (self, verb) {
            (Self::Requested(strategies), _) => strategies,
            (Self::Default, Verb::Duplicate) => {
                [Some(DontUnmap), Some(OldLenZero), Some(MapAgain), None]
            }
            (Self::Cheapest, Verb::Duplicate) => {
                [Some(OldLenZero), Some(MapAgain), Some(DontUnmap), None]
            }
            (Self::Cheapest, Verb::Relocate) if huge => {
                [Some(MapAgain), Some(DontUnmap), None, None]
            }
            (Self::Default | Self::Cheapest, Verb::Relocate) => {
                [Some(DontUnmap), Some(MapAgain), None, None]
            }
        }
    }
}

impl Request {
    /// A failure that returns the reservation.
    pub(crate) fn refused(self, error: Error) -> Failed {
        match self.placement {
            Placement::In(reservation) => Failed::new(error, Some(reservation)),
            Placement::Anywhere | Placement::At(_) => error.into(),
        }
    }
}

impl From<Placement> for Request {
    fn from(placement: Placement) -> Self {
        Self { placement, order: Order::Default, pinned: false }
    }
}

/// The error of a verb that takes a [`Placement`], with the reservation that the verb was given.
///
/// `?` converts it into its [`Error`] and drops the reservation.
pub struct Failed {
    error: Error,
    reservation: Option<Reservation>,
}

impl Failed {
    pub(crate) fn new(error: Error, reservation: Option<Reservation>) -> Self {
        Self { error, reservation }
    }

    /// The reservation of [`Placement::In`]. `None` if there was none, or if it was lost
    /// ([`ErrorKind::ReservationLost`](crate::ErrorKind::ReservationLost)).
    pub fn into_reservation(self) -> Option<Reservation> {
        self.reservation
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::new(error, None)
    }
}

gives_back!(
    Failed { reservation: Option<Reservation> },
    "The error, and what [`into_reservation`](Self::into_reservation) returns."
);

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn the_first_of_each_strategy_counts() {
        use Strategy::{DontUnmap, MapAgain, Move, OldLenZero};
        let order =
            |request: Request| (request.order.strategies(Verb::Duplicate, false), request.pinned);
        let all = [MapAgain, MapAgain, Move, MapAgain, DontUnmap, Move, OldLenZero];
        let wanted = ([MapAgain, Move, DontUnmap, OldLenZero].map(Some), false);
        assert_eq!(order(Placement::Anywhere.by(&all)), wanted);
        let wanted = ([Some(Move), None, None, None], true);
        assert_eq!(order(Placement::Anywhere.only(Move)), wanted);
        assert_eq!(DontUnmap.to_string(), "DontUnmap");
    }

    #[test]
    fn unrequested_strategies_suit_the_verb() {
        use Strategy::{DontUnmap, MapAgain, OldLenZero};
        let order = |request: Request, verb, huge| {
            assert!(!request.pinned);
            let strategies = request.order.strategies(verb, huge);
            strategies.into_iter().flatten().collect::<Vec<_>>()
        };
        let usual = || Placement::Anywhere.into();
        let cheapest = || Placement::Anywhere.cheapest();
        for huge in [false, true] {
            assert_eq!(order(usual(), Verb::Duplicate, huge), Strategy::DEFAULT_ORDER);
            assert_eq!(order(usual(), Verb::Relocate, huge), [DontUnmap, MapAgain]);
            let wanted = [OldLenZero, MapAgain, DontUnmap];
            assert_eq!(order(cheapest(), Verb::Duplicate, huge), wanted);
        }
        assert_eq!(order(cheapest(), Verb::Relocate, false), [DontUnmap, MapAgain]);
        assert_eq!(order(cheapest(), Verb::Relocate, true), [MapAgain, DontUnmap]);
    }

    #[test]
    fn a_failure_is_its_error_and_gives_the_reservation_back() {
        let failed = || {
            let error = Error::from_errno(libc::EACCES, "map", "bar 0");
            Failed::new(error, Some(Reservation::new(1).unwrap()))
        };
        let (error, reservation) = failed().into_parts();
        assert!(reservation.is_some() && failed().into_reservation().is_some());
        assert_eq!(failed().error().to_string(), error.to_string());
        assert_eq!(failed().to_string(), error.to_string());
        assert_eq!(format!("{:?}", failed()), format!("{error:?}"));
        assert_eq!(failed().kind(), ErrorKind::PermissionDenied);
        assert_eq!(Error::from(failed()).to_string(), error.to_string());
        let io = std::io::Error::from(failed());
        assert_eq!(io.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(Failed::from(error).into_reservation().is_none());
    }
}
