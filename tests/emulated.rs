//! Models in this process.
#![cfg(feature = "emulated")]

#[path = "support/edu.rs"]
mod edu;
#[path = "support/shared.rs"]
mod shared;

use std::os::fd::AsFd;
use std::sync::Arc;

use vfio_remap::device::{Interrupt, Iova, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::{Bus, Edu, Emulated, Model, RegionInfo, Shape, Transport, irq_index};
use vfio_remap::{Device, ErrorKind, Result};

#[test]
fn edu_does_all_that_is_documented() {
    let edu = Emulated::new(Edu::new()).unwrap();
    edu::does_all_that_is_documented(&edu);
    let device = Device::new(Arc::new(edu));
    edu::is_reached_through_windows(&device);
    assert_eq!(device.config().unwrap().vendor().unwrap(), 0x1234);
    device.close().unwrap();
}

#[test]
fn accesses_of_another_width_read_ones_and_change_nothing() {
    let edu = Emulated::new(Edu::new()).unwrap();
    edu::write(&edu, 4, 7);
    for data in [&[0; 1][..], &[0; 2], &[0; 3], &[0; 8], &[0; 100]] {
        edu.write_at(0, 4, data).unwrap();
        let mut read = vec![0; data.len()];
        edu.read_at(0, 4, &mut read).unwrap();
        assert!(read.iter().all(|&byte| byte == 0xff), "{} bytes", data.len());
    }
    assert_eq!(edu::read(&edu, 4), !7);
}

#[test]
fn what_a_device_does_not_have_is_an_error() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(edu.read_at(1, 0, &mut [0; 4])), ErrorKind::NotFound);
    assert_eq!(kind(edu.read_at(u32::MAX, 0, &mut [0; 4])), ErrorKind::NotFound);
    assert_eq!(kind(edu.read_at(0, (1 << 20) - 3, &mut [0; 4])), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.write_at(0, u64::MAX, &[0; 4])), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.backing(7).map(drop)), ErrorKind::NotMappable);
    assert_eq!(kind(edu.irq(5).map(drop)), ErrorKind::NotFound);
    let event = edu::event();
    let too_many = [Some(event.as_fd()); 2];
    assert_eq!(kind(edu.set_irqs(irq_index::MSI, 0, &too_many)), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.set_irqs(irq_index::MSIX, 0, &too_many)), ErrorKind::OutOfRange);
    assert_eq!(kind(edu.trigger_irqs(irq_index::MSI, 1..2)), ErrorKind::OutOfRange);
}

#[test]
fn bus_mastering_must_be_on_for_transfers() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let memory = shared::memory(0x1000, true);
    shared::put(&memory, 0, &[7; 8]);
    edu.dma_map(0, &memory, Access::ReadWrite).unwrap();
    let mut expected = [0; 8];
    for on in [false, true] {
        edu.write_at(7, 4, &(u16::from(on) << 2).to_le_bytes()).unwrap();
        for (offset, value) in [(0x80, 0), (0x88, 0x4_0000), (0x90, 8), (0x98, 1u64)] {
            edu.write_at(0, offset, &value.to_le_bytes()).unwrap();
        }
        edu::until("a transfer", || edu::read(&edu, 0x98) & 1 == 0);
        if on {
            expected = [7; 8];
        }
        let mut data = [0; 8];
        edu.read_at(0, 0x4_0000, &mut data).unwrap();
        assert_eq!(data, expected, "bus mastering: {on}");
    }
}

#[test]
fn decoding_and_bus_mastering_are_off_after_a_reset_and_mappings_stay() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let space = device.dma().unwrap();
    let buffer = space.buffer(4096).unwrap();
    let config = device.config().unwrap();
    for _ in 0..2 {
        config.set_memory_decoding(true).unwrap();
        config.set_bus_mastering(true).unwrap();
        device.reset().unwrap();
        assert!(!config.memory_decoding().unwrap() && !config.bus_mastering().unwrap());
        assert_eq!(space.mappings(), 1);
    }
    drop(buffer);
}

#[test]
fn devices_over_one_model_share_its_io_addresses() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let [one, other] = [(); 2].map(|()| Device::new(Arc::new(edu.clone())));
    shared::io_addresses_are_shared(&one, &other);
}

#[test]
fn mappings_beyond_the_limit_are_too_many() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let memory = shared::memory(0x1000, false);
    let room = edu.dma_limits().unwrap().mappings.unwrap();
    for page in 0..u64::from(room) {
        edu.dma_map(page << 12, &memory, Access::ReadWrite).unwrap();
    }
    let space = Device::new(Arc::new(edu)).dma().unwrap();
    let at = IovaPlacement::At(Iova(1 << 40));
    let error = space.map(memory, at, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooManyMappings, "{error}");
    assert_eq!(error.errno(), Some(libc::ENOSPC));
    assert!(!error.advice().is_empty(), "{error}");
}

#[test]
fn a_device_that_tells_of_no_events_says_so_and_what_to_do() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let error = device.events().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(!error.advice().is_empty(), "{error}");
    // Nothing is half-done.
    device.close().unwrap();
}

#[test]
fn what_a_transport_cannot_unmask_by_an_eventfd_it_leaves_to_be_unmasked_by_a_call() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let mut vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    let error = vectors.enable_resample().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.advice().contains("set_masked"), "{error}");
    assert!(vectors.resample_fd().is_none());
    vectors.set_masked(0, false).unwrap();
}

/// A model whose mapped part leaves its region.
struct Liar;

impl Model for Liar {
    fn shape(&self) -> Shape {
        let mut region = RegionInfo::mappable(0x1000);
        region.areas = Some(vec![0..0x2000]);
        Shape::new("liar", vec![region])
    }

    fn read(&mut self, _: &Bus, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: &Bus, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self, _: &Bus) {}
}

#[test]
fn mapped_parts_that_leave_their_region_are_refused() {
    assert_eq!(Emulated::new(Liar).unwrap_err().kind(), ErrorKind::OutOfRange);
}
