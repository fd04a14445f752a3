//! Emulated devices in the hands of a guest.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_remap::Transport;
use vfio_remap::emulated::igb::Port;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Edu, Emulated, Igb, Nvme};

use super::monitor::{HIGH, LOW, Monitor, apertures};

pub fn edu() -> Arc<dyn Transport> {
    Arc::new(Emulated::new(Edu::new()).unwrap())
}

pub fn nvme() -> Arc<dyn Transport> {
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    Arc::new(Emulated::new(Nvme::new(vec![namespace])).unwrap())
}

pub fn igb() -> Arc<dyn Transport> {
    let (port, _) = Port::pair();
    Arc::new(Emulated::new(Igb::new([2, 0, 0, 0, 0, 1]).with_wire(port)).unwrap())
}

fn fires(eventfd: Option<BorrowedFd<'_>>) {
    let mut polled = [PollFd::new(eventfd.expect("it is connected"), PollFlags::POLLIN)];
    assert_eq!(poll(&mut polled, PollTimeout::from(30_000u16)), Ok(1));
}

#[test]
fn a_guest_drives_edu_through_slots_and_traps() {
    let mut monitor = Monitor::new(edu(), &apertures());
    for base in [LOW.start, HIGH.start - (1 << 29), LOW.start + (1 << 20)] {
        monitor.move_bar(0, base & 0xfff0_0000, false);
        let base = base & 0xfff0_0000;
        if base < LOW.start {
            continue;
        }
        assert_eq!(monitor.mapped(), [(base + 0x1_0000, 0x1_0000), (base + 0x4_0000, 0x1_0000)]);
        assert_eq!(
            (monitor.read_memory(base), monitor.load(base + 0x1_0000)),
            (Some(0x0100_00ed), Some(0x0100_00ed))
        );
        monitor.write_memory(base + 0x1_0004, &0x1234u32.to_le_bytes());
        let end = Instant::now() + Duration::from_secs(30);
        while monitor.load(base + 0x1_0008) != Some(!0x1234) {
            assert!(Instant::now() < end, "the model does not see the window");
        }
        monitor.write_memory(base + 0x1_0004, &[0; 4]);
    }
    assert!(monitor.intx);
    monitor.write_memory(LOW.start + (1 << 20) + 0x60, &1u32.to_le_bytes());
    fires(monitor.guest.intx_eventfds().map(|(eventfd, _)| eventfd));
    let actions = monitor.guest.release();
    monitor.perform(actions);
    monitor.guest.close().unwrap();
}

#[test]
fn the_table_of_nvme_is_trapped_and_its_doorbells_have_a_slot() {
    let mut monitor = Monitor::new(nvme(), &apertures());
    monitor.move_bar(0, HIGH.start, true);
    let table = monitor.guest.device().config().unwrap().msix().unwrap().unwrap().table.1.start;
    assert!(!monitor.mapped().is_empty());
    let covered = |at: u64| {
        monitor.mapped().iter().any(|(start, size)| (*start..start + *size as u64).contains(&at))
    };
    assert!(covered(HIGH.start + 0x1000) && !covered(HIGH.start + table));
    assert_eq!(monitor.read_memory(HIGH.start + table + 12), Some(1), "masked");
    // The version, from the device.
    assert!(monitor.read_memory(HIGH.start + 8).is_some_and(|version| version >> 16 >= 1));
}

#[test]
fn a_reset_by_the_guest_reaches_igb() {
    let mut monitor = Monitor::new(igb(), &apertures());
    let mut at = monitor.read_u32(0x34) as u8;
    while monitor.read_u32(at.into()) as u8 != 0x10 {
        at = (monitor.read_u32(at.into()) >> 8) as u8;
    }
    monitor.move_bar(0, LOW.start, false);
    monitor.write_memory(LOW.start + 0x38, &0x1234u32.to_le_bytes());
    assert_eq!(monitor.read_memory(LOW.start + 0x38), Some(0x1234));
    monitor.write(u64::from(at) + 9, &[0x80]);
    monitor.move_bar(0, LOW.start, false);
    assert_eq!(monitor.read_memory(LOW.start + 0x38), Some(0x8100));
    let actions = monitor.guest.release();
    monitor.perform(actions);
    monitor.guest.close().unwrap();
}
