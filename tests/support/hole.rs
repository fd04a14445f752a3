//! While a window is relocated, no other mapping ever gets an address of its old or new range.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vfio_remap::space::Source;
use vfio_remap::{Placement, Reservation, Window};

const ROUNDS: usize = 10_000;
const PAGE: usize = 4096;

/// Maps pages with hints inside the ranges until told to stop; counts the hints that were followed.
fn intrude(ranges: &[Range<usize>; 2], stop: &AtomicBool, intrusions: &AtomicUsize) {
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let range = &ranges[turn % 2];
        let hint = range.start + (turn / 2 * PAGE) % range.len();
        // SAFETY: no MAP_FIXED; the page is unmapped again below.
        let page = unsafe {
            let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(hint as *mut _, PAGE, libc::PROT_NONE, anonymous, -1, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        if ranges.iter().any(|range| range.contains(&(page as usize))) {
            intrusions.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the page is ours.
        unsafe { libc::munmap(page, PAGE) };
    }
}

/// Relocates `window`, whose first word reads `word`, between two reservations, and duplicates it each
/// time, while others try to get in between; a reader of a duplicate must read the device throughout.
pub fn relocating_never_leaves_a_hole(mut window: Window, word: u32) {
    let size = window.addresses().len();
    let reserve = || Reservation::aligned(size, 2 << 20).unwrap();
    let (here, mut there) = (reserve(), reserve());
    let ranges = [here.range(), there.range()];
    window.relocate(Placement::In(here)).unwrap();
    let (stop, intrusions) = (AtomicBool::new(false), AtomicUsize::new(0));
    let reader = window.duplicate(Placement::Anywhere).unwrap().0;
    let reads = AtomicUsize::new(0);
    // Both ranges stay ours until the others have stopped.
    let _there = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| intrude(&ranges, &stop, &intrusions));
        }
        scope.spawn(|| {
            let register = reader.register::<u32>(0).unwrap();
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(register.read(), word);
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Whatever goes wrong below, the others are told to stop.
        let _stop = StopOnDrop(&stop);
        for round in 0..ROUNDS {
            let (duplicate, _) = window.duplicate(Placement::In(there)).unwrap();
            let register = duplicate.register::<u32>(0).unwrap();
            assert_eq!(register.read(), word, "round {round}");
            drop(register);
            there = duplicate.into_reservation().unwrap();
            let relocation = window.relocate(Placement::In(there)).unwrap();
            assert_eq!(relocation.report.source, Source::Released);
            there = relocation.old.unwrap();
            assert_eq!(window.register::<u32>(0).unwrap().read(), word, "round {round}");
        }
        there
    });
    assert_eq!(intrusions.into_inner(), 0, "another mapping got into a range of the window");
    assert!(reads.into_inner() > 100, "the reader hardly read");
}

/// The same, by munmap and then mmap: the test sees the hole.
pub fn munmap_then_mmap_leaves_a_hole(window: Window) {
    let size = window.addresses().len();
    // Far below where the kernel puts mappings of its own choice, so that nothing settles there unasked.
    let ranges = [0x30_0000_0000, 0x31_0000_0000].map(|start| start..start + size);
    let (stop, intrusions) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| intrude(&ranges, &stop, &intrusions));
        }
        let _stop = StopOnDrop(&stop);
        for round in 0..10 * ROUNDS {
            // Between two rounds the range is a hole, as it is between munmap and mmap; in between
            // it is taken if nobody else was quicker.
            if intrusions.load(Ordering::Relaxed) > 0 {
                break;
            }
            drop(window.duplicate(Placement::At(ranges[round % 2].start)));
        }
    });
    assert!(intrusions.into_inner() > 0, "nobody got into the hole");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
