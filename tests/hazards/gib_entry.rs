//! Page-table entries of 1 GiB that map a device, and the code that does not know them.

use std::time::Duration;

use crate::device::Bar;
use crate::raw::{self, GIB, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};
use crate::{child, klog};

const MARK: u32 = 0xdec0_ded0;

/// A BAR of 4 GiB whose first GiB has been faulted in as one entry.
fn touched() -> (Bar, usize) {
    let bar = Bar::open("ivshmem4g", 2);
    let at = bar.map_congruent();
    // SAFETY: the BAR was mapped on the line above, and is memory.
    unsafe { raw::poke(at, MARK) };
    (bar, at)
}

/// `move_page_tables` takes the entry for a bad one and clears it, without flushing the TLB.
#[test]
fn gib_entry_corruption() {
    let (bar, old) = touched();
    let new = raw::reserve(bar.size, GIB);
    // SAFETY: the mapping and the reservation are ours. What is mapped at the old address in the end
    // is a page of zeros of ours.
    let found = unsafe {
        assert_eq!(raw::peek(old), MARK);
        raw::mremap(old, bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, new).unwrap();
        raw::cover_with_memory(old, PAGE);
        raw::peek(old)
    };
    println!("the old address, after the move and with a fresh page mapped there: {found:#x}");
    println!("(0 is the page; {MARK:#x} is the device)");
    let said = klog::lines_with("bad pud");
    println!("\"bad pud\" in the kernel log: {} lines", said.len());
    assert!(!said.is_empty() || found == MARK, "this kernel moves such entries");
}

/// Splitting a mapping inside of such an entry looks for the table below it, where there is none. The
/// kernel kills the process while that holds the lock on its address space.
#[test]
fn gib_entry_split_oops() {
    let status = child::run("gib_entry::unmaps_a_page_inside", Duration::from_secs(5));
    let said = klog::lines_with("BUG: unable to handle");
    println!("the child that unmapped one page: {status:?} (None: it has not ended)");
    println!("in the kernel log: {said:?}");
    assert!(!said.is_empty(), "this kernel splits such mappings");
}

#[test]
#[ignore = "a child of the test above: it may not survive"]
fn unmaps_a_page_inside() {
    let (_bar, at) = touched();
    // SAFETY: the mapping is ours.
    unsafe { raw::munmap(at + GIB / 2 + PAGE, PAGE) };
}
