//! What the patches of `lab/kernel` promise, on the kernel that has them: run by `cargo lab test`, which
//! also wants the kernel log clean.

mod dax;
mod race;
mod selftests;

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use crate::device::{Bar, SUBJECTS, Scratch};
use crate::probe;
use crate::raw::{
    self, GIB, MAP_SHARED, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, peek, poke,
};

/// What is written through one mapping is read through the other.
///
/// # Safety
/// Both map all of the BAR.
unsafe fn assert_aliases(scratch: &Scratch, one: usize, other: usize) {
    let Scratch { offset, value, answer } = scratch;
    for (one, other) in [(one, other), (other, one)] {
        for value in [*value, 0, *value] {
            // SAFETY: the caller vouches for both.
            unsafe {
                poke(one + offset, value);
                assert_eq!(peek(other + offset), answer(value));
            }
        }
    }
}

#[test]
fn dont_unmap_of_a_bar_leaves_both_sides_live() {
    for subject in &SUBJECTS {
        let scratch = &subject.scratch;
        for touched in [false, true] {
            for fixed in [false, true] {
                let bar = Bar::open(subject.name, subject.bar);
                let old = bar.map(0, bar.size);
                let (flags, place) = match fixed {
                    false => (MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0),
                    true => {
                        let place = raw::reserve(bar.size, 2 << 20);
                        (MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, place)
                    }
                };
                // SAFETY: the mapping and the reservation are ours, and the aliases map the BAR.
                unsafe {
                    if touched {
                        peek(old + scratch.offset);
                    }
                    let new = raw::mremap(old, bar.size, flags, place).unwrap();
                    assert_aliases(scratch, old, new);

                    let before = peek(old + scratch.offset);
                    bar.set_decoding(false);
                    for side in [old, new] {
                        assert_eq!(probe::load(side + scratch.offset), None, "{}", subject.name);
                    }
                    bar.set_decoding(true);
                    for side in [old, new] {
                        assert_eq!(peek(side + scratch.offset), before, "{}", subject.name);
                    }

                    // A relocation: the old side is covered, and the new one lives on.
                    raw::cover_with_memory(old, bar.size);
                    assert_eq!(peek(old + scratch.offset), 0);
                    assert_eq!(peek(new + scratch.offset), before);
                    raw::munmap(old, bar.size);
                    raw::munmap(new, bar.size);
                }
            }
        }
    }
}

#[test]
fn dont_unmap_of_a_part_leaves_the_rest_alone() {
    let bar = Bar::open("ivshmem64m", 2);
    let at = bar.map(0, bar.size);
    let (offset, len) = (16 << 20, 8 << 20);
    // SAFETY: the mapping is ours.
    unsafe {
        for word in (0..bar.size).step_by(1 << 20) {
            poke(at + word, word as u32);
        }
        let flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP;
        let part = raw::mremap(at + offset, len, flags, 0).unwrap();
        for word in (0..bar.size).step_by(1 << 20) {
            assert_eq!(peek(at + word), word as u32);
        }
        for word in (0..len).step_by(1 << 20) {
            assert_eq!(peek(part + word), (offset + word) as u32);
        }
        raw::munmap(part, len);
        raw::munmap(at, bar.size);
    }
}

/// A perf ring: `VM_PFNMAP` and `VM_DONTEXPAND`, mapped at once, and never by a fault.
#[test]
fn dont_unmap_of_what_cannot_be_faulted_in_is_refused() {
    const PERF_TYPE_SOFTWARE: u64 = 1;
    const PERF_COUNT_SW_DUMMY: u64 = 9;
    let mut attributes = [0u64; 16];
    attributes[0] = PERF_TYPE_SOFTWARE | (size_of_val(&attributes) as u64) << 32;
    attributes[1] = PERF_COUNT_SW_DUMMY;
    // SAFETY: the attributes are as long as they say; the file descriptor is checked, and nobody else's.
    let perf = unsafe {
        let attributes = attributes.as_ptr();
        let fd = libc::syscall(libc::SYS_perf_event_open, attributes, 0, -1, -1, 0);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    let len = 2 * PAGE;
    // SAFETY: no MAP_FIXED; then the mapping is ours.
    unsafe {
        let ring = raw::map_file(0, len, MAP_SHARED, perf.as_fd(), 0).unwrap();
        let error = raw::mremap(ring, len, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert!(probe::load(ring).is_some());
        raw::munmap(ring, len);
    }
}

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
fn dont_unmap_of_gib_entries_leaves_both_sides_live() {
    for shift in [0, 2 << 20] {
        let (bar, old) = gib_entries();
        let place = raw::reserve(bar.size + shift, GIB) + shift;
        // SAFETY: the mapping and the reservation are ours.
        unsafe {
            let flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED;
            let new = raw::mremap(old, bar.size, flags, place).unwrap();
            for side in [old, new] {
                assert_marks(side);
            }
            bar.set_decoding(false);
            for side in [old, new] {
                assert_eq!(probe::load(side + WORDS[2]), None);
            }
            bar.set_decoding(true);
            for side in [old, new] {
                assert_marks(side);
                raw::munmap(side, bar.size);
            }
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
