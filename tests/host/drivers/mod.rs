//! Three drivers of three kinds, each of a page, on models: what an author writes, and that it works.
//!
//! A NIC has rings of descriptors, and the same registers for each ring. A virtio device says where its
//! registers are by capabilities of one ID. An FPGA card takes its contents through a BAR of 64 MiB, and
//! interrupts when it is done.
#![forbid(unsafe_code)]

mod fpga;
mod fpga_model;
mod nic;
mod nic_model;
mod virtio;
mod virtio_model;

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::emulated::{Emulated, Model};
use vfio_remap::{Device, ErrorKind, Placement};

/// For what comes at once, on a machine that is busy.
const LONG: Duration = Duration::from_secs(60);

fn device(model: impl Model + 'static) -> Device {
    Device::new(Arc::new(Emulated::new(model).unwrap()))
}

/// Bytes that repeat nowhere near.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn a_nic_sends_and_receives_on_every_ring() {
    let device = device(nic_model::Loopback::default());
    let mut nic = nic::Nic::new(&device, LONG).unwrap();
    // Each ring goes round several times.
    for round in 0..5 * nic::ENTRIES as u32 {
        for ring in 0..nic::RINGS {
            let frame = pattern(64 + (round as usize * 7 + ring) % 1400, round + ring as u32);
            nic.send(ring, &frame).unwrap();
            assert_eq!(nic.receive(ring, LONG).unwrap(), frame, "round {round}, ring {ring}");
        }
    }
    // A burst fills a ring, and another is refused until there is room.
    let frames: Vec<_> = (1..nic::ENTRIES as u32).map(|seed| pattern(100, seed)).collect();
    for frame in &frames {
        nic.send(2, frame).unwrap();
    }
    for frame in &frames {
        assert_eq!(nic.receive(2, LONG).unwrap(), *frame);
    }
    drop(nic);
    device.close().unwrap();
}

#[test]
fn a_nic_s_rings_hold_the_window_by_one_name() {
    let device = device(nic_model::Loopback::default());
    let mut window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let nic = nic::Nic::in_window(&device, &window, LONG).unwrap();
    let failed = window.relocate(Placement::Anywhere).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::InUse);
    let text = failed.to_string();
    assert!(text.contains("it is held by the register block Adapter;"), "{text}");
    drop(nic);
    window.relocate(Placement::Anywhere).unwrap();
}

#[test]
fn a_virtio_device_is_found_by_capabilities_and_fills_buffers() {
    let device = device(virtio_model::Entropy::default());
    let mut entropy = virtio::Entropy::new(&device, LONG).unwrap();
    for round in 0..3 * virtio::SIZE {
        let len = 1 + round * 37 % 4096;
        let bytes = entropy.random(len, LONG).unwrap();
        assert_eq!(bytes, virtio_model::Entropy::bytes(len), "round {round}");
    }
    drop(entropy);
    device.close().unwrap();
}

#[test]
fn a_virtio_device_without_its_capabilities_is_refused() {
    for missing in [1, 2] {
        let device = device(virtio_model::Entropy::without(missing));
        let error = virtio::Entropy::new(&device, LONG).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    let device = device(virtio_model::Entropy::refusing());
    let error = virtio::Entropy::new(&device, LONG).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn an_fpga_is_loaded_through_64_mib_of_bar_and_checks_it() {
    let device = device(fpga_model::Card::default());
    let fpga = fpga::Fpga::new(&device).unwrap();
    let contents = pattern(5 << 20, 1);
    // From where no word begins, in the last part of the BAR.
    let place = (58 << 20) + 3;
    fpga.load(place, &contents).unwrap();
    assert_eq!(fpga.checksum(place, contents.len(), LONG).unwrap(), crc32fast::hash(&contents));
    let mut back = vec![0; contents.len()];
    fpga.save(place, &mut back).unwrap();
    assert!(back == contents);
    let error = fpga.load((64 << 20) - 1, &[0; 2]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    let error = fpga.checksum(63 << 20, 2 << 20, LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    drop(fpga);
    device.close().unwrap();
}

#[test]
fn an_fpga_that_does_not_answer_is_late() {
    let device = device(fpga_model::Card::silent());
    let fpga = fpga::Fpga::new(&device).unwrap();
    let error = fpga.checksum(0, 16, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}
