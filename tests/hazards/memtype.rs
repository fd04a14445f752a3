//! The kernel's books of memory types (x86 PAT).

use crate::device::Bar;
use crate::raw::{self, PAGE};
use crate::{klog, probe};

/// 5.10 and 6.1 keep a book of a touched BAR's range, and do not find it when its head is unmapped.
#[test]
fn covering_the_head_warns() {
    let bar = Bar::open("ivshmem64m", 2);
    let at = bar.map(0, bar.size);
    assert!(probe::load(at).is_some());
    // SAFETY: the mapping is ours.
    unsafe { raw::cover_with_memory(at, PAGE) };
    let said = klog::lines_with("freeing invalid memtype");
    println!("after covering the first page of a touched BAR, in the kernel log: {said:?}");
    assert!(!said.is_empty(), "this kernel keeps its books");
}
