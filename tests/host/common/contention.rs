//! While a window is relocated, no other mapping ever gets an address of its old or new range.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vfio_remap::space::Source;
use vfio_remap::{Placement, Reservation, Window};

const ROUNDS: usize = 10_000;
const PAGE: usize = 4096;

/// Takes a window into a reservation; gives the reservation that it leaves. `None` where another
/// mapping was quicker.
type Step = fn(Window, Reservation) -> Option<(Window, Reservation)>;

/// Relocates a window, whose first word reads `word`, to and fro ten thousand times, duplicating it
/// each time, while others try to get in between; a reader of a duplicate reads the device throughout.
pub fn relocating_never_leaves_a_hole(window: Window, word: u32) {
    let (intrusions, reads) = under_siege(window, word, |mut window, there| {
        let duplicate = window.duplicate(Placement::In(there)).unwrap().0;
        let there = duplicate.into_reservation().unwrap();
        let relocation = window.relocate(Placement::In(there)).unwrap();
        assert_eq!(relocation.report.source, Source::Released);
        Some((window, relocation.old.unwrap()))
    });
    assert_eq!(intrusions, 0, "another mapping got into a range of the window");
    assert!(reads > 0, "the reader did not read");
}

/// The same by munmap and then mmap: the test sees the hole.
pub fn munmap_then_mmap_leaves_a_hole(window: Window, word: u32) {
    let (intrusions, _) = under_siege(window, word, |window, there| {
        let (from, to) = (window.addresses(), there.range());
        drop(there);
        let moved = window.duplicate(Placement::At(to.start)).ok()?.0;
        drop(window);
        Some((moved, Reservation::at(from.start, from.len()).ok()?))
    });
    assert!(intrusions > 0, "nobody got into the hole");
}

/// Takes steps until there were enough, or somebody got in; how often somebody did, and how often the
/// reader has read.
fn under_siege(mut window: Window, word: u32, step: Step) -> (usize, usize) {
    let size = window.addresses().len();
    // Far below where the kernel puts mappings of its own choice, so that nothing settles there unasked.
    let [here, mut there] =
        [0x30_0000_0000, 0x31_0000_0000].map(|start| Reservation::at(start, size).unwrap());
    let ranges = [here.range(), there.range()];
    window.relocate(Placement::In(here)).unwrap();
    let reader = window.duplicate(Placement::Anywhere).unwrap().0;
    let (stop, intrusions, reads) =
        (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    // Both ranges stay ours until the others have stopped.
    let kept = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| intrude(&ranges, &stop, &intrusions));
        }
        scope.spawn(|| {
            let register = reader.register::<u32>(0).unwrap();
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    assert_eq!(register.read(), word);
                }
                reads.fetch_add(64, Ordering::Relaxed);
                // There are four threads, and often two processors.
                std::thread::yield_now();
            }
        });
        // Whatever goes wrong below, the others are told to stop.
        let _stop = StopOnDrop(&stop);
        for round in 0..ROUNDS {
            (window, there) = step(window, there)?;
            assert_eq!(window.register::<u32>(0).unwrap().read(), word, "round {round}");
            if intrusions.load(Ordering::Relaxed) > 0 {
                break;
            }
        }
        Some((window, there))
    });
    // A step that failed has failed because somebody got in.
    (intrusions.into_inner() + usize::from(kept.is_none()), reads.into_inner())
}

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

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
