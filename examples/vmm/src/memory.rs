//! The guest's physical addresses: memory from 0 on, then two windows for the BARs of PCI devices.

use std::fs::File;
use std::ops::Range;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

pub type GuestMemory = GuestMemoryMmap<()>;

const GIB: u64 = 1 << 30;
/// For 32-bit BARs. It ends before the interrupt controllers.
pub const LOW_WINDOW: Range<u64> = 3 * GIB..0xfe00_0000;
/// For 64-bit BARs.
pub const HIGH_WINDOW: Range<u64> = 4 * GIB..68 * GIB;

/// The least and the most memory, in MiB. A kernel and its initramfs may need more than the least.
pub const LEAST: u64 = 16;
pub const MOST: u64 = LOW_WINDOW.start >> 20;

/// Where a PC has read-only memory and devices.
pub const LEGACY: Range<u64> = 0xa_0000..0x10_0000;
/// Where in it a kernel looks for the MP table.
pub const BIOS: u64 = 0xf_0000;

/// The kinds of memory in the map that a kernel gets (ACPI 6.5 §15).
const USABLE: u32 = 1;
const RESERVED: u32 = 2;

/// Makes so many MiB of memory for the guest. It is a file, which a vfio-user server maps or reads.
pub fn create(size: u64) -> Result<GuestMemory> {
    let size = size << 20;
    let what = "cannot make the guest's memory";
    let file = File::from(memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC).context(what)?);
    file.set_len(size).context(what)?;
    let region = (GuestAddress(0), size as usize, Some(FileOffset::new(file, 0)));
    GuestMemory::from_ranges_with_files([region]).context(what)
}

/// The map of the addresses up to the first window: start, size and kind of each range. What follows the memory is
/// reserved: Linux, which has no other description of the windows, would place BARs there.
pub fn map(size: u64) -> [(u64, u64, u32); 4] {
    [
        (0, LEGACY.start, USABLE),
        (LEGACY.start, LEGACY.end - LEGACY.start, RESERVED),
        (LEGACY.end, size - LEGACY.end, USABLE),
        (size, LOW_WINDOW.start - size, RESERVED),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_no_gap_below_the_first_window() {
        for size in [LEAST, 256, MOST].map(|size| size << 20) {
            let mut reached = 0;
            for (start, length, _) in map(size) {
                assert_eq!(start, reached);
                reached = start + length;
            }
            assert_eq!(reached, LOW_WINDOW.start);
        }
    }
}
