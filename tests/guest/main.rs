//! What needs a kernel with VFIO and real devices: run by `cargo lab test` in its guests.

mod address_spaces;
mod bad_input;
mod binding;
mod by_address;
#[path = "../host/common/mod.rs"]
mod common;
mod dma;
mod driver;
mod ethernet;
mod events;
mod file_mappings;
mod foreign_file;
mod lab;
mod low_power;
mod machine;
mod msi;
mod noiommu_mode;
mod nvme;
mod nvme_removal;
mod passthrough;
mod peers;
mod remap;
mod removal;
mod reset;
mod revocation;
mod scale;
mod shared_eventfd;
mod sriov;

use vfio_remap::Device;

use common::{contention, guest_memory, interrupts_in_turn, leftovers, probe};

#[test]
fn ten_thousand_relocations_leave_no_hole() {
    let device = lab::open("edu");
    let window = device.bar(0).unwrap().map(.., vfio_remap::Placement::Anywhere).unwrap();
    contention::relocating_never_leaves_a_hole(window, lab::EDU_ID);
}

#[test]
fn the_same_test_sees_the_hole_that_munmap_then_mmap_leaves() {
    let device = lab::open("edu");
    let window = device.bar(0).unwrap().map(.., vfio_remap::Placement::Anywhere).unwrap();
    contention::munmap_then_mmap_leaves_a_hole(window, lab::EDU_ID);
}

/// A device is closed at the end of a test, and says so if not.
fn close(device: Device) {
    device.close().unwrap();
}
