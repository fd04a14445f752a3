//! A moved BAR is out of the driver's sight.

use crate::device::Bar;
use crate::probe;
use crate::raw::{self, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};

/// Up to 6.9 vfio-pci revokes the mappings on a list of its own, which a moved mapping is not on.
#[test]
fn moved_bar_escapes_revocation() {
    let bar = Bar::open("edu", 0);
    let (moving, staying) = (bar.map(0, bar.size), bar.map(0, bar.size));
    let there = raw::reserve(bar.size, PAGE);
    assert_eq!(probe::load(moving), probe::load(staying));
    // SAFETY: the mapping and the reservation are ours.
    let moved = unsafe { raw::mremap(moving, bar.size, MREMAP_MAYMOVE | MREMAP_FIXED, there) };
    let moved = moved.unwrap();
    bar.set_decoding(false);
    let (escaped, revoked) = (probe::load(moved), probe::load(staying));
    println!("with memory decoding off, the mapping that stayed answers {revoked:x?},");
    println!("and the one that was moved {escaped:x?} (None: it faults, as it should)");
    assert_eq!(revoked, None, "memory decoding is off");
    assert_ne!(escaped, None, "this kernel revokes moved mappings, too");
}
