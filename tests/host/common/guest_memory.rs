//! The memory of a guest, and what a device does in it.

use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::device::{Interrupt, Iova, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::{Device, ErrorKind};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use vfio_remap_edu::{Direction, Edu};

pub const LOW: u64 = 0x1_0000;
pub const HIGH: u64 = 0x200_0000;
pub const SIZE: usize = 0x1_0000;

/// Two regions, the second of a file, of which it leaves the first page out.
pub fn guest() -> GuestMemoryMmap {
    const OFFSET: u64 = 4096;
    let file = File::from(memfd_create("vfio-remap-guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(OFFSET + SIZE as u64).unwrap();
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(LOW), SIZE, None),
        (GuestAddress(HIGH), SIZE, Some(FileOffset::new(file, OFFSET))),
    ])
    .unwrap()
}

/// All of a guest's memory is reached at the guest's own addresses, and held while it is; what cannot be
/// mapped whole is not mapped at all.
pub fn is_reached_whole_or_not_at_all(device: Device) {
    let space = device.dma().unwrap();
    let memory = guest();
    // In the way of the second region only.
    let buffer = space.buffer(4096).unwrap();
    let at = IovaPlacement::At(Iova(HIGH + 0x1000));
    let obstacle = space.map(buffer.memory(), at, Access::ReadOnly).unwrap();
    let error = space.map_guest(&memory, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddressTaken, "{error}");
    assert!(error.to_string().contains(&format!("{HIGH:#x}")), "{error}");
    assert_eq!(space.mapping_count(), 2);
    drop((obstacle, buffer));

    let mapping = space.map_guest(&memory, Access::ReadWrite).unwrap();
    let places: Vec<_> = mapping.regions().iter().map(|region| region.iova()).collect();
    assert_eq!(places, [Iova(LOW), Iova(HIGH)]);
    let pattern: Vec<u8> = (0..4096u32).map(|n| (n * 5 + 1) as u8).collect();
    memory.write_slice(&pattern, GuestAddress(LOW + 0x3000)).unwrap();
    let edu = Edu::new(device, Interrupt::Msi).unwrap();
    edu.transfer(LOW + 0x3000, 0x4_0000, 4096, Direction::ToDevice).unwrap();
    edu.transfer(0x4_0000, HIGH + 0xf000, 4096, Direction::ToMemory).unwrap();
    let mut bytes = vec![0; 4096];
    memory.read_slice(&mut bytes, GuestAddress(HIGH + 0xf000)).unwrap();
    assert_eq!(bytes, pattern);
    // The device may go on after the program has let go of the guest.
    drop(memory);
    edu.transfer(0x4_0000, LOW, 4096, Direction::ToMemory).unwrap();
    drop(mapping);
    assert_eq!(space.mapping_count(), 1, "the driver's own buffer is left");
    drop(space);
    edu.close().unwrap();
}
