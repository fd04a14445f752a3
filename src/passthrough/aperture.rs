//! Where the guest may place BARs.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::space::{Reservation, ReservationPool};

/// The end of the I/O ports.
const PORTS: u64 = 0x1_0000;

/// Ranges of the guest's memory and ports in which its BARs respond.
///
/// Each range of memory is mirrored by reserved addresses of this process, congruent to the guest's modulo 1 GiB. So
/// KVM maps large pages, and each BAR has its place in this process. A BAR that the guest places elsewhere, or over
/// another BAR, is not mapped and does not respond. Memory of the guest is therefore out of reach.
///
/// Clones are the same apertures; all devices of a guest share them.
#[derive(Clone)]
pub struct Apertures {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    memory: Vec<Aperture>,
    ports: Range<u64>,
    /// The ranges that BARs occupy, by their starts: memory, then ports.
    occupied: [BTreeMap<u64, u64>; 2],
    /// How often a range was vacated.
    vacated: u64,
}

struct Aperture {
    guest: Range<u64>,
    pool: ReservationPool,
}

/// The space that a BAR is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Memory,
    Ports,
}

/// A range that one BAR occupies, until this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    apertures: Apertures,
    space: Space,
    range: Range<u64>,
}

impl Apertures {
    /// Reserves addresses for these ranges of guest-physical addresses, in which nothing else of the guest lies.
    /// `ports` are the I/O ports at which I/O BARs respond; an empty range for none.
    ///
    /// # Errors
    /// `InvalidInput` if a range is empty or contains address 0, two overlap, or ports end above 0x10000; as
    /// [`Reservation::congruent`].
    pub fn new(memory: &[Range<u64>], ports: Range<u32>) -> Result<Self> {
        let ports = u64::from(ports.start)..u64::from(ports.end);
        let invalid = |range: &Range<u64>, reason: &'static str| {
            let object = format!("the aperture {:#x}..{:#x}", range.start, range.end);
            Err(Error::new(ErrorKind::InvalidInput, "make", object).with_reason(reason))
        };
        if ports.end > PORTS {
            return invalid(&ports, "the last port is 0xffff");
        }
        let mut apertures: Vec<Aperture> = Vec::new();
        for guest in memory {
            if guest.is_empty() || guest.start == 0 {
                return invalid(guest, "it is empty, or contains address 0");
            }
            let overlaps = |it: &Aperture| it.guest.start < guest.end && guest.start < it.guest.end;
            if apertures.iter().any(overlaps) {
                return invalid(guest, "another one overlaps it");
            }
            let size = usize::try_from(guest.end - guest.start).unwrap_or(usize::MAX);
            let pool = ReservationPool::new(Reservation::congruent(size, 1 << 30, guest.start)?);
            apertures.push(Aperture { guest: guest.clone(), pool });
        }
        let inner = Inner { memory: apertures, ports, occupied: Default::default(), vacated: 0 };
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// The ranges of memory: those of the guest, and the addresses of this process that mirror them.
    pub fn memory(&self) -> Vec<(Range<u64>, Range<usize>)> {
        self.lock().memory.iter().map(|it| (it.guest.clone(), it.pool.range())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Occupies a range. `None` if it leaves the apertures, or another BAR occupies a part of it.
    pub(super) fn claim(&self, space: Space, start: u64, size: u64) -> Option<Claim> {
        let range = start..start.checked_add(size)?;
        let mut inner = self.lock();
        let within = |outer: &Range<u64>| outer.start <= range.start && range.end <= outer.end;
        let inside = match space {
            Space::Memory => inner.memory.iter().any(|aperture| within(&aperture.guest)),
            Space::Ports => within(&inner.ports),
        };
        let occupied = &mut inner.occupied[space as usize];
        let below = occupied.range(..range.end).next_back();
        if !inside || below.is_some_and(|(_, end)| *end > range.start) {
            return None;
        }
        occupied.insert(range.start, range.end);
        Some(Claim { apertures: self.clone(), space, range })
    }

    /// How often a BAR has vacated a range: a BAR that found its range occupied may find it free now.
    pub(super) fn vacated(&self) -> u64 {
        self.lock().vacated
    }

    /// Takes the addresses of this process that mirror a range of the guest's memory.
    pub(super) fn take(&self, guest: Range<u64>) -> Result<Reservation> {
        let mut inner = self.lock();
        let found = inner
            .memory
            .iter_mut()
            .find(|it| it.guest.start <= guest.start && guest.end <= it.guest.end);
        let Some(aperture) = found else {
            let object = format!("{:#x}..{:#x} of the guest", guest.start, guest.end);
            return Err(Error::new(ErrorKind::OutOfRange, "map", object)
                .with_reason("no aperture contains it"));
        };
        let start = aperture.pool.range().start;
        let host = |address: u64| start + (address - aperture.guest.start) as usize;
        let range = host(guest.start)..host(guest.end);
        aperture.pool.take(range)
    }

    /// Gives back addresses that were taken. Others are dropped.
    pub(super) fn give(&self, reservation: Reservation) {
        let mut inner = self.lock();
        let address = reservation.address();
        if let Some(it) = inner.memory.iter_mut().find(|it| it.pool.range().contains(&address)) {
            // A failure drops them: they are of another reservation.
            let _ = it.pool.give(reservation);
        }
    }
}

impl Claim {
    pub(super) fn start(&self) -> u64 {
        self.range.start
    }

    /// The offset of `address` in the range, if it is in it.
    pub(super) fn offset_of(&self, space: Space, address: u64) -> Option<u64> {
        (self.space == space && self.range.contains(&address)).then(|| address - self.range.start)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.apertures.lock();
        inner.occupied[self.space as usize].remove(&self.range.start);
        inner.vacated += 1;
    }
}

impl fmt::Debug for Apertures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Apertures({:x?})", self.memory())
    }
}
