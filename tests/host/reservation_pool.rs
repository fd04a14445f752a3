//! Pieces of a reservation, taken by address and given back.

use std::ops::Range;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use vfio_remap::space::ReservationPool;
use vfio_remap::transport::MemoryDevice;
use vfio_remap::{Device, ErrorKind, Placement, Reservation};

const PAGE: usize = 4096;

fn pool(pages: usize) -> ReservationPool {
    ReservationPool::new(Reservation::new(pages * PAGE).unwrap())
}

/// Some pages of the pool.
fn pages(pool: &ReservationPool, range: Range<usize>) -> Range<usize> {
    let start = pool.range().start;
    start + range.start * PAGE..start + range.end * PAGE
}

#[test]
fn a_piece_out_of_the_middle_is_taken_once() {
    let mut pool = pool(16);
    let range = pages(&pool, 4..8);
    let piece = pool.take(range.clone()).unwrap();
    assert_eq!(piece.range(), range);
    for taken in [4..8, 0..5, 7..16, 5..6, 0..16] {
        let error = pool.take(pages(&pool, taken.clone())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddressTaken, "{taken:?}: {error}");
    }
    let before = pool.take(pages(&pool, 0..4)).unwrap();
    let after = pool.take(pages(&pool, 8..16)).unwrap();
    // In any order, and in parts.
    let (first, second) = piece.split_at(PAGE).unwrap();
    for piece in [second, before, after, first] {
        pool.give(piece).unwrap();
    }
    assert_eq!(pool.take(pool.range()).unwrap().size(), 16 * PAGE);
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let mut pool = pool(16);
    let Range { start, end } = pool.range();
    for (range, kind) in [
        (start..start, ErrorKind::OutOfRange),
        (end..start, ErrorKind::OutOfRange),
        (start - PAGE..start + PAGE, ErrorKind::OutOfRange),
        (start..end + PAGE, ErrorKind::OutOfRange),
        (0..usize::MAX - PAGE + 1, ErrorKind::OutOfRange),
        (start + 1..start + PAGE, ErrorKind::Unaligned),
        (start..start + 1, ErrorKind::Unaligned),
    ] {
        let error = pool.take(range.clone()).unwrap_err();
        assert_eq!(error.kind(), kind, "{range:x?}: {error}");
    }
    assert_eq!(pool.take(start..end).unwrap().range(), start..end);
}

#[test]
fn a_piece_of_another_reservation_comes_back() {
    let mut pool = pool(16);
    let (mine, rest) = Reservation::new(2 * PAGE).unwrap().split_at(PAGE).unwrap();
    let mut part = ReservationPool::new(mine);
    for (pool, piece) in [(&mut pool, Reservation::new(PAGE).unwrap()), (&mut part, rest)] {
        let range = piece.range();
        let failed = pool.give(piece).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::OutOfRange, "{failed}");
        assert_eq!(failed.into_reservation().unwrap().range(), range);
    }
}

#[test]
fn a_window_goes_through_a_pool_and_leaves_it_whole() {
    let device = Device::new(Arc::new(MemoryDevice::new(2 * PAGE as u64).unwrap()));
    let mut pool = pool(64);
    let place = pool.take(pages(&pool, 0..2)).unwrap();
    let mut window = device.bar(0).unwrap().map(.., Placement::In(place)).unwrap();
    window.register::<u32>(0).unwrap().write(7);
    for at in 1..63 {
        // Never next to where it is: its own page cannot be taken.
        let at = at * 7 % 61 + 2;
        let place = pool.take(pages(&pool, at..at + 2)).unwrap();
        let moved = window.relocate(Placement::In(place)).unwrap();
        pool.give(moved.old.unwrap()).unwrap();
        assert_eq!(window.addresses(), pages(&pool, at..at + 2));
        assert_eq!(window.register::<u32>(0).unwrap().read(), 7);
    }
    pool.give(window.into_reservation().unwrap()).unwrap();
    assert!(pool.take(pool.range()).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_pool_knows_which_pages_are_taken(steps in vec((0..24usize, 1..6usize, any::<bool>()), 1..80)) {
        let mut pool = pool(24);
        let mut held: Vec<Reservation> = Vec::new();
        let mut taken = [false; 24];
        for (at, count, gives) in steps {
            if gives && !held.is_empty() {
                let piece = held.swap_remove(at % held.len());
                let first = (piece.address() - pool.range().start) / PAGE;
                taken[first..first + piece.size() / PAGE].fill(false);
                pool.give(piece).unwrap();
                continue;
            }
            let wanted = at..at + count;
            let free = taken.get(wanted.clone()).is_some_and(|pages| !pages.contains(&true));
            let piece = pool.take(pages(&pool, wanted.clone()));
            prop_assert_eq!(piece.is_ok(), free);
            if let Ok(piece) = piece {
                taken[wanted].fill(true);
                held.push(piece);
            }
        }
    }
}
