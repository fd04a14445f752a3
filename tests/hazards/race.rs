//! Moving, splitting and duplicating a BAR's mapping while another thread revokes it: what vfio-pci takes
//! out of the page tables, it takes out under locks that `mremap` and `munmap` do not hold.

use std::cell::Cell;
use std::fmt::{self, Display, Formatter};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::device::Bar;
use crate::probe::Loader;
use crate::raw::{self, GIB, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};
use crate::{child, klog};

/// A word in each GiB of the BAR.
const WORDS: [usize; 4] = [0x1234, GIB + 0x1234, 2 * GIB + 0x1234, 3 * GIB + 0x1234];

/// How long a race goes on, whatever the machine is busy with.
const LIMIT: Duration = Duration::from_secs(300);

/// How a race is ended.
pub struct Length {
    pub time: Duration,
    /// Fewer would not be a race: a machine that is slow is given more time for them.
    pub rounds: u32,
}

/// What came of a race.
pub struct Tally {
    rounds: u32,
    revocations: u32,
    time: Duration,
}

impl Display for Tally {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { rounds, revocations, time } = self;
        write!(f, "{rounds} rounds against {revocations} revocations in {time:?}")
    }
}

/// What revokes while something else is done to the mapping.
struct Race<'a> {
    bar: &'a Bar,
    /// Where the BAR is mapped. Whoever holds it keeps the mappings from being changed.
    places: Mutex<Vec<usize>>,
    over: AtomicBool,
}

impl Race<'_> {
    /// Revokes the mappings, sees that they stay revoked, and restores them, over and over.
    fn revoke(&self) -> u32 {
        let mut loader = Loader::new();
        let mut revocations = 0;
        while !self.over.load(Ordering::Relaxed) {
            self.bar.set_decoding(false);
            let places = self.places.lock().unwrap();
            for (place, word) in words(&places) {
                assert_eq!(loader.load(place + word), None, "{word:#x} escaped revocation");
            }
            drop(places);
            self.bar.set_decoding(true);
            revocations += 1;
        }
        revocations
    }
}

/// Ends a race when it is dropped, as it is where a round fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Every word of every mapping: the mapping, and the word's offset.
fn words(places: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    places.iter().flat_map(|place| WORDS.map(|word| (*place, word)))
}

/// Takes turns of `round`, which changes the mappings and the list of them, while another thread
/// revokes them. The list starts with one.
fn race(length: &Length, round: impl Fn(&Bar, &mut Vec<usize>)) -> Tally {
    let bar = Bar::open("ivshmem4g", 2);
    let at = bar.map_congruent();
    for word in WORDS {
        // SAFETY: the BAR was mapped on the line above, and is memory.
        unsafe { raw::poke(at + word, !word as u32) };
    }
    let race = Race { bar: &bar, places: Mutex::new(vec![at]), over: AtomicBool::new(false) };
    let started = Instant::now();
    let mut loader = Loader::new();
    let mut rounds = 0;
    let revocations = thread::scope(|scope| {
        let revoking = scope.spawn(|| race.revoke());
        let over = Over(&race.over);
        while !revoking.is_finished()
            && (started.elapsed() < length.time || rounds < length.rounds)
            && started.elapsed() < LIMIT
        {
            // Nobody else changes it, and to fill it in needs no lock.
            let places = race.places.lock().unwrap().clone();
            for (place, word) in words(&places) {
                // It may be revoked: a load that faults changes nothing.
                loader.load(place + word);
            }
            round(&bar, &mut race.places.lock().unwrap());
            rounds += 1;
        }
        drop(over);
        revoking.join().unwrap()
    });
    let time = started.elapsed();
    assert!(rounds >= length.rounds, "{rounds} rounds in {time:?}");
    assert!(revocations > 0);

    // What is left is the BAR, all of it.
    let places = race.places.into_inner().unwrap();
    for (place, word) in words(&places) {
        assert_eq!(loader.load(place + word), Some(!word as u32), "{word:#x}");
    }
    for place in places {
        // SAFETY: the mapping is ours.
        unsafe { raw::munmap(place, bar.size) };
    }
    Tally { rounds, revocations, time }
}

// What `mremap` leaves is a hole that the other thread may be given: it is never touched again, and
// each round has address space of its own.

/// The whole mapping moves from one multiple of 1 GiB to another.
pub fn moves(length: &Length) -> Tally {
    race(length, |bar, places| {
        let there = raw::reserve(bar.size, GIB);
        // SAFETY: the mapping and the reservation are ours.
        unsafe { raw::mremap(places[0], bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, there) }.unwrap();
        places[0] = there;
    })
}

/// The whole mapping is duplicated from one multiple of 1 GiB to another, by an old length of 0. Source and
/// copy live for some rounds, each copy being the source of the next.
pub fn duplicates(length: &Length) -> Tally {
    const LIVE: usize = 3;
    race(length, |bar, places| {
        let there = raw::reserve(bar.size, GIB);
        let here = places[places.len() - 1];
        // SAFETY: the mapping and the reservation are ours.
        unsafe { raw::duplicate(here, bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, there) }.unwrap();
        places.push(there);
        if places.len() > LIVE {
            // SAFETY: nobody else knows of it: the list is locked.
            unsafe { raw::munmap(places.remove(0), bar.size) };
        }
    })
}

/// In turns: the whole mapping is moved to where no entry of 1 GiB can be; a part of each entry is
/// unmapped, protected or moved, which splits the mapping or the entry. Then it is mapped anew.
pub fn splits(length: &Length) -> Tally {
    let odd = Cell::new(false);
    race(length, |bar, places| {
        odd.set(!odd.get());
        // SAFETY: the mapping is ours.
        unsafe { if odd.get() { misalign(bar, places[0]) } else { take_apart(bar, places[0]) } }
        places[0] = bar.map_congruent();
    })
}

/// Moves the mapping to an address that is congruent modulo 2 MiB, and unmaps it.
///
/// # Safety
/// All of the BAR is mapped here, and nobody uses it.
unsafe fn misalign(bar: &Bar, here: usize) {
    const HEAD: usize = 2 << 20;
    let there = raw::reserve(HEAD + bar.size, GIB);
    // SAFETY: the caller vouches for the mapping; the reservation is ours.
    unsafe {
        raw::mremap(here, bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, there + HEAD).unwrap();
        raw::munmap(there, HEAD + bar.size);
    }
}

/// Takes a part out of each entry of 1 GiB, each in another way, and unmaps the rest.
///
/// # Safety
/// All of the BAR is mapped here, and nobody uses it.
unsafe fn take_apart(bar: &Bar, here: usize) {
    const HOLE: usize = 3 * PAGE;
    let there = raw::reserve(HOLE, PAGE);
    let hole = here + 3 * GIB + GIB / 2;
    // SAFETY: the caller vouches for the mapping; the reservation is ours.
    unsafe {
        raw::reserve_fixed(here + GIB / 2 + PAGE, PAGE);
        raw::reserve_fixed(here + GIB + (2 << 20), 2 << 20);
        let part = (here + 2 * GIB + 5 * PAGE) as *mut libc::c_void;
        assert_eq!(libc::mprotect(part, PAGE, libc::PROT_READ), 0);
        raw::mremap(hole, HOLE, MREMAP_MAYMOVE | MREMAP_FIXED, there).unwrap();
        raw::munmap(there, HOLE);
        raw::munmap(here, hole - here);
        raw::munmap(hole + HOLE, here + bar.size - (hole + HOLE));
    }
}

/// The first version of the first patch moves entries of 1 GiB, and takes one that was revoked
/// meanwhile for a table: the table at physical address 0.
#[test]
fn move_against_revocation_oops() {
    let oopses = || klog::lines_with("Oops");
    let started = Instant::now();
    let ended =
        child::run_until("race::moves_until_the_kernel_dies", LIMIT, || !oopses().is_empty());
    let said = oopses();
    println!("after {:?}, the child that moved and revoked: {ended:?}", started.elapsed());
    println!("(None: it has not ended)");
    println!("in the kernel log: {said:?}");
    assert!(!said.is_empty(), "this kernel looks again before it moves a table");
}

#[test]
#[ignore = "a child of the test above: it may not survive"]
fn moves_until_the_kernel_dies() {
    let length = Length { time: Duration::from_secs(120), rounds: 1 };
    println!("{}", moves(&length));
}
