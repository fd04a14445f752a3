//! What the patches of `lab/kernel` promise, on the kernel that has them: run by `cargo lab test`, which
//! also wants the kernel log clean.

mod dax;
mod duplicate;
mod race;
mod selftests;

use crate::device::Bar;
use crate::probe;
use crate::raw::{self, GIB, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, peek, poke};

/// A word in each GiB of the BAR.
const WORDS: [usize; 4] = [0x1234, GIB + 0x1234, 2 * GIB + 0x1234, 3 * GIB + 0x1234];

/// A BAR of 4 GiB, faulted in as four entries, with a mark in each GiB.
fn gib_entries() -> (Bar, usize) {
    let bar = Bar::open("ivshmem4g", 2);
    let at = bar.map_congruent();
    for word in WORDS {
        // SAFETY: the BAR was mapped above, and is memory.
        unsafe { poke(at + word, word as u32) };
    }
    (bar, at)
}

/// # Safety
/// All of the BAR is mapped there.
unsafe fn assert_marks(at: usize) {
    for word in WORDS {
        // SAFETY: the caller vouches for it.
        assert_eq!(unsafe { peek(at + word) }, word as u32, "{word:#x}");
    }
}

#[test]
fn gib_entries_move_and_leave_nothing_behind() {
    // Congruent, congruent only modulo 2 MiB, and not even that.
    for shift in [0, 2 << 20, PAGE] {
        let (bar, old) = gib_entries();
        let new = raw::reserve(bar.size + shift, GIB) + shift;
        // SAFETY: the mapping and the reservation are ours.
        unsafe {
            assert_marks(old);
            let moved = raw::mremap(old, bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, new).unwrap();
            raw::cover_with_memory(old, bar.size);
            for word in WORDS {
                assert_eq!(peek(old + word), 0, "the old address reaches the device");
            }
            assert_marks(moved);
            bar.set_decoding(false);
            assert_eq!(probe::load(moved + WORDS[1]), None);
            bar.set_decoding(true);
            assert_marks(moved);
            raw::munmap(old, bar.size);
            raw::munmap(moved, bar.size);
        }
    }
}

#[test]
fn a_part_of_a_gib_entry_moves_and_the_rest_stays() {
    let (bar, at) = gib_entries();
    let (part, len) = (GIB + GIB / 2 + PAGE, 3 * PAGE);
    // SAFETY: the mapping is ours.
    unsafe {
        poke(at + part + PAGE, 7);
        assert_eq!(peek(at + part + PAGE), 7);
        let place = raw::reserve(len, PAGE);
        let moved = raw::mremap(at + part, len, MREMAP_MAYMOVE | MREMAP_FIXED, place).unwrap();
        raw::cover_with_memory(at + part, len);
        assert_eq!((peek(at + part + PAGE), peek(moved + PAGE)), (0, 7));
        assert_marks(at);
        raw::munmap(moved, len);
        raw::munmap(at, bar.size);
    }
}

#[test]
fn a_mapping_is_split_inside_of_a_gib_entry() {
    let (bar, at) = gib_entries();
    // SAFETY: the mapping is ours.
    unsafe {
        // In one entry at a page, in another at a multiple of 2 MiB.
        for part in [GIB / 2 + PAGE, GIB + GIB / 2] {
            raw::munmap(at + part, PAGE);
            assert_eq!(probe::load(at + part), None);
            assert_marks(at);
        }
        // Where only the mapping is split, and no page table has to be touched.
        let part = (at + 2 * GIB + 5 * PAGE) as *mut libc::c_void;
        assert_eq!(libc::madvise(part, PAGE, libc::MADV_DONTFORK), 0);
        assert_marks(at);
        raw::munmap(at, bar.size);
    }
}
