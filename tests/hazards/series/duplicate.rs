//! Both ways to duplicate the mapping of a BAR: `MREMAP_DONTUNMAP`, and an old length of 0.

use std::io::{Error, Result};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::{WORDS, assert_marks, gib_entries};
use crate::device::{Bar, SUBJECTS, Scratch};
use crate::probe;
use crate::raw::{
    self, GIB, MAP_SHARED, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, peek, poke,
};

/// One of the ways.
struct Way {
    name: &'static str,
    call: unsafe fn(usize, usize, i32, usize) -> Result<usize>,
    flags: i32,
    /// For a mapping that the kernel does not duplicate.
    refusal: i32,
}

const WAYS: [Way; 2] = [
    Way {
        name: "DONTUNMAP",
        call: raw::mremap,
        flags: MREMAP_MAYMOVE | MREMAP_DONTUNMAP,
        refusal: libc::EINVAL,
    },
    Way {
        name: "an old length of 0",
        call: raw::duplicate,
        flags: MREMAP_MAYMOVE,
        refusal: libc::EFAULT,
    },
];

impl Way {
    /// # Safety
    /// The range is the caller's.
    unsafe fn anywhere(&self, old: usize, len: usize) -> Result<usize> {
        // SAFETY: the caller vouches for the range, and nothing is fixed.
        unsafe { (self.call)(old, len, self.flags, 0) }
    }

    /// # Safety
    /// Both ranges are the caller's.
    unsafe fn fixed(&self, old: usize, len: usize, place: usize) -> Result<usize> {
        // SAFETY: the caller vouches for both ranges.
        unsafe { (self.call)(old, len, self.flags | MREMAP_FIXED, place) }
    }
}

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

/// Both sides reach the device, fault without decoding, and return; the new one outlives the old one.
///
/// # Safety
/// Both map all of the BAR, and nobody else uses them.
unsafe fn assert_live(bar: &Bar, scratch: &Scratch, old: usize, new: usize) {
    // SAFETY: the caller vouches for both.
    unsafe {
        assert_aliases(scratch, old, new);

        let before = peek(old + scratch.offset);
        bar.set_decoding(false);
        for side in [old, new] {
            assert_eq!(probe::load(side + scratch.offset), None);
        }
        bar.set_decoding(true);
        for side in [old, new] {
            assert_eq!(peek(side + scratch.offset), before);
        }

        // A relocation: the old side is covered, and the new one lives on.
        raw::cover_with_memory(old, bar.size);
        assert_eq!(peek(old + scratch.offset), 0);
        assert_eq!(peek(new + scratch.offset), before);
        raw::munmap(old, bar.size);
        raw::munmap(new, bar.size);
    }
}

#[test]
fn both_sides_of_a_duplicated_bar_are_live() {
    for (way, subject) in WAYS.iter().flat_map(|way| SUBJECTS.iter().map(move |s| (way, s))) {
        for (touched, fixed) in [(false, false), (false, true), (true, false), (true, true)] {
            println!("{}: {}, touched: {touched}, fixed: {fixed}", way.name, subject.name);
            let bar = Bar::open(subject.name, subject.bar);
            let old = bar.map(0, bar.size);
            // SAFETY: the mapping and the reservation are ours.
            unsafe {
                if touched {
                    peek(old + subject.scratch.offset);
                }
                let new = match fixed {
                    false => way.anywhere(old, bar.size),
                    true => way.fixed(old, bar.size, raw::reserve(bar.size, 2 << 20)),
                };
                assert_live(&bar, &subject.scratch, old, new.unwrap());
            }
        }
    }
}

#[test]
fn a_part_is_duplicated_and_the_rest_left_alone() {
    for way in &WAYS {
        let bar = Bar::open("ivshmem64m", 2);
        let at = bar.map(0, bar.size);
        let (offset, len) = (16 << 20, 8 << 20);
        // SAFETY: the mapping is ours.
        unsafe {
            for word in (0..bar.size).step_by(1 << 20) {
                poke(at + word, word as u32);
            }
            let part = way.anywhere(at + offset, len).unwrap();
            for word in (0..bar.size).step_by(1 << 20) {
                assert_eq!(peek(at + word), word as u32, "{}", way.name);
            }
            for word in (0..len).step_by(1 << 20) {
                assert_eq!(peek(part + word), (offset + word) as u32, "{}", way.name);
            }
            raw::munmap(part, len);
            raw::munmap(at, bar.size);
        }
    }
}

#[test]
fn both_sides_of_duplicated_gib_entries_are_live() {
    for (way, shift) in WAYS.iter().flat_map(|way| [0, 2 << 20].map(|shift| (way, shift))) {
        let (bar, old) = gib_entries();
        let place = raw::reserve(bar.size + shift, GIB) + shift;
        // SAFETY: the mapping and the reservation are ours.
        unsafe {
            let new = way.fixed(old, bar.size, place).unwrap();
            for side in [old, new] {
                assert_marks(side);
            }
            bar.set_decoding(false);
            for side in [old, new] {
                assert_eq!(probe::load(side + WORDS[2]), None, "{}", way.name);
            }
            bar.set_decoding(true);
            for side in [old, new] {
                assert_marks(side);
                raw::munmap(side, bar.size);
            }
        }
    }
}

/// The page faults of this thread.
fn faults() -> i64 {
    // SAFETY: a structure of numbers, and the call fills it in.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &mut usage), 0);
        usage.ru_minflt
    }
}

/// The faults for a load from each of the first pages.
///
/// # Safety
/// They are mapped, and can be read.
unsafe fn faults_of_loads(at: usize, pages: usize) -> i64 {
    let before = faults();
    for page in 0..pages {
        // SAFETY: the caller vouches for it.
        unsafe { peek(at + page * PAGE) };
    }
    faults() - before
}

#[test]
fn an_old_length_of_0_leaves_the_source_populated() {
    const PAGES: usize = 16;
    let [dont_unmap, old_len_0] = &WAYS;
    let bar = Bar::open("ivshmem64m", 2);
    let old = bar.map(0, bar.size);
    // SAFETY: the mapping is ours.
    unsafe {
        // Once more, for the code that counts.
        faults_of_loads(old, PAGES);
        assert_eq!(faults_of_loads(old, PAGES), 0);

        let new = old_len_0.anywhere(old, bar.size).unwrap();
        assert_eq!(faults_of_loads(old, PAGES), 0);
        assert_ne!(faults_of_loads(new, PAGES), 0);
        raw::munmap(new, bar.size);

        // The other way round.
        let new = dont_unmap.anywhere(old, bar.size).unwrap();
        assert_eq!(faults_of_loads(new, PAGES), 0);
        assert_ne!(faults_of_loads(old, PAGES), 0);
        raw::munmap(new, bar.size);
        raw::munmap(old, bar.size);
    }
}

#[test]
fn a_duplicate_ends_where_its_source_ends() {
    let errno = |result: Result<usize>| result.unwrap_err().raw_os_error();
    let [_, old_len_0] = &WAYS;
    let bar = Bar::open("ivshmem64m", 2);
    let (len, offset) = (4 * PAGE, 8 * PAGE);
    let old = bar.map(offset, len);
    // SAFETY: the mapping is ours, and what is refused changes nothing.
    unsafe {
        poke(old + PAGE, 7);
        assert_eq!(errno(old_len_0.anywhere(old, len + PAGE)), Some(libc::EFAULT));
        assert_eq!(errno(old_len_0.anywhere(old + len - PAGE, 2 * PAGE)), Some(libc::EFAULT));
        // Over itself, or a part of itself.
        for (source, len, place) in
            [(old, len, old), (old, 2 * PAGE, old + PAGE), (old + PAGE, 2 * PAGE, old)]
        {
            assert_eq!(errno(old_len_0.fixed(source, len, place)), Some(libc::EINVAL));
        }
        assert_eq!(peek(old + PAGE), 7);

        // A part of itself that is not duplicated is a place as any other.
        let place = old + 2 * PAGE;
        assert_eq!(old_len_0.fixed(old, 2 * PAGE, place).unwrap(), place);
        assert_eq!((peek(old + PAGE), peek(place + PAGE)), (7, 7));
        raw::munmap(old, len);
    }
}

/// A perf ring: `VM_PFNMAP` and `VM_DONTEXPAND`, mapped at once, and never by a fault. For others see the
/// kernel's own selftest `mremap_duplicate`.
#[test]
fn what_cannot_be_faulted_in_is_not_duplicated() {
    const PERF_TYPE_SOFTWARE: u64 = 1;
    const PERF_COUNT_SW_DUMMY: u64 = 9;
    let mut attributes = [0u64; 16];
    attributes[0] = PERF_TYPE_SOFTWARE | (size_of_val(&attributes) as u64) << 32;
    attributes[1] = PERF_COUNT_SW_DUMMY;
    // SAFETY: the attributes are as long as they say; the file descriptor is checked, and nobody else's.
    let perf = unsafe {
        let attributes = attributes.as_ptr();
        let fd = libc::syscall(libc::SYS_perf_event_open, attributes, 0, -1, -1, 0);
        assert!(fd >= 0, "{}", Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    let len = 2 * PAGE;
    // SAFETY: no MAP_FIXED; then the mapping is ours.
    unsafe {
        let ring = raw::map_file(0, len, MAP_SHARED, perf.as_fd(), 0).unwrap();
        for way in &WAYS {
            let error = way.anywhere(ring, len).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(way.refusal), "{}", way.name);
            assert!(probe::load(ring).is_some());
        }
        raw::munmap(ring, len);
    }
}
