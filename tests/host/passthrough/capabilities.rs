//! Which capabilities a guest sees, and which of its writes reach the device.

use std::sync::Arc;

use vfio_remap::passthrough::{Action, GuestDevice};
use vfio_remap::transport::{IrqInfo, RegionInfo, irq_index};
use vfio_remap::{Device, ErrorKind};

use super::card::Card;
use super::monitor::{LOW, Monitor, apertures};

/// PCI Express 2, with everything set that can be.
const EXPRESS: [u8; 0x3c] = {
    let mut bytes = [0xff; 0x3c];
    (bytes[0], bytes[2], bytes[3]) = (0x10, 0x02, 0x00);
    // Device control: no reset is going on.
    bytes[9] = 0x7f;
    bytes
};
const POWER: [u8; 8] = [0x01, 0, 0xc3, 0xff, 0, 0x81, 0, 0x12];

fn list(monitor: &Monitor) -> Vec<(u8, u8)> {
    let mut at = monitor.read_u32(0x34) as u8;
    let mut found = Vec::new();
    while at != 0 && found.len() < 64 {
        let [id, next, ..] = monitor.read_u32(at.into()).to_le_bytes();
        found.push((id, at));
        at = next;
    }
    found
}

fn extended(monitor: &Monitor) -> Vec<(u16, u64)> {
    let mut at = 0x100;
    let mut found = Vec::new();
    while at != 0 && found.len() < 64 {
        let header = monitor.read_u32(at);
        if header as u16 != 0 {
            found.push((header as u16, at));
        }
        at = u64::from(header >> 20);
    }
    found
}

#[test]
fn only_what_drives_the_function_is_shown() {
    let all: Vec<(u8, Vec<u8>)> = (0x02..=0x0f)
        .filter(|id| *id != 0x05 && *id != 0x09)
        .chain([0x14, 0x15, 0x16, 0xff])
        .enumerate()
        .map(|(index, id)| {
            (0x40 + 8 * index as u8, vec![id, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        })
        .chain([(0xd0, vec![0x12, 0, 0x10, 0, 0x48, 0]), (0xe0, vec![0x09, 0, 8, 1, 2, 3, 4, 5])])
        .collect();
    let borrowed: Vec<_> = all.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    let monitor = Monitor::new(Arc::new(Card::new(256).with_capabilities(&borrowed)), &apertures());
    assert_eq!(list(&monitor), [(0x12, 0xd0), (0x09, 0xe0)]);
    assert_eq!(monitor.read_u32(0xd4), 0x48);
    for at in (0x40..0xd0).step_by(4) {
        assert_eq!(monitor.read_u32(at), 0, "{at:#x} is hidden");
    }
    let monitor =
        Monitor::new(Arc::new(Card::new(256).with_capabilities(&borrowed[..4])), &apertures());
    assert_eq!((list(&monitor), monitor.read_u32(4)), (vec![], 0), "and no list");
}

#[test]
fn only_serial_numbers_and_vendor_data_are_shown_of_extended_ones() {
    let header = |id: u16, next: u32| (next << 20 | 1 << 16 | u32::from(id)).to_le_bytes();
    let card = Card::new(4096)
        .with(0x100, &header(0x0001, 0x140))
        .with(0x140, &header(0x0003, 0x150))
        .with(0x144, &[1, 2, 3, 4, 5, 6, 7, 8])
        .with(0x150, &header(0x0010, 0x190))
        .with(0x190, &header(0x000b, 0x1a0))
        // It claims more than there is before the next.
        .with(0x194, &[1, 0, 0xf1, 0xff, 9, 9, 9, 9])
        .with(0x1a0, &header(0x000f, 0xffc))
        .with(0x1a4, &[0xff; 8])
        .with(0xffc, &header(0x000b, 0));
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    assert_eq!(extended(&monitor), [(0x0003, 0x140), (0x000b, 0x190)]);
    assert_eq!(monitor.read_u32(0x148), 0x0807_0605);
    assert_eq!((monitor.read_u32(0x198), monitor.read_u32(0x1a4)), (0x0909_0909, 0));
    monitor.write(0x140, &[0xff; 16]);
    assert_eq!((monitor.read_u32(0x140), monitor.read_u32(0x148)), (0x1901_0003, 0x0807_0605));
    let monitor = Monitor::new(Arc::new(Card::new(256)), &apertures());
    assert_eq!(monitor.read_u32(0x100), u32::MAX, "there is none");
}

#[test]
fn identification_cannot_be_written_and_comes_from_the_device() {
    let card =
        Arc::new(Card::new(256).with(0x2c, &[1, 2, 3, 4]).with(0x3e, &[5, 6]).with(0x0e, &[0x80]));
    let mut monitor = Monitor::new(card.clone(), &apertures());
    card.take_written();
    for at in [0, 8, 0x28, 0x2c, 0x34, 0x38, 0x40, 0xfc] {
        monitor.write_u32(at, u32::MAX);
    }
    let read: Vec<_> = [0, 8, 0x0c, 0x28, 0x2c, 0x34, 0x38].map(|at| monitor.read_u32(at)).into();
    assert_eq!(read, [0x1041_1af4, 0x0200_0003, 0, 0, 0x0403_0201, 0, 0]);
    assert_eq!(card.take_written(), []);
    monitor.write(0x3c, &[11, 7, 7, 7]);
    monitor.write(0x0c, &[16, 64, 1, 1]);
    assert_eq!((monitor.read_u32(0x3c), monitor.read_u32(0x0c)), (0x0605_000b, 0x4010));
    assert_eq!(card.take_written(), []);
}

#[test]
fn of_command_and_status_bus_mastering_and_errors_reach_the_device() {
    let card = Arc::new(Card::new(256).with(6, &[0x08, 0x80]));
    let mut monitor = Monitor::new(card.clone(), &apertures());
    assert_eq!(card.take_written().last().unwrap().1[0] & 6, 2, "memory decoding is on");
    monitor.write_u32(4, 0x8000_0143);
    assert_eq!(card.take_written(), [(7, vec![0x80])]);
    assert_eq!(monitor.read_u32(4) & 0xffff, 0x0143);
    card.set(6, &[0x08, 0x20]);
    assert_eq!(monitor.read_u32(4) >> 16, 0x2008);
    monitor.command(0x0004);
    monitor.command(0x0000);
    let command: Vec<_> =
        card.take_written().into_iter().map(|(at, bytes)| (at, bytes[0])).collect();
    assert_eq!(command, [(4, 6), (4, 2)], "memory decoding stays on");
}

#[test]
fn a_vendors_capability_is_the_devices() {
    let card = Card::new(256)
        .with_capabilities(&[(0x40, &[9, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (0x50, &[9, 0, 2])]);
    let card = Arc::new(card);
    let mut monitor = Monitor::new(card.clone(), &apertures());
    card.take_written();
    monitor.write_u32(0x44, 0x1234_5678);
    monitor.write(0x40, &[0xff; 4]);
    monitor.write(0x4a, &[1, 2, 3, 4]);
    monitor.write(0x50, &[0xff; 8]);
    let written = [(0x44, vec![0x78, 0x56, 0x34, 0x12]), (0x43, vec![0xff]), (0x4a, vec![1, 2])];
    assert_eq!(card.take_written(), written);
    card.set(0x48, &[0xaa]);
    assert_eq!(monitor.read_u32(0x48) & 0xff, 0xaa, "it is read from the device");
    assert_eq!(monitor.read_u32(0x40), 0xff0c_5009);
}

#[test]
fn of_pci_express_the_guest_writes_copies() {
    let card = Arc::new(Card::new(256).with_capabilities(&[(0x40, &EXPRESS)]));
    let mut monitor = Monitor::new(card.clone(), &apertures());
    card.take_written();
    for at in (0x40..0x7c).step_by(4) {
        monitor.write_u32(at, 0);
    }
    assert_eq!(card.take_written(), []);
    let read: Vec<_> = [0x40, 0x44, 0x48, 0x50, 0x64, 0x68].map(|at| monitor.read_u32(at)).into();
    assert_eq!(read, [0x0002_0010, u32::MAX, 0x0020_0000, u32::MAX, 0x1f, 0]);
    monitor.write_u32(0x48, 0xffff_7fff);
    monitor.write_u32(0x68, u32::MAX);
    assert_eq!((monitor.read_u32(0x48), monitor.read_u32(0x68)), (0x0020_7fff, 0x1f));
}

/// A BAR at its place, and MSI-X with a vector that is connected.
fn running(capabilities: &[(u8, &[u8])], resettable: bool) -> (Arc<Card>, Monitor) {
    let msix: &[u8] = &[0x11, 0, 1, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0];
    let mut all = vec![(0xc0, msix)];
    all.extend(capabilities);
    let card = Card::new(256)
        .with(0x3d, &[1])
        .with_bar(0, 0, RegionInfo::mappable(0x4000))
        .with_capabilities(&all)
        .with_irqs(irq_index::INTX, IrqInfo::eventfds(1).with_automasking())
        .with_irqs(irq_index::MSIX, IrqInfo::eventfds(2));
    let card = Arc::new(if resettable { card } else { card.without_reset() });
    let mut monitor = Monitor::new(card.clone(), &apertures());
    monitor.move_bar(0, LOW.start, false);
    monitor.write(0x3c, &[11]);
    monitor.write(0xc2, &[0, 0x80]);
    monitor.write_memory(LOW.start + 0x200c, &[0; 4]);
    assert_eq!((monitor.mapped().len(), monitor.connected.len(), monitor.intx), (1, 1, false));
    monitor.done.clear();
    (card, monitor)
}

fn was_reset(card: &Card, monitor: &mut Monitor) {
    let at = monitor.done.iter().position(|action| *action == Action::Reset).expect("it was reset");
    let (before, after) = monitor.done.split_at(at);
    let removed =
        |action: &&Action| matches!(action, Action::RemoveSlot(_) | Action::Disconnect { .. });
    assert_eq!(before.iter().filter(removed).count(), 2, "{before:?}");
    assert_eq!(after, [Action::Reset, Action::ConnectIntx]);
    assert_eq!((card.resets(), monitor.mapped(), monitor.intx), (1, vec![], true));
    assert_eq!(card.connected(irq_index::INTX), [0]);
    assert_eq!(
        [0x04, 0x10, 0xc0].map(|at| monitor.read_u32(at)),
        [0x0010_0000, 0, 0x0001_0011 | monitor.read_u32(0xc0) & 0xff00]
    );
    assert_eq!(monitor.read_u32(0x3c), 0x010b, "the interrupt line stays");
    assert_eq!(card.take_written().last().unwrap().1[0] & 6, 2, "memory decoding is on again");
    monitor.move_bar(0, LOW.start + 0x4000, false);
    assert_eq!(monitor.mapped().len(), 1);
    assert_eq!(monitor.read_memory(LOW.start + 0x4000 + 0x200c), Some(1), "vectors are masked");
}

#[test]
fn a_function_level_reset_comes_out_as_actions() {
    let (card, mut monitor) = running(&[(0x40, &EXPRESS)], true);
    monitor.write(0x48, &[0x1f, 0xa8]);
    was_reset(&card, &mut monitor);
    assert_eq!(monitor.read_u32(0x48) & 0x8000, 0);
    let (card, mut monitor) = running(&[(0x40, &[0x13, 0, 6, 3, 0, 0])], true);
    monitor.write(0x44, &[1]);
    was_reset(&card, &mut monitor);
    assert_eq!(monitor.read_u32(0x44), 0);
}

#[test]
fn a_device_that_cannot_be_reset_offers_no_reset() {
    let (card, mut monitor) =
        running(&[(0x40, &EXPRESS), (0x80, &[0x13, 0, 6, 3, 0, 0]), (0x90, &POWER)], false);
    assert_eq!((monitor.read_u32(0x44), monitor.read_u32(0x80) >> 24), (0xefff_ffff, 1));
    monitor.write(0x48, &[0xff, 0xff]);
    monitor.write(0x84, &[1]);
    monitor.write(0x94, &[3]);
    monitor.write(0x94, &[0]);
    assert!(!monitor.done.contains(&Action::Reset));
    assert_eq!((card.resets(), monitor.mapped().len()), (0, 1));
    assert_eq!(monitor.read_u32(0x94) & 8, 8, "it keeps its state in D3hot");
    let actions = monitor.guest.restart();
    monitor.perform(actions);
    assert_eq!((monitor.mapped(), monitor.intx, card.resets()), (vec![], true, 0));
}

#[test]
fn in_d3hot_bars_do_not_respond_and_leaving_it_resets() {
    let (card, mut monitor) = running(&[(0x40, &POWER)], true);
    assert_eq!(monitor.read_u32(0x40), 0x0003_0001, "no PME, no D1, no D2");
    for absent in [1, 2] {
        monitor.write(0x44, &[absent]);
        assert_eq!((monitor.read_u32(0x44), monitor.mapped().len()), (0, 1));
    }
    monitor.write(0x44, &[3, 0xff]);
    assert_eq!((monitor.read_u32(0x44), monitor.mapped()), (3, vec![]));
    assert_eq!(monitor.read_memory(LOW.start), None);
    assert_eq!(card.resets(), 0);
    // The slots are gone already.
    monitor.done.clear();
    monitor.write(0x44, &[0]);
    assert_eq!((card.resets(), monitor.read_u32(4) & 0xffff), (1, 0));
    // A device that keeps its state is not reset.
    let (card, mut monitor) = running(&[(0x40, &[0x01, 0, 3, 0, 8, 0, 0, 0])], true);
    monitor.write(0x44, &[3]);
    assert_eq!(monitor.mapped(), []);
    monitor.write(0x44, &[0]);
    assert_eq!((card.resets(), monitor.mapped().len()), (0, 1));
}

#[test]
fn accesses_of_any_size_and_place_read_the_same_bytes() {
    let card = Arc::new(
        Card::new(4096).with_capabilities(&[(0x40, &[9, 0, 8, 1, 2, 3, 4, 5]), (0x48, &EXPRESS)]),
    );
    let monitor = Monitor::new(card, &apertures());
    let mut whole = vec![0; 0x1010];
    monitor.guest.read_config(0, &mut whole);
    assert_eq!(whole[0x1000..], [0xff; 16]);
    for len in 1..=9 {
        for at in 0..0x1008 {
            let mut bytes = vec![0; len];
            monitor.guest.read_config(at as u64, &mut bytes);
            let end = whole.len().min(at + len);
            assert_eq!(bytes[..end - at], whole[at..end], "{len} at {at:#x}");
        }
    }
    let mut bytes = [0; 8];
    monitor.guest.read_config(u64::MAX - 3, &mut bytes);
    assert_eq!(bytes, [0xff; 8]);
}

#[test]
fn what_is_no_endpoint_is_refused() {
    let new = |card: Card| GuestDevice::<u32>::new(Device::new(Arc::new(card)), &apertures());
    let error = new(Card::new(256).with(0x0e, &[1])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let looping = Card::new(256).with_capabilities(&[(0x40, &[9, 0, 3])]).with(0x41, &[0x40]);
    assert_eq!(new(looping).unwrap_err().kind(), ErrorKind::Malformed);
    // A capability that does not fit is not shown.
    let card = Card::new(256).with_capabilities(&[(0xf0, &[0x10, 0, 2]), (0xfc, &[0x09, 0, 0xff])]);
    let monitor = Monitor::new(Arc::new(card), &apertures());
    assert_eq!(list(&monitor), [(0x09, 0xfc)]);
}

#[test]
fn a_size_that_changes_between_two_reads_is_harmless() {
    // MSI in the last bytes: ten, until it has 64 bits and masks.
    for reads in 0..8 {
        let card = Card::new(256)
            .with_capabilities(&[(0x40, &[0x09, 0, 4]), (0xf4, &[0x05, 0, 0, 0])])
            .with_irqs(irq_index::MSI, IrqInfo::eventfds(4))
            .with_change(reads, 0xf6, &[0x80, 0x01]);
        let monitor = Monitor::new(Arc::new(card), &apertures());
        let found = list(&monitor);
        if found != [(0x09, 0x40), (0x05, 0xf4)] {
            assert_eq!(found, [(0x09, 0x40)]);
            assert_eq!((monitor.read_u32(0xf4), monitor.read_u32(0xfc)), (0, 0));
        }
    }
}

#[test]
fn bus_mastering_is_the_guests_after_a_failure_and_a_reset() {
    let card = Arc::new(Card::new(256));
    let mut monitor = Monitor::new(card.clone(), &apertures());
    let command = |monitor: &Monitor| {
        let mut command = [0];
        monitor.guest.device().config().unwrap().read(4, &mut command).unwrap();
        command[0] & 6
    };
    card.fail_writes(1);
    monitor.command(0x0004);
    assert_eq!(command(&monitor), 2);
    monitor.write(0x3c, &[1]);
    assert_eq!(command(&monitor), 6, "it is tried again");
    // One that the guest did not request: it notices nothing.
    assert!(monitor.guest.reset().unwrap().is_over());
    assert_eq!((command(&monitor), card.resets()), (6, 1));
    card.fail_writes(1);
    let actions = monitor.guest.restart();
    monitor.perform(actions);
    monitor.write(0x3c, &[1]);
    assert_eq!(command(&monitor) & 4, 0);
    monitor.command(0x0004);
    assert_eq!(command(&monitor) & 4, 4);
}
