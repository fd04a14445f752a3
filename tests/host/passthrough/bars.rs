//! BARs: their sizes, where they are mapped, and where they are not.

use std::sync::Arc;

use vfio_remap::passthrough::{Action, Apertures, GuestDevice, Span, SpanId};
use vfio_remap::space::Strategy;
use vfio_remap::transport::RegionInfo;
use vfio_remap::{Device, ErrorKind};

use super::card::{Card, ROM};
use super::monitor::{HIGH, LOW, Monitor, PORTS, apertures, load};
use crate::support::scripted::Scripted;

const MIB: u64 = 1 << 20;

/// BAR 0: 64-bit, prefetchable, 4 MiB, a page in it that cannot be mapped. BAR 2: 32-bit, 64 KiB. BAR 3: ports. BAR 4:
/// less than a page. A ROM.
fn card() -> Card {
    Card::new(256)
        .with_bar(0, 0xc, RegionInfo::mappable(4 * MIB).with_areas([0..MIB, 2 * MIB..4 * MIB]))
        .with_bar(2, 0, RegionInfo::mappable(0x1_0000))
        .with_bar(3, 1, RegionInfo::trapped(32))
        .with_bar(4, 0, RegionInfo::mappable(0x100))
        .with_region(ROM, RegionInfo::trapped(0x8000))
}

const BAR0_SPANS: [(u64, usize); 2] = [(0, MIB as usize), (2 * MIB, 2 * MIB as usize)];

fn bar0_at(address: u64) -> Vec<(u64, usize)> {
    BAR0_SPANS.iter().map(|(start, size)| (address + start, *size)).collect()
}

#[test]
fn sizing_a_bar_gives_its_size_and_its_kind() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.write(0x10, &[0xff; 24]);
    monitor.write(0x30, &[0xff; 4]);
    let registers: Vec<_> = (0x10..0x28).step_by(4).map(|at| monitor.read_u32(at)).collect();
    assert_eq!(registers, [0xffc0_000c, 0xffff_ffff, 0xffff_0000, 0xffff_ffe1, 0xffff_ff00, 0]);
    assert_eq!(monitor.read_u32(0x30), 0xffff_8001);
    assert!(monitor.done.is_empty(), "decoding is off");
}

#[test]
fn no_bar_has_an_address_at_first_whatever_the_host_has_there() {
    let card = card().with(0x10, &[0xc, 0, 0, 0xfe]).with(0x18, &[0, 0, 0x10, 0xfe]);
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    assert_eq!([0x10, 0x18].map(|at| monitor.read_u32(at)), [0xc, 0]);
    monitor.command(7);
    assert_eq!(monitor.mapped(), []);
}

#[test]
fn each_mappable_part_has_a_slot_and_the_rest_is_trapped() {
    let card = Arc::new(card());
    let mut monitor = Monitor::new(card.clone(), &apertures());
    let (bar0, bar2, bar4) = (HIGH.start + (1 << 30), LOW.start, LOW.start + 0x1_0000);
    monitor.set_bar(0, bar0, true);
    monitor.set_bar(2, bar2, false);
    monitor.set_bar(4, bar4, false);
    monitor.command(7);
    let mut wanted = vec![(bar2, 0x1_0000)];
    wanted.extend(bar0_at(bar0));
    assert_eq!(monitor.mapped(), wanted);
    card.take_accesses();
    for (address, bar, offset) in
        [(bar0 + MIB, 0, MIB), (bar2 + 0x10, 2, 0x10), (bar4 + 0x20, 4, 0x20)]
    {
        let value = 0x1234_0000u32 + bar;
        monitor.write_memory(address, &value.to_le_bytes());
        assert_eq!(monitor.read_memory(address), Some(value));
        assert_eq!(card.take_accesses(), [(bar, offset, 4, true), (bar, offset, 4, false)]);
    }
    assert_eq!(monitor.load(bar2 + 0x10), Some(0x1234_0002), "the slot shows the same");
    assert_eq!(monitor.load(bar0 + MIB), None);
    // Wide and unaligned accesses are split; what is past the end reads as ones.
    let mut bytes = [0; 8];
    assert!(monitor.guest.read_memory(bar4 + 0x1e, &mut bytes));
    assert_eq!(
        card.take_accesses(),
        [(4, 0x1e, 2, false), (4, 0x20, 4, false), (4, 0x24, 2, false)]
    );
    assert_eq!(bytes, [0, 0, 4, 0, 0x34, 0x12, 0, 0]);
    assert!(monitor.guest.read_memory(bar4 + 0xfc, &mut bytes));
    assert_eq!(bytes, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(monitor.read_memory(bar4 + 0x100), None);
    assert_eq!(monitor.read_memory(0x1000), None);
}

#[test]
fn ports_and_the_rom_respond_where_the_guest_puts_them() {
    let card = Arc::new(card());
    let mut monitor = Monitor::new(card.clone(), &apertures());
    monitor.write_u32(0x1c, 0x2000);
    monitor.write_u32(0x30, LOW.start as u32);
    monitor.command(7);
    assert!(monitor.guest.write_port(0x2004, &[1, 2]));
    let mut bytes = [0; 2];
    assert!(monitor.guest.read_port(0x2004, &mut bytes));
    assert_eq!(bytes, [1, 2]);
    assert!(!monitor.guest.read_port(0x2020, &mut bytes));
    assert_eq!(monitor.read_memory(LOW.start), None, "the ROM is not enabled");
    monitor.write_u32(0x30, LOW.start as u32 | 1);
    card.take_accesses();
    assert_eq!(monitor.read_memory(LOW.start + 0x7ffc), Some(0));
    monitor.write_memory(LOW.start, &[1; 4]);
    assert_eq!(card.take_accesses(), [(ROM, 0x7ffc, 4, false)], "a ROM is not written");
    // Ports outside of their aperture, and memory decoding alone.
    monitor.write_u32(0x1c, 0x100);
    assert!(!monitor.guest.read_port(0x100, &mut bytes));
    monitor.write_u32(0x1c, 0x2000);
    monitor.command(2);
    assert!(!monitor.guest.read_port(0x2004, &mut bytes));
    assert!(monitor.read_memory(LOW.start).is_some());
}

#[test]
fn windows_follow_a_bar_that_moves_a_hundred_times() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    for turn in 0..100u64 {
        let (low, high) = (LOW.start + turn % 7 * 4 * MIB, HIGH.start + turn % 11 * (1 << 30));
        let address = if turn % 2 == 0 { low } else { high };
        monitor.move_bar(0, address, true);
        assert_eq!(monitor.mapped(), bar0_at(address));
        let value = turn as u32;
        monitor.write_memory(address + 2 * MIB, &value.to_le_bytes());
        assert_eq!(monitor.load(address + 2 * MIB), Some(value));
    }
    // Out of the aperture and into it, each of two spans, after they were mapped.
    assert_eq!(monitor.strategies.len(), 2 * 2 * 99);
    assert_eq!(monitor.failed, []);
    let known = |it: &Strategy| matches!(it, Strategy::MapAgain | Strategy::DontUnmap);
    assert!(monitor.strategies.iter().all(known));
}

#[test]
fn a_bar_that_moves_while_it_is_enabled_is_relocated_once() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(2, LOW.start, false);
    monitor.done.clear();
    monitor.write_u32(0x18, LOW.start as u32 + 0x1_0000);
    let span = SpanId { bar: 2, index: 0 };
    let wanted = [Action::RemoveSlot(span), Action::Relocate(span), Action::AddSlot(span)];
    assert_eq!((&monitor.done[..], monitor.strategies.len()), (&wanted[..], 1));
    monitor.write_u32(0x18, LOW.start as u32 + 0x1_0000);
    assert_eq!(monitor.done.len(), 3, "nothing has changed");
    assert_eq!(span.to_string(), "span 0 of bar 2");
}

#[test]
fn a_bar_outside_of_the_apertures_is_not_mapped_and_reads_back() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    // In RAM, at 0, across an aperture's end, before one, at 2^64 - size, above everything.
    let places = [
        0,
        4 * MIB,
        LOW.start - 4 * MIB,
        LOW.end,
        HIGH.end - 2 * MIB,
        HIGH.end,
        0u64.wrapping_sub(4 * MIB),
        1 << 63,
    ];
    for place in places {
        monitor.move_bar(0, place, true);
        let place = place & !(4 * MIB - 1);
        assert_eq!(monitor.read_u32(0x10), place as u32 | 0xc);
        assert_eq!(monitor.read_u32(0x14), (place >> 32) as u32);
        let inside = LOW.contains(&place) || HIGH.contains(&place);
        assert_eq!(monitor.mapped(), if inside { bar0_at(place) } else { vec![] }, "{place:#x}");
        assert_eq!(monitor.read_memory(place).is_some(), inside);
    }
    monitor.move_bar(0, LOW.end - 4 * MIB, true);
    assert_eq!(monitor.mapped(), bar0_at(LOW.end - 4 * MIB), "the last place");
}

#[test]
fn sizing_while_decoding_is_on_maps_nothing_outside() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(0, HIGH.start, true);
    // All ones in the lower half are an address in the aperture.
    for (at, there) in [(0x10, bar0_at(HIGH.start | 0xffc0_0000)), (0x14, vec![])] {
        let value = monitor.read_u32(at);
        monitor.write_u32(at, u32::MAX);
        assert_eq!(monitor.mapped(), there);
        assert!(monitor.read_u32(at) != value);
        monitor.write_u32(at, value);
        assert_eq!(monitor.mapped(), bar0_at(HIGH.start));
    }
}

#[test]
fn of_two_bars_that_overlap_the_first_is_mapped() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(0, LOW.start, true);
    // In a part of the other BAR that is not mapped, too.
    for place in [LOW.start, LOW.start + MIB, LOW.start + 3 * MIB] {
        monitor.move_bar(2, place, false);
        assert_eq!(monitor.mapped(), bar0_at(LOW.start), "{place:#x}");
        assert_eq!(monitor.read_u32(0x18), place as u32);
    }
    // It is mapped once the other one has moved away.
    let place = LOW.start + 3 * MIB;
    monitor.set_bar(0, HIGH.start, true);
    let mut wanted = vec![(place, 0x1_0000)];
    wanted.extend(bar0_at(HIGH.start));
    assert_eq!(monitor.mapped(), wanted);
}

#[test]
fn bars_can_swap_their_places_while_they_are_enabled() {
    let card = Card::new(256).with_bar(0, 0, RegionInfo::mappable(0x1_0000)).with_bar(
        1,
        0,
        RegionInfo::mappable(0x1_0000),
    );
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    let (one, other) = (LOW.start, LOW.start + 0x1_0000);
    monitor.set_bar(0, one, false);
    monitor.set_bar(1, other, false);
    monitor.command(2);
    monitor.write_memory(one, &[1; 4]);
    monitor.write_memory(other, &[2; 4]);
    let both = [other as u32, one as u32].map(u32::to_le_bytes).concat();
    monitor.write(0x10, &both);
    assert_eq!((monitor.load(one), monitor.load(other)), (Some(0x0202_0202), Some(0x0101_0101)));
}

#[test]
fn a_device_waits_for_the_place_of_another() {
    let apertures = apertures();
    let [mut one, mut other] = [(); 2].map(|()| Monitor::new(Arc::new(card()), &apertures));
    one.move_bar(2, LOW.start, false);
    other.move_bar(2, LOW.start, false);
    assert_eq!((one.mapped().len(), other.mapped().len()), (1, 0));
    assert_eq!(other.read_memory(LOW.start), None);
    one.command(0);
    let actions = other.guest.refresh();
    other.perform(actions);
    assert_eq!((one.mapped().len(), other.mapped().len()), (0, 1));
    assert!(other.guest.refresh().is_empty());
}

#[test]
fn a_span_whose_slot_is_refused_is_trapped() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.refuses_add = true;
    monitor.move_bar(2, LOW.start, false);
    assert_eq!(monitor.mapped(), []);
    monitor.write_memory(LOW.start, &[7; 4]);
    assert_eq!(monitor.read_memory(LOW.start), Some(0x0707_0707));
    monitor.refuses_add = false;
    monitor.move_bar(2, LOW.start + 0x1_0000, false);
    assert_eq!(monitor.mapped().len(), 1, "the next move tries again");
}

#[test]
fn a_span_that_cannot_be_mapped_at_its_place_is_trapped() {
    // Its file is not congruent to any place of the BAR modulo 2 MiB.
    let card = Card::new(256).with_files_from(4096).with_bar(0, 0xc, RegionInfo::mappable(4 * MIB));
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    monitor.move_bar(0, LOW.start, true);
    let span = SpanId { bar: 0, index: 0 };
    assert_eq!(monitor.failed, [(span, ErrorKind::UnsuitablePlacement)]);
    assert_eq!(monitor.mapped(), []);
    assert_eq!(monitor.read_memory(LOW.start), Some(0));
    // It is not tried again until the BAR moves.
    monitor.write(0x3c, &[1]);
    assert_eq!(monitor.failed.len(), 1);
    monitor.move_bar(0, HIGH.start, true);
    assert_eq!(monitor.failed.len(), 2);
    let actions = monitor.guest.release();
    monitor.perform(actions);
    assert_eq!(monitor.failed.len(), 2);
}

#[test]
fn a_slot_that_is_not_removed_stays_where_it_is() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(2, LOW.start, false);
    monitor.refuses_remove = true;
    monitor.set_bar(2, LOW.start + 0x1_0000, false);
    assert_eq!(monitor.mapped(), [(LOW.start, 0x1_0000)]);
    assert_eq!(monitor.failed, [(SpanId { bar: 2, index: 0 }, ErrorKind::InUse)]);
    let error = monitor.guest.relocate(SpanId { bar: 2, index: 0 }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    // Nothing else gets its place. The register says what the guest wrote; accesses there are trapped.
    monitor.set_bar(4, LOW.start, false);
    assert_eq!(monitor.read_u32(0x20), LOW.start as u32);
    assert_eq!(monitor.read_memory(LOW.start), None);
    assert!(monitor.read_memory(LOW.start + 0x1_0000).is_some());
    monitor.refuses_remove = false;
    monitor.write(0x3c, &[1]);
    assert_eq!(monitor.mapped(), [(LOW.start + 0x1_0000, 0x1_0000)]);
    assert!(monitor.read_memory(LOW.start).is_some(), "the other BAR");
}

#[test]
fn a_bar_back_in_its_place_keeps_a_slot_that_was_not_removed() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(2, LOW.start, false);
    monitor.refuses_remove = true;
    monitor.command(0);
    monitor.refuses_remove = false;
    monitor.done.clear();
    monitor.command(2);
    assert_eq!((monitor.mapped(), monitor.done.len()), (vec![(LOW.start, 0x1_0000)], 0));
}

#[test]
fn a_huge_bar_is_mapped_if_an_aperture_holds_it() {
    const TIB: u64 = 1 << 40;
    let card = || Arc::new(Card::new(256).with_bar(0, 0xc, RegionInfo::mappable(TIB)));
    let mut monitor = Monitor::new(card(), &apertures());
    monitor.move_bar(0, TIB, true);
    assert_eq!((monitor.mapped(), monitor.read_memory(TIB)), (vec![], None));
    let apertures = Apertures::new(&[TIB..3 * TIB], 0..0).unwrap();
    let device = Device::new(card());
    let mut guest = GuestDevice::<u32>::new(device, &apertures).unwrap();
    let _ = guest.write_config(0x10, &TIB.to_le_bytes());
    let actions = guest.write_config(4, &[2]);
    assert_eq!(actions.len(), 2);
    let span = SpanId { bar: 0, index: 0 };
    guest.relocate(span).unwrap();
    let mut size = 0;
    guest
        .add_slot(span, |memory| {
            size = memory.size as u64;
            Ok::<u32, ()>(0)
        })
        .unwrap();
    assert_eq!(size, TIB);
    guest.remove_slot(span, |_| Ok::<(), ()>(())).unwrap();
}

#[test]
fn a_bar_that_no_register_can_describe_is_left_out() {
    let card = Card::new(256)
        .with_bar(0, 0, RegionInfo::trapped(1 << 32))
        .with_bar(1, 4, RegionInfo::trapped(1 << 63))
        .with_bar(2, 0, RegionInfo::trapped(16))
        .with_bar(3, 1, RegionInfo::trapped(1 << 17))
        .with_bar(5, 4, RegionInfo::trapped(16));
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    monitor.write(0x10, &[0xff; 24]);
    let registers: Vec<_> = (0x10..0x28).step_by(4).map(|at| monitor.read_u32(at)).collect();
    assert_eq!(registers, [0; 6]);
}

#[test]
fn a_region_that_is_no_power_of_two_ends_before_its_bar() {
    let card = Card::new(256).with_bar(0, 0, RegionInfo::mappable(0x1_2800));
    let mut monitor = Monitor::new(Arc::new(card), &apertures());
    monitor.write_u32(0x10, u32::MAX);
    assert_eq!(monitor.read_u32(0x10), 0xfffe_0000);
    monitor.move_bar(0, LOW.start, false);
    assert_eq!(monitor.mapped(), [(LOW.start, 0x1_2000)]);
    assert_eq!(monitor.read_memory(LOW.start + 0x1_27fc), Some(0));
    assert_eq!(monitor.read_memory(LOW.start + 0x1_2800), Some(u32::MAX));
    monitor.write_memory(LOW.start + 0x1_27fe, &[1; 4]);
    assert_eq!(monitor.read_memory(LOW.start + 0x1_27fc), Some(0x0101_0000));
}

#[test]
fn other_devices_reach_a_bar_where_the_guest_has_it() {
    let transport = Arc::new(Scripted::default());
    let peer = Device::new(transport.clone());
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.guest.set_peers(vec![peer.dma().unwrap()]);
    for address in [LOW.start, HIGH.start, LOW.start + 4 * MIB] {
        monitor.move_bar(0, address, true);
        let mapped: Vec<_> =
            transport.mapped().iter().map(|(at, size)| (*at, *size as usize)).collect();
        assert_eq!(mapped, bar0_at(address));
    }
    monitor.command(0);
    assert_eq!(transport.mapped(), []);
}

#[test]
fn a_peer_that_is_taken_out_reaches_nothing_and_is_free() {
    let peers = [(); 2].map(|()| Arc::new(Scripted::default()));
    let [one, other] = peers.clone().map(|transport| Device::new(transport));
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(0, LOW.start, true);
    let mapped = |peer: usize| peers[peer].mapped().len();
    monitor.guest.set_peers(vec![one.dma().unwrap()]);
    assert_eq!((mapped(0), mapped(1)), (2, 0), "it is mapped at once");
    monitor.guest.set_peers(vec![other.dma().unwrap(), one.dma().unwrap(), one.dma().unwrap()]);
    assert_eq!((mapped(0), mapped(1)), (2, 2));
    monitor.guest.set_peers(vec![other.dma().unwrap()]);
    assert_eq!((mapped(0), mapped(1)), (0, 2));
    drop(one);
    assert_eq!(Arc::strong_count(&peers[0]), 1, "nothing holds it");
    monitor.guest.set_peers(vec![]);
    assert_eq!(mapped(1), 0);
    drop(other);
    assert_eq!(Arc::strong_count(&peers[1]), 1, "nothing holds it");
}

#[test]
fn a_device_that_is_taken_away_leaves_nothing_behind() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(0, LOW.start, true);
    monitor.command(0);
    monitor.move_bar(2, LOW.start + 4 * MIB, false);
    let actions = monitor.guest.release();
    monitor.perform(actions);
    assert_eq!((monitor.mapped(), monitor.read_u32(0)), (vec![], u32::MAX));
    monitor.command(7);
    monitor.set_bar(0, LOW.start, true);
    assert_eq!((monitor.mapped(), monitor.read_memory(LOW.start)), (vec![], None));
    monitor.guest.close().unwrap();
}

#[test]
fn a_slot_that_is_dropped_leaks_its_window_and_says_so() {
    let mut monitor = Monitor::new(Arc::new(card()), &apertures());
    monitor.move_bar(2, LOW.start, false);
    monitor.write_memory(LOW.start, &[7; 4]);
    let Monitor { guest, slots, .. } = monitor;
    let still = guest.close().unwrap_err();
    assert!(still.to_string().contains("a window over bar 2"), "{still}");
    assert_eq!(load(&slots, LOW.start), Some(0x0707_0707), "the guest may still reach it");
}

#[test]
fn apertures_that_make_no_sense_are_refused() {
    let (one, other) = (LOW.start, HIGH.start);
    for memory in [&[one..one][..], &[0..LOW.start], &[one..other, LOW.end - 1..other + 1]] {
        let error = Apertures::new(memory, PORTS).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert_eq!(Apertures::new(&[], 0..0x1_0001).unwrap_err().kind(), ErrorKind::InvalidInput);
    let error = Apertures::new(&[LOW.start + 1..LOW.end], PORTS).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unaligned, "{error}");
    assert_eq!(
        Apertures::new(&[1 << 30..u64::MAX], PORTS).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    let apertures = apertures();
    for (guest, host) in apertures.memory() {
        assert_eq!(guest.start % (1 << 30), host.start as u64 % (1 << 30));
        assert_eq!(guest.end - guest.start, host.len() as u64);
    }
}

#[test]
fn a_span_that_ends_before_it_begins_is_refused() {
    let device = Device::new(Arc::new(card()));
    let bar = device.region(0).unwrap();
    let backwards = std::ops::Range { start: 0x2000, end: 0x1000 };
    let error = Span::map(&bar, backwards, &apertures(), LOW.start).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
}

#[test]
fn a_place_that_a_trapped_bar_has_left_is_given_to_another() {
    let apertures = apertures();
    let trapped = Card::new(256).with_bar(0, 0, RegionInfo::trapped(0x1000));
    let mapped = Card::new(256).with_bar(0, 0, RegionInfo::mappable(0x1000));
    let [mut first, mut second] =
        [trapped, mapped].map(|card| Monitor::new(Arc::new(card), &apertures));
    first.move_bar(0, LOW.start, false);
    second.move_bar(0, LOW.start, false);
    assert_eq!(second.mapped(), []);
    let before = first.done.len();
    first.command(0);
    assert_eq!(first.done.len(), before, "it has nothing to do");
    let actions = second.guest.refresh();
    second.perform(actions);
    assert_eq!(second.mapped(), [(LOW.start, 0x1000)]);
}
