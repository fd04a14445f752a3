//! Interrupts of a guest: what is connected, what is pending, what is lost, which is nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vfio_remap::passthrough::{Action, Message};
use vfio_remap::transport::{IrqInfo, RegionInfo, irq_index};

use super::card::Card;
use super::monitor::{LOW, Monitor, apertures};
use crate::support::alone::alone;
use crate::support::logged;

const TABLE: u64 = LOW.start + 0x2000;
const PENDING: u64 = LOW.start + 0x3000;
const MSIX: u64 = 0x50;
const MSI: u64 = 0x70;
const COUNT: u16 = 70;

/// INTA#, MSI with four vectors, 64 bits and masks, and MSI-X with 70.
fn card(noresize: bool) -> Arc<Card> {
    Arc::new(described(noresize))
}

fn described(noresize: bool) -> Card {
    let mut msix = IrqInfo::eventfds(COUNT.into());
    msix.noresize = noresize;
    let control = (COUNT - 1).to_le_bytes();
    Card::new(256)
        .with(0x3d, &[1])
        .with_bar(0, 0, RegionInfo::mappable(0x4000))
        .with_capabilities(&[
            (0x50, &[0x11, 0, control[0], control[1], 0, 0x20, 0, 0, 0, 0x30, 0, 0]),
            (0x70, &[0x05, 0, 0x84, 0x01]),
        ])
        .with_irqs(irq_index::INTX, IrqInfo::eventfds(1).with_automasking())
        .with_irqs(irq_index::MSI, IrqInfo::eventfds(4).with_noresize())
        .with_irqs(irq_index::MSIX, msix)
}

fn monitor(card: &Arc<Card>) -> Monitor {
    let mut monitor = Monitor::new(card.clone(), &apertures());
    monitor.move_bar(0, LOW.start, false);
    monitor
}

/// Writes an entry of the table.
fn program(monitor: &mut Monitor, vector: u64, message: Message, masked: bool) {
    let entry = TABLE + 16 * vector;
    monitor.write_memory(entry, &message.address.to_le_bytes());
    monitor.write_memory(entry + 8, &message.data.to_le_bytes());
    monitor.write_memory(entry + 12, &u32::from(masked).to_le_bytes());
}

fn message(data: u32) -> Message {
    Message { address: 0xfee0_0000, data }
}

/// How often an eventfd was signalled, as the hypervisor that watches it sees.
fn count(fd: Option<BorrowedFd<'_>>) -> u64 {
    let mut bytes = [0; 8];
    match nix::unistd::read(fd.expect("it was connected").as_fd(), &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

fn pending(monitor: &Monitor) -> Vec<u64> {
    let mut bytes = [0; 16];
    for (index, part) in bytes.chunks_mut(8).enumerate() {
        assert!(monitor.guest.read_memory(PENDING + 8 * index as u64, part));
    }
    (0..128).filter(|bit| bytes[bit / 8] >> (bit % 8) & 1 != 0).map(|bit| bit as u64).collect()
}

#[test]
fn an_intx_is_connected_from_the_start_until_the_guest_disables_it() {
    let card = card(false);
    let mut monitor = Monitor::new(card.clone(), &apertures());
    assert!(monitor.intx);
    assert_eq!(monitor.done, [Action::ConnectIntx]);
    assert_eq!(monitor.read_u32(0x3c), 0x0100);
    card.fire(irq_index::INTX, 0);
    assert_eq!(count(monitor.guest.intx_eventfds().map(|(eventfd, _)| eventfd)), 1);
    monitor.command(0x400);
    assert!(!monitor.intx && card.connected(irq_index::INTX).is_empty());
    monitor.command(0);
    assert!(monitor.intx);
    assert_eq!(card.connected(irq_index::INTX), [0]);
    assert_eq!(Monitor::new(Arc::new(Card::new(256)), &apertures()).done, [], "it has none");
}

#[test]
fn a_vector_is_connected_when_it_is_unmasked_and_others_are_not() {
    let card = card(false);
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    assert!(!monitor.intx && monitor.connected.is_empty());
    program(&mut monitor, 3, message(33), false);
    program(&mut monitor, 69, message(69), false);
    assert_eq!(card.connected(irq_index::MSIX), [3, 69]);
    assert_eq!(monitor.connected.keys().copied().collect::<Vec<_>>(), [3, 69]);
    assert_eq!(monitor.connected[&3], message(33));
    card.fire(irq_index::MSIX, 3);
    assert_eq!(count(monitor.guest.eventfd(3)), 1);
    // Another processor.
    monitor.write_memory(TABLE + 48, &0xfee0_1000u32.to_le_bytes());
    assert_eq!(monitor.connected[&3], Message { address: 0xfee0_1000, data: 33 });
    let mut entry = [0; 16];
    for (at, part) in (TABLE + 48..).step_by(8).zip(entry.chunks_mut(8)) {
        assert!(monitor.guest.read_memory(at, part));
    }
    assert_eq!(entry, [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 33, 0, 0, 0, 0, 0, 0, 0]);
    card.take_accesses();
    assert_eq!(monitor.read_memory(TABLE), Some(0));
    assert_eq!(card.take_accesses(), [], "the device's own table is not reached");
}

#[test]
fn an_interrupt_while_a_vector_is_masked_is_pending_and_comes_later() {
    let card = card(false);
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    for vector in [3, 69] {
        program(&mut monitor, vector, message(vector as u32), false);
    }
    monitor.write_memory(TABLE + 3 * 16 + 12, &[1, 0, 0, 0]);
    assert!(!monitor.connected.contains_key(&3));
    assert!(pending(&monitor).is_empty());
    card.fire(irq_index::MSIX, 3);
    card.fire(irq_index::MSIX, 69);
    assert_eq!(pending(&monitor), [3]);
    // All at once.
    monitor.write(MSIX + 3, &[0xc0]);
    assert!(monitor.connected.is_empty());
    assert_eq!(pending(&monitor), [3, 69]);
    monitor.write_memory(PENDING, &[0; 8]);
    monitor.write(MSIX + 3, &[0x80]);
    assert_eq!(monitor.connected.len(), 1);
    monitor.write_memory(TABLE + 3 * 16 + 12, &[0; 4]);
    assert_eq!((count(monitor.guest.eventfd(3)), count(monitor.guest.eventfd(69))), (1, 1));
    assert!(pending(&monitor).is_empty());
}

#[test]
fn vectors_are_added_while_others_fire_and_none_is_lost() {
    for noresize in [false, true] {
        let card = card(noresize);
        let mut monitor = monitor(&card);
        monitor.write(MSIX + 2, &[0, 0x80]);
        let mut counts = [0; COUNT as usize];
        // The order in which a driver asks for them is its own.
        for turn in 0..u64::from(COUNT) {
            let vector = turn * 37 % u64::from(COUNT);
            program(&mut monitor, vector, message(vector as u32), false);
            for vector in card.connected(irq_index::MSIX) {
                card.fire(irq_index::MSIX, vector);
            }
            for vector in card.connected(irq_index::MSIX) {
                counts[vector as usize] += count(monitor.guest.eventfd(vector)).min(1);
            }
        }
        let total: u64 = counts.iter().sum();
        assert_eq!(total, (1..=u64::from(COUNT)).sum::<u64>(), "noresize: {noresize}");
    }
}

#[test]
fn a_table_of_nonsense_is_read_back_as_far_as_it_can_be_written() {
    let card = card(false);
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    monitor.write_memory(TABLE + 16, &[0xff; 8]);
    monitor.write_memory(TABLE + 24, &[0xff; 8]);
    assert_eq!(monitor.read_memory(TABLE + 16), Some(0xffff_fffc));
    assert_eq!(monitor.read_memory(TABLE + 28), Some(1));
    // Unaligned, across two entries, past the table, in the pending bits.
    monitor.write_memory(TABLE + 29, &[0xff; 8]);
    assert_eq!(
        (monitor.read_memory(TABLE + 28), monitor.read_memory(TABLE + 32)),
        (Some(1), Some(0xffff_fffc))
    );
    monitor.write_memory(TABLE + 16 * 70 - 4, &[0xfe; 8]);
    monitor.write_memory(PENDING, &[0xff; 8]);
    assert_eq!(monitor.connected.keys().copied().collect::<Vec<_>>(), [69]);
    assert_eq!(
        monitor.read_memory(TABLE + 16 * 70),
        Some(0xfefe_fefe),
        "the device's own register"
    );
}

#[test]
fn msi_has_as_many_vectors_as_the_guest_enables() {
    let card = card(false);
    let mut monitor = monitor(&card);
    assert_eq!(monitor.read_u32(MSI) >> 16, 0x0184);
    monitor.write_u32(MSI + 4, 0xfee0_0003);
    monitor.write_u32(MSI + 12, 0x4047);
    monitor.write(MSI + 2, &[0x21, 0]);
    // Two address bits are read-only; the data's lowest bits are the number of the vector.
    let wanted: Vec<_> = (0..4).map(|it| (it, message(0x4044 + it))).collect();
    assert_eq!(monitor.connected.clone().into_iter().collect::<Vec<_>>(), wanted);
    assert_eq!(card.connected(irq_index::MSI), [0, 1, 2, 3]);
    monitor.write_u32(MSI + 16, 0b10);
    assert!(!monitor.connected.contains_key(&1));
    card.fire(irq_index::MSI, 1);
    monitor.write_u32(MSI + 16, 0);
    assert_eq!(count(monitor.guest.eventfd(1)), 1);
    // More than it has are as many as it has.
    monitor.write(MSI + 2, &[0x71, 0]);
    assert_eq!(monitor.connected.len(), 4);
    monitor.write(MSI + 2, &[0, 0]);
    assert!(monitor.connected.is_empty() && monitor.intx);
    assert_eq!(
        card.take_written().iter().filter(|(at, _)| *at >= 0x40).count(),
        0,
        "nothing is the device's"
    );
}

#[test]
fn an_interrupt_of_the_kind_before_is_not_delivered() {
    let card = card(false);
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    program(&mut monitor, 0, message(1), false);
    card.fire(irq_index::MSIX, 0);
    monitor.write(MSIX + 2, &[0, 0]);
    monitor.write_u32(MSI + 4, 0xfee0_0000);
    monitor.write(MSI + 2, &[1, 0]);
    assert_eq!(count(monitor.guest.eventfd(0)), 0);
    assert_eq!(
        (card.connected(irq_index::MSIX), card.connected(irq_index::MSI)),
        (vec![], vec![0])
    );
}

#[test]
fn a_vector_that_the_kernel_refuses_is_tried_once() {
    let card = Arc::new(described(false).with_vectors_up_to(2));
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    for _ in 0..3 {
        program(&mut monitor, 1, message(1), false);
        program(&mut monitor, 2, message(2), false);
        monitor.write(0x3c, &[9]);
    }
    assert_eq!((monitor.connected.len(), card.tries()), (1, 1));
    // The next driver may have more luck.
    monitor.write(MSIX + 2, &[0, 0]);
    monitor.write(MSIX + 2, &[0, 0x80]);
    assert_eq!(card.tries(), 2);
}

#[test]
fn a_guest_cannot_fill_the_log() {
    alone(|| {
        logged::watch();
        let card = Arc::new(described(false).with_vectors_up_to(0));
        let mut monitor = monitor(&card);
        program(&mut monitor, 1, message(1), false);
        for _ in 0..100 {
            // MSI-X, MSI, INTx: the kernel sets up none.
            monitor.write(MSIX + 2, &[0, 0x80]);
            monitor.write(MSIX + 2, &[0, 0]);
            monitor.write(MSI + 2, &[0x21, 0]);
            monitor.write(MSI + 2, &[0, 0]);
            card.fail_writes(1);
            monitor.command(0x4);
            monitor.command(0);
        }
        assert!(card.tries() > 300);
        let warnings = logged::take();
        let about = |what: &str| warnings.iter().filter(|it| it.contains(what)).count();
        assert_eq!(["vector", "MSI", "INTx", "bus mastering"].map(|it| about(it).min(1)), [1; 4]);
        assert_eq!(warnings.len(), 5, "{warnings:#?}");
    });
}

#[test]
fn nothing_is_connected_when_the_device_is_taken_away() {
    let card = card(false);
    let mut monitor = monitor(&card);
    monitor.write(MSIX + 2, &[0, 0x80]);
    program(&mut monitor, 0, message(1), false);
    let actions = monitor.guest.release();
    monitor.perform(actions);
    assert!(monitor.connected.is_empty() && !monitor.intx);
    assert!(card.connected(irq_index::MSIX).is_empty());
    // Nor is a device reset that may be another's by now.
    assert!(monitor.guest.restart().is_empty());
}

#[test]
fn any_thread_may_have_the_device() {
    fn is_send<T: Send>() {}
    is_send::<vfio_remap::passthrough::GuestDevice>();
}
