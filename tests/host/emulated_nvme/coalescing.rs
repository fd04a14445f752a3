//! Interrupts that report several completions.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Activity, Emulated, Nvme};
use vfio_remap::transport::Transport;

use super::{DATA, Driver, IOVA, working};
use crate::support::{edu, watch};

/// The longest delay, 25.5 ms, and a threshold of four (zero-based).
const FOUR: u32 = 255 << 8 | 3;

/// A controller that works when it is polled, its driver, and the event of the I/O queue's vector.
fn by_hand() -> (Emulated, Driver, EventFd) {
    let namespace = Namespace::memory(1 << 20, 512).unwrap();
    let device = Emulated::polled(Nvme::new(vec![namespace])).unwrap();
    let event = edu::event();
    device.set_irqs(2, 1, &[Some(event.as_fd())]).unwrap();
    let driver = working(&device, || Driver::new(Arc::new(device.clone())));
    (device, driver, event)
}

fn set(device: &Emulated, driver: &mut Driver, feature: u32, value: u32) -> Result<u32, u16> {
    working(device, || driver.admin(0x09, 0, 0, [feature, value, 0]))
}

/// Submits reads of a block, which may not exist, and lets the controller work.
fn read(device: &Emulated, driver: &mut Driver, count: u32, block: u32) {
    for _ in 0..count {
        driver.submit(1, 0x02, 1, [IOVA + DATA as u64, 0], [block, 0, 0]);
    }
    while device.poll().unwrap() == Activity::Busy {}
}

/// How often an event has fired since the last call.
fn fired(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

#[test]
fn an_interrupt_reports_as_many_completions_as_were_asked() {
    let (device, mut driver, event) = by_hand();
    read(&device, &mut driver, 3, 0);
    assert_eq!(fired(&event), 3, "one each at first");
    set(&device, &mut driver, 8, FOUR).unwrap();
    assert_eq!(working(&device, || driver.admin(0x0a, 0, 0, [8, 0, 0])), Ok(FOUR));
    read(&device, &mut driver, 4, 0);
    assert_eq!(fired(&event), 1);
    // A reset ends it.
    working(&device, || driver.start());
    read(&device, &mut driver, 2, 0);
    assert_eq!(fired(&event), 2);
}

#[test]
fn fewer_completions_are_reported_after_the_time() {
    let (device, mut driver, event) = by_hand();
    set(&device, &mut driver, 8, FOUR).unwrap();
    read(&device, &mut driver, 3, 0);
    watch::until("an interrupt", || {
        device.poll().unwrap();
        fired(&event) == 1
    });
}

#[test]
fn errors_and_exempt_vectors_are_reported_at_once() {
    let (device, mut driver, event) = by_hand();
    set(&device, &mut driver, 8, FOUR).unwrap();
    read(&device, &mut driver, 1, u32::MAX);
    assert_eq!(fired(&event), 1, "there is no such block");
    let exempt = 1 << 16 | 1;
    set(&device, &mut driver, 9, exempt).unwrap();
    assert_eq!(working(&device, || driver.admin(0x0a, 0, 0, [9, 1, 0])), Ok(exempt));
    assert_eq!(working(&device, || driver.admin(0x0a, 0, 0, [9, 2, 0])), Ok(2));
    read(&device, &mut driver, 2, 0);
    assert_eq!(fired(&event), 2);
    assert_eq!(set(&device, &mut driver, 9, 17), Err(0x02), "there is no such vector");
}
