//! Identification, EEPROM, PHY, semaphores, link, interrupts, reset.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vfio_remap::Device;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::emulated::{Activity, Emulated};
use vfio_remap::transport::{Transport, irq_index};

use super::driver::{CTRL, Driver, MAC, RCTL, STATUS, TCTL, frame, taken};
use crate::support::{edu, watch};

const EERD: u64 = 0x14;
const MDIC: u64 = 0x20;
const ICR: u64 = 0x1500;
const ICS: u64 = 0x1504;
const IMS: u64 = 0x1508;
const GPIE: u64 = 0x1514;
const EICS: u64 = 0x1520;
const EIMS: u64 = 0x1524;
const EIAC: u64 = 0x152c;
const EIAM: u64 = 0x1530;
const EICR: u64 = 0x1580;
const EITR: u64 = 0x1680;
const IVAR_MISC: u64 = 0x1740;
const SWSM: u64 = 0x5b50;
const LINK_CHANGE: u32 = 4;

fn phy(driver: &Driver, register: u32) -> u16 {
    driver.write(MDIC, 2 << 26 | 1 << 21 | register << 16);
    let value = driver.read(MDIC);
    assert_eq!(value >> 28 & 5, 1, "ready, no error");
    value as u16
}

fn set_phy(driver: &Driver, register: u32, value: u16) {
    driver.write(MDIC, 1 << 26 | 1 << 21 | register << 16 | u32::from(value));
    assert_eq!(driver.read(MDIC) >> 28 & 5, 1);
}

#[test]
fn it_is_an_82576() {
    let (driver, _network) = Driver::new();
    let device = Device::new(std::sync::Arc::new(driver.card.clone()));
    let mut id = [0; 4];
    driver.card.read_at(7, 0, &mut id).unwrap();
    assert_eq!(id, [0x86, 0x80, 0xc9, 0x10]);
    assert_eq!(device.bar(0).unwrap().size(), 0x2_0000);
    assert_eq!(driver.card.irq(irq_index::MSIX).unwrap().count, 10);
    let word = |index: u32| {
        driver.write(EERD, index << 2 | 1);
        let value = driver.read(EERD);
        assert_eq!(value & 2, 2, "done");
        (value >> 16) as u16
    };
    assert_eq!((0..0x40).map(word).fold(0, u16::wrapping_add), 0xbaba);
    assert_eq!([0, 1, 2].map(word).map(u16::to_le_bytes).as_flattened(), MAC);
    assert_eq!((phy(&driver, 2), phy(&driver, 3) & 0xfff0), (0x02a8, 0x0390));
    driver.write(MDIC, 2 << 26 | 2 << 21);
    assert_eq!(driver.read(MDIC) >> 30 & 1, 1, "there is no PHY at another address");
    assert_eq!(driver.read(0x5400), 0x3322_1102);
    assert_eq!(driver.read(0x5404), 0x8000_5544);
}

#[test]
fn a_semaphore_is_taken_by_reading_it() {
    let (driver, _network) = Driver::new();
    assert_eq!([(); 3].map(|()| driver.read(SWSM) & 1), [0, 1, 1]);
    driver.write(SWSM, 3);
    assert_eq!(driver.read(SWSM), 3, "no firmware takes the other one away");
    driver.write(SWSM, 0);
    assert_eq!(driver.read(SWSM), 0);
    driver.write(0x5b5c, 0x0001_0002);
    assert_eq!(driver.read(0x5b5c), 0x0001_0002);
}

#[test]
fn a_queue_has_one_set_of_registers_at_two_addresses() {
    let (driver, _network) = Driver::new();
    for (alias, page) in [(0x2800, &driver.receive_page), (0x3800, &driver.transmit_page)] {
        for queue in 0..4 {
            let register = |at: usize| page.register::<u32>(0x40 * queue + at).unwrap();
            let aliased = alias + 0x100 * queue as u64;
            driver.write(aliased + 0x28, 1 << 25 | 0x10108);
            assert_eq!(register(0x28).read(), 1 << 25 | 0x10108);
            register(0x18).write(queue as u32 + 3);
            assert_eq!(driver.read(aliased + 0x18), queue as u32 + 3);
        }
    }
}

#[test]
fn the_link_follows_the_cable_and_the_driver_and_interrupts() {
    let (driver, network) = Driver::new();
    assert_eq!(driver.read(STATUS) & 0xc3, 0x83, "up, full duplex, a gigabit per second");
    phy(&driver, 1);
    assert_eq!(phy(&driver, 1) & 0x24, 0x24, "link, negotiated");
    driver.read(ICR);
    let events = driver.vectors(3);
    driver.write(GPIE, 0xc000_0011);
    driver.write(IVAR_MISC, 0x8200);
    driver.write(EIAC, 4);
    driver.write(EIMS, 4);
    driver.write(IMS, LINK_CHANGE);
    for round in 0..20 {
        let up = round % 2 == 1;
        network.set_up(up);
        driver.poll();
        assert_eq!(taken(&events[2]), 1, "{round}");
        assert_eq!(driver.read(ICR) & LINK_CHANGE, LINK_CHANGE);
        assert_eq!(driver.read(STATUS) & 2 != 0, up);
        driver.write(EIMS, 4);
    }
    network.set_up(false);
    network.set_up(true);
    // Latched until it is read.
    driver.poll();
    phy(&driver, 1);
    driver.write(CTRL, 1);
    assert_eq!((driver.read(STATUS) & 2, driver.read(ICR) & LINK_CHANGE), (0, LINK_CHANGE));
    driver.write(CTRL, 0x41);
    driver.read(ICR);
    // Powered down and up; negotiated again.
    set_phy(&driver, 0, 0x1940);
    assert_eq!((driver.read(STATUS) & 2, driver.read(ICR) & LINK_CHANGE), (0, LINK_CHANGE));
    set_phy(&driver, 0, 0x1140);
    driver.read(ICR);
    set_phy(&driver, 0, 0x1340);
    assert_eq!((driver.read(STATUS) & 2, driver.read(ICR) & LINK_CHANGE), (2, LINK_CHANGE));
    assert_eq!((phy(&driver, 1) & 4, phy(&driver, 1) & 4), (0, 4), "the loss is latched");
    drop(network);
    driver.poll();
    assert_eq!(driver.read(STATUS) & 2, 0, "nobody is at the other end");
}

#[test]
fn a_vector_fires_for_each_cause_and_masks_and_clears_itself() {
    let (driver, _network) = Driver::new();
    let events = driver.vectors(10);
    driver.write(GPIE, 0xc000_0011);
    driver.write(EIAC, 0x3ff);
    driver.write(EIAM, 0x3ff);
    driver.write(EIMS, 0x3ff);
    for (vector, event) in events.iter().enumerate() {
        driver.write(EICS, 1 << vector);
        assert_eq!(taken(event), 1);
        driver.write(EICS, 1 << vector);
        assert_eq!(taken(event), 0, "it has masked itself");
        assert_eq!(driver.read(EIMS) & 1 << vector, 0);
        driver.write(EIMS, 1 << vector);
        assert_eq!(taken(event), 1, "it was pending");
        driver.write(EIMS, 1 << vector);
    }
    assert_eq!(driver.read(EICR), 0, "all have cleared themselves");
    // Neither clears nor masks itself.
    driver.write(EIAC, 0);
    driver.write(EIAM, 0);
    driver.write(EICS, 1);
    driver.write(EICS, 1);
    assert_eq!((taken(&events[0]), driver.read(EICR), driver.read(EICR)), (1, 1, 0));
    driver.write(EICS, 1);
    assert_eq!(taken(&events[0]), 1);
    // A cause without a vector in the table.
    driver.write(EIMS, !0);
    driver.write(EICS, !0);
    assert_eq!(driver.read(EICR), 0x01ff_ffff);
}

#[test]
fn with_one_vector_causes_are_masked_by_reading_them() {
    let (driver, _network) = Driver::new();
    driver.read(ICR);
    let (msi, intx) = (edu::event(), edu::event());
    driver.card.set_irqs(irq_index::INTX, 0, &[Some(intx.as_fd())]).unwrap();
    driver.write(0x1510, !0);
    driver.write(IMS, 0x84);
    driver.write(ICS, 0x81);
    assert_eq!(taken(&intx), 1);
    assert_eq!(driver.read(ICR), 0x8000_0081, "asserted");
    assert_eq!((driver.read(IMS), driver.read(ICR)), (0, 0));
    driver.write(ICS, 4);
    driver.card.mask_irqs(irq_index::INTX, 0..1, false).unwrap();
    assert_eq!(taken(&intx), 0);
    driver.write(IMS, 4);
    assert_eq!(taken(&intx), 1);
    driver.write(ICR, 4);
    driver.card.mask_irqs(irq_index::INTX, 0..1, false).unwrap();
    assert_eq!(taken(&intx), 0, "it is not asserted any more");
    driver.card.set_irqs(irq_index::INTX, 0, &[]).unwrap();
    driver.card.set_irqs(irq_index::MSI, 0, &[Some(msi.as_fd())]).unwrap();
    driver.write(IMS, 4);
    driver.write(ICS, 4);
    assert_eq!(taken(&msi), 1);
    // Masked in, but none of it has happened: what else has stays.
    driver.write(ICR, !0);
    driver.write(IMS, 4);
    driver.write(ICS, 1);
    assert_eq!([(); 2].map(|()| driver.read(ICR)), [1, 1]);
}

#[test]
fn a_vector_keeps_its_interval() {
    let (driver, _network) = Driver::new();
    let events = driver.vectors(1);
    driver.write(GPIE, 0xc000_0011);
    driver.write(EIAC, 1);
    driver.write(EIMS, 1);
    let interval = Duration::from_millis(8);
    driver.write(EITR, (interval.as_micros() as u32) << 2);
    let start = Instant::now();
    driver.write(EICS, 1);
    assert_eq!(taken(&events[0]), 1);
    driver.write(EICS, 1);
    watch::until("the second one", || {
        assert_eq!(driver.card.poll().unwrap(), Activity::Watching);
        taken(&events[0]) == 1
    });
    assert!(start.elapsed() >= interval);
}

#[test]
fn a_reset_leaves_the_card_as_it_was_made() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(3);
    driver.receive_queue(5, 1, 2);
    driver.write(0x5400, 0);
    network.send(&frame([0xff; 6], 60));
    driver.poll();
    driver.write(CTRL, 1 << 26);
    assert_eq!(driver.read(CTRL), 1, "the bit clears itself");
    assert_eq!((driver.read(RCTL), driver.read(TCTL) & 2), (0, 0));
    assert_eq!(driver.read(0x5400), 0x3322_1102);
    assert_eq!(driver.read(STATUS) & 2, 0);
    assert_eq!(driver.read(0x4074), 0, "nothing was received");
    let enabled = |page: &vfio_remap::Window| {
        let control = |queue: usize| page.register::<u32>(0x40 * queue + 0x28).unwrap().read();
        (0..16).filter(|queue| control(*queue) >> 25 & 1 != 0).collect::<Vec<_>>()
    };
    assert_eq!((enabled(&driver.receive_page), enabled(&driver.transmit_page)), (vec![0], vec![0]));
    let mut command = [0; 2];
    driver.card.read_at(7, 4, &mut command).unwrap();
    assert_eq!(command, [6, 0], "configuration space stays");
    driver.card.reset().unwrap();
    driver.card.read_at(7, 4, &mut command).unwrap();
    assert_eq!(command, [0, 0], "but for a reset of the function");
}

#[test]
fn registers_are_reached_through_the_io_bar() {
    let (driver, _network) = Driver::new();
    let io = |at: u64, value: u32| driver.card.write_at(2, at, &value.to_le_bytes()).unwrap();
    let mut data = [0; 4];
    for (address, expected) in [(0x5400, 0x3322_1102), (STATUS as u32, 0x0008_0083)] {
        io(0, address);
        driver.card.read_at(2, 4, &mut data).unwrap();
        assert_eq!(u32::from_le_bytes(data), expected);
    }
    // The tail of queue 9.
    io(0, 0xe258);
    io(4, 7);
    assert_eq!(driver.transmit_page.register::<u32>(0x258).unwrap().read(), 7);
    io(0, !0);
    driver.card.read_at(2, 0, &mut data).unwrap();
    assert_eq!(u32::from_le_bytes(data), 0x1_fffc);
    io(4, !0);
}

#[test]
fn power_and_function_level_reset_are_in_configuration_space() {
    let (mut driver, network) = Driver::new();
    let device = Device::new(std::sync::Arc::new(driver.card.clone()));
    let config = device.config().unwrap();
    let find = |id: u8| {
        let found = config.capabilities().map(|found| found.unwrap()).find(|found| found.id == id);
        found.unwrap().offset
    };
    let (power, express) = (find(1) + 4, find(0x10) + 8);
    driver.receive_queue(0, 1, 2);
    driver.card.write_at(7, power, &[3, 0]).unwrap();
    network.send(&frame(MAC, 60));
    driver.poll();
    assert_eq!(driver.read(STATUS), !0, "no answer in D3hot");
    driver.write(CTRL, 0);
    driver.card.write_at(7, power, &[0, 0]).unwrap();
    assert_eq!((driver.read(CTRL), driver.read(RCTL), driver.read(0x5404)), (1, 0, 0x8000_5544));
    driver.start();
    driver.receive_queue(0, 1, 2);
    network.send(&frame(MAC, 61));
    driver.poll();
    assert_eq!(driver.received(0).unwrap().data, frame(MAC, 61));
    let mut control = [0; 2];
    driver.card.read_at(7, express, &mut control).unwrap();
    control[1] |= 0x80;
    driver.card.write_at(7, express, &control).unwrap();
    assert_eq!((driver.read(CTRL), driver.read(RCTL)), (1, 0));
    let mut command = [0; 2];
    driver.card.read_at(7, 4, &mut command).unwrap();
    assert_eq!(command, [0, 0]);
}

/// With a thread of its own, and mapped tails: nobody polls, and nobody is woken.
#[test]
fn a_card_with_a_thread_sees_tails_and_frames() {
    let (port, network) = Port::pair();
    let mut driver = Driver::of(Emulated::new(Igb::new(MAC).with_wire(port)).unwrap());
    driver.transmit_queue(0);
    driver.receive_queue(0, 1, 2);
    for round in 0..100 {
        driver.send(0, &frame([0xff; 6], 60 + round), 0x2b30_0000, 0);
        let mut sent = None;
        watch::until("a frame", || {
            sent = network.receive();
            sent.is_some()
        });
        assert_eq!(sent.unwrap(), frame([0xff; 6], 60 + round));
        network.send(&frame(MAC, 60 + round));
        let mut received = None;
        watch::until("a frame", || {
            received = driver.received(0);
            received.is_some()
        });
        assert_eq!(received.unwrap().data, frame(MAC, 60 + round));
    }
}
