//! Relocation under contention, on shared memory: no other mapping ever gets an address of the window.

use std::sync::Arc;

use vfio_remap::transport::MemoryDevice;
use vfio_remap::{Device, Placement, Transport, Window};

use crate::common::contention;
use crate::support::alone::alone;

const WORD: u32 = 0x5a5a_1234;

fn window() -> Window {
    let memory = MemoryDevice::new(1 << 20).unwrap();
    memory.write_at(0, 0, &WORD.to_le_bytes()).unwrap();
    let device = Device::new(Arc::new(memory));
    device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap()
}

/// One after the other: both lay siege to the same addresses.
#[test]
fn relocating_never_leaves_a_hole_and_munmap_then_mmap_does() {
    alone(|| {
        contention::relocating_never_leaves_a_hole(window(), WORD);
        contention::munmap_then_mmap_leaves_a_hole(window(), WORD);
    });
}
