//! A refused call can cost the range that it was to fill.

use crate::device::Bar;
use crate::probe;
use crate::raw::{self, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};

const MARK: u32 = 0x600d_da7a;

/// A page of memory with a mark in it.
fn marked_page() -> usize {
    let page = raw::map_memory(PAGE);
    // SAFETY: the page was mapped on the line above.
    unsafe { raw::poke(page, MARK) };
    assert_eq!(probe::load(page), Some(MARK));
    page
}

/// Up to 6.16 `mremap` unmaps the destination first, and refuses then.
#[test]
fn fixed_refusal_destroys_destination() {
    let bar = Bar::open("edu", 0);
    let old = bar.map(0, PAGE);
    let page = marked_page();
    let flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED;
    // SAFETY: both pages are ours.
    let error = unsafe { raw::mremap(old, PAGE, flags, page) }.unwrap_err();
    let left = probe::load(page);
    println!("mremap(MAYMOVE|DONTUNMAP|FIXED) of a BAR onto a page of memory: {error}");
    println!("the page of memory afterwards: {left:x?} (None: there is a hole)");
    assert_eq!(left, None, "this kernel keeps the destination");
}

/// `mmap(MAP_FIXED)` makes room before it asks the driver, on every kernel.
#[test]
fn refused_mmap_destroys_destination() {
    let bar = Bar::open("edu", 0);
    let page = marked_page();
    // SAFETY: the page is ours.
    let error = unsafe { bar.map_fixed(page, bar.size, PAGE) }.unwrap_err();
    let left = probe::load(page);
    println!("mmap(MAP_FIXED) past the end of a BAR onto a page of memory: {error}");
    println!("the page of memory afterwards: {left:x?} (None: there is a hole)");
    assert_eq!(left, None, "this kernel keeps the destination");
}
