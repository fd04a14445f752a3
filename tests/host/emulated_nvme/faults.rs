//! Injected faults, each at a command.

use std::sync::Arc;

use vfio_remap::emulated::nvme::{Fault, Faults, Namespace};
use vfio_remap::emulated::{Emulated, Nvme};

use super::{DATA, Driver, IOVA};
use crate::support::{edu, shared, watch};

/// A driver, whose next command is struck by a fault.
fn faulty(fault: Fault) -> (Driver, Faults) {
    // Two make the queues, one writes what is not flushed.
    let faults = Faults::new([(3, fault)]);
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    let nvme = Nvme::new(vec![namespace]).with_faults(&faults);
    let mut driver = Driver::new(Arc::new(Emulated::new(nvme).unwrap()));
    driver.put(1, 512);
    driver.io(0x01, 1, 1, 0).unwrap();
    assert_eq!((faults.injected().len(), faults.remaining()), (0, 1));
    (driver, faults)
}

/// Submits the command that is struck: a write of `2` to block 2.
fn struck(driver: &mut Driver, faults: &Faults) {
    driver.put(2, 512);
    driver.submit(1, 0x01, 1, [IOVA + DATA as u64, 0], [2, 0, 0]);
    watch::until("the fault", || faults.injected().len() == 1 && faults.remaining() == 0);
}

fn posted(driver: &Driver, queue: usize, index: usize) -> u16 {
    let id = shared::get(&driver.memory, queue * 0x2000 + 0x1000 + 16 * index + 12, 2);
    u16::from_le_bytes(id.try_into().unwrap())
}

#[test]
fn a_fatal_fault_stops_the_controller_until_it_is_reset() {
    let (mut driver, faults) = faulty(Fault::FatalStatus);
    struck(&mut driver, &faults);
    watch::until("a fatal status", || edu::read(&*driver.device, 0x1c) & 2 != 0);
    driver.start();
    assert!(driver.holds(1, 1, 1, 512) && driver.holds(1, 2, 0, 512), "it was not carried out");
}

#[test]
fn a_lost_completion_is_of_a_command_that_was_carried_out() {
    let (mut driver, faults) = faulty(Fault::LostCompletion);
    struck(&mut driver, &faults);
    assert!(driver.holds(1, 2, 2, 512), "the completion of the read is the next");
    assert_eq!(faults.injected(), [(3, Fault::LostCompletion)]);
}

#[test]
fn a_late_completion_comes_after_a_later_one_or_when_idle() {
    let (mut driver, faults) = faulty(Fault::LateCompletion);
    struck(&mut driver, &faults);
    driver.complete(1).unwrap();

    let faults = Faults::new([(2, Fault::LateCompletion)]);
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    let device = Emulated::new(Nvme::new(vec![namespace]).with_faults(&faults)).unwrap();
    let mut driver = Driver::new(Arc::new(device));
    // Both are there before the controller looks.
    let config = driver.device.clone();
    config.write_at(7, 4, &2u16.to_le_bytes()).unwrap();
    for _ in 0..2 {
        driver.submit(1, 0x00, 1, [0; 2], [0; 3]);
    }
    config.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
    watch::until("both completions", || posted(&driver, 1, 0) != 0 && posted(&driver, 1, 1) != 0);
    assert_eq!(
        (posted(&driver, 1, 0), posted(&driver, 1, 1)),
        (driver.next_id, driver.next_id - 1)
    );
}

#[test]
fn a_reset_keeps_written_blocks_and_a_loss_of_power_does_not() {
    for (fault, kept) in [(Fault::Reset, 1), (Fault::PowerLoss, 0)] {
        let (mut driver, faults) = faulty(fault);
        struck(&mut driver, &faults);
        assert_eq!(edu::read(&*driver.device, 0x1c), 0);
        assert_eq!(edu::read(&*driver.device, 0x14), 0);
        driver.start();
        assert!(driver.holds(1, 1, kept, 512) && driver.holds(1, 2, 0, 512), "{fault:?}");
    }
}

#[test]
fn a_pulled_controller_reads_all_ones_until_it_is_plugged_in() {
    let (mut driver, faults) = faulty(Fault::Removal);
    struck(&mut driver, &faults);
    let device = driver.device.clone();
    let vendor = || {
        let mut id = [0; 2];
        device.read_at(7, 0, &mut id).unwrap();
        u16::from_le_bytes(id)
    };
    assert_eq!((vendor(), edu::read(&*device, 0x1c)), (0xffff, u32::MAX));
    device.reset().unwrap();
    edu::write(&*device, 0x14, 0x0046_0001);
    assert_eq!((vendor(), edu::read(&*device, 0x14)), (0xffff, u32::MAX));
    faults.plug_in();
    assert_eq!((vendor(), edu::read(&*device, 0x1c)), (0x1b36, 0));
    driver.start();
    assert!(driver.holds(1, 1, 0, 512), "it was not flushed");
}
