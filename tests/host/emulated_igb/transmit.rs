//! Transmit queues: descriptors, checksums, segmentation, tags.

use vfio_remap::Error;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::emulated::{Activity, Emulated};

use super::driver::{
    Driver, IOVA, MAC, OTHER, RCTL, RCTL_VALUE, checksum, datagram, frame, pseudo, taken,
    transport_checksum,
};
use crate::support::shared;

/// End of packet, check sequence, report.
const LEGACY: u32 = 0x0b00_0000;
const ADVANCED: u32 = 0x2b30_0000;
const CONTEXT: u32 = 0x2020_0000;
const TAGGED: u32 = 1 << 30;
const SEGMENTED: u32 = 1 << 31;

fn tagged(frame: &[u8], tag: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let [a, b] = tag.to_be_bytes();
    frame.splice(12..12, [0x81, 0, a, b]);
    frame
}

/// A context of IPv4 with headers of 14, 20 and `transport` bytes.
fn context(tcp: bool, transport: u32, size: u32, tag: u16, index: u32) -> [u32; 4] {
    let kind = 1 << 10 | u32::from(tcp) << 11;
    let first = u32::from(tag) << 16 | 14 << 9 | 20;
    [first, 0, CONTEXT | kind, size << 16 | transport << 8 | index << 4]
}

#[test]
fn every_queue_sends_what_its_descriptors_point_to() {
    let (mut driver, network) = Driver::new();
    for queue in 0..16 {
        driver.transmit_queue(queue);
        for (index, command) in [LEGACY, ADVANCED].into_iter().enumerate() {
            let data = frame(OTHER, 100 * (queue + 1) + index);
            let at = driver.send(queue, &data, command, 0);
            driver.poll();
            assert!(driver.sent(queue, at));
            assert_eq!(network.receive(), Some(data));
        }
        let head = driver.transmit_page.register::<u32>(0x40 * queue + 0x10).unwrap();
        assert_eq!(head.read(), 2);
    }
    assert_eq!(network.receive(), None);
}

#[test]
fn bursts_of_any_length_are_sent_in_order() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    for burst in [1, 15, 16, 17, 33, 63, 50, 63] {
        let frames: Vec<_> = (0..burst).map(|index| frame(OTHER, 60 + 20 * index)).collect();
        let last = frames.iter().map(|data| driver.send(0, data, ADVANCED, 0)).last();
        driver.poll();
        assert!(driver.sent(0, last.unwrap()));
        let sent: Vec<_> = std::iter::from_fn(|| network.receive()).collect();
        assert!(sent == frames, "{burst}");
    }
}

#[test]
fn a_packet_is_put_together_of_any_descriptors_and_short_ones_are_padded() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    let data = frame(OTHER, 9018);
    for round in 0..20 {
        let parts = [0, 1, 14, 14, 1000, 9018];
        for pair in parts.windows(2) {
            let last = pair[1] == data.len();
            let command = if last { ADVANCED } else { ADVANCED & !0x0900_0000 };
            let at = driver.send(0, &data[pair[0]..pair[1]], command, 0);
            driver.poll();
            assert_eq!(driver.sent(0, at), last, "{round}: reported if that was asked for");
            assert_eq!(network.receive().is_some(), last, "{round}");
        }
    }
    driver.send(0, &data[..20], ADVANCED, 0);
    driver.poll();
    assert_eq!(network.receive().unwrap(), [&data[..20], &[0; 40]].concat());
}

#[test]
fn checksums_and_tags_are_inserted() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    for (protocol, field) in [(6, 50), (17, 40)] {
        let good = datagram(protocol, 99, 333);
        let mut data = good.clone();
        data[24..26].fill(0);
        let seed = !checksum(&[], pseudo(&data, 14));
        data[field..field + 2].copy_from_slice(&seed.to_be_bytes());
        driver.submit(0, context(protocol == 6, 0, 0, 0x1234, 1));
        driver.send(0, &data, ADVANCED | TAGGED, 0x310);
        driver.send(0, &data, ADVANCED, 0x210);
        driver.poll();
        assert_eq!(network.receive().unwrap(), tagged(&good, 0x1234), "{protocol}");
        let second = network.receive().unwrap();
        assert_eq!((&second[24..26], transport_checksum(&second, 14)), (&[0, 0][..], 0));
        // By a legacy descriptor: from the transport's header on, and a tag of its own.
        let command = LEGACY | 1 << 26 | TAGGED | (field as u32) << 16;
        driver.send(0, &data, command, 34 << 8 | 0x0007 << 16);
        driver.poll();
        let third = network.receive().unwrap();
        assert_eq!((&third[12..16], transport_checksum(&third, 18)), (&[0x81, 0, 0, 7][..], 0));
    }
}

#[test]
fn a_large_packet_leaves_as_frames_of_the_size_that_was_asked_for() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(2);
    let payload: Vec<u8> = (0..65_000u32).map(|index| ((index * 7) >> 3) as u8).collect();
    let mut header = datagram(6, 80, 0);
    header[16..18].fill(0);
    driver.submit(2, context(true, 20, 1460, 5, 0));
    let parts: Vec<_> = payload.chunks(16_000).collect();
    let first = ADVANCED & !0x0900_0000 | SEGMENTED | TAGGED;
    driver.send(2, &header, first, 0x300 | (payload.len() as u32) << 14);
    for (index, part) in parts.iter().enumerate() {
        let last = index + 1 == parts.len();
        driver.send(2, part, if last { ADVANCED } else { ADVANCED & !0x0900_0000 }, 0);
    }
    driver.poll();
    let mut got = Vec::new();
    while let Some(frame) = network.receive() {
        assert!(frame.len() <= 1518, "with its tag");
        assert_eq!(frame[12..16], [0x81, 0, 0, 5]);
        assert_eq!((checksum(&frame[18..38], 0), transport_checksum(&frame, 18)), (0, 0));
        assert_eq!(frame[42..46], (1 + got.len() as u32).to_be_bytes());
        got.extend_from_slice(&frame[58..]);
    }
    assert!(got == payload, "{} of {} bytes", got.len(), payload.len());
    assert_eq!(driver.read(0x40f8), 1, "segmented");
    assert_eq!(driver.read(0x4080), 65_000u32.div_ceil(1460), "sent");
}

/// The most work for one descriptor: each byte of a packet becomes a frame.
#[test]
fn a_turn_is_bounded_even_with_the_smallest_segments() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    let payload: Vec<u8> = (0..16_000u32).map(|index| index as u8).collect();
    driver.submit(0, context(true, 20, 1, 0, 0));
    let first = ADVANCED & !0x0900_0000 | SEGMENTED;
    driver.send(0, &datagram(6, 80, 0), first, 0x300 | (payload.len() as u32) << 14);
    driver.send(0, &payload, ADVANCED, 0);
    let (mut got, mut turns) = (Vec::new(), 0);
    while driver.card.poll().unwrap() == Activity::Busy {
        let frames = std::iter::from_fn(|| network.receive());
        let bytes: Vec<_> = frames.map(|frame| frame[54]).collect();
        assert!(bytes.len() < 500, "{} frames in a turn", bytes.len());
        got.extend(bytes);
        turns += 1;
    }
    assert!(got == payload && turns > 32, "{} bytes in {turns} turns", got.len());
}

#[test]
fn queues_say_by_their_vectors_what_they_have_done() {
    let (mut driver, network) = Driver::new();
    let events = driver.vectors(10);
    driver.write(0x1514, 0xc000_0011);
    driver.write(0x152c, 0x3ff);
    driver.write(0x1524, 0x3ff);
    // Transmit queue 12 has vector 7, receive queue 0 has vector 8.
    driver.write(0x1700 + 4 * 4, 0x87 << 24);
    driver.write(0x1700, 0x88);
    driver.transmit_queue(12);
    driver.receive_queue(0, 1, 2);
    let silent = ADVANCED & !(1 << 27);
    driver.send(12, &frame(OTHER, 60), silent, 0);
    driver.poll();
    assert_eq!(taken(&events[7]), 0, "it was not asked to report");
    driver.send(12, &frame(OTHER, 60), ADVANCED, 0);
    network.send(&frame(MAC, 60));
    driver.poll();
    let fired: Vec<_> = events.iter().map(taken).collect();
    assert_eq!(fired, [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]);
}

#[test]
fn the_head_is_written_where_the_driver_wants_it() {
    let (mut driver, _network) = Driver::new();
    driver.transmit_queue(1);
    let at = 0x8000;
    let register = |offset: usize| driver.transmit_page.register::<u32>(0x40 + offset).unwrap();
    register(0x38).write((IOVA + at as u64) as u32 | 1);
    for round in 1..=5 {
        let index = driver.send(1, &frame(OTHER, 60), ADVANCED, 0);
        driver.poll();
        assert_eq!(shared::get(&driver.memory, at, 4), [round, 0, 0, 0]);
        assert!(!driver.sent(1, index), "and not into the descriptor");
    }
}

#[test]
fn without_link_or_bus_mastering_nothing_is_sent_and_nothing_is_lost() {
    use vfio_remap::transport::Transport;
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    network.set_up(false);
    driver.poll();
    let at = driver.send(0, &frame(OTHER, 60), ADVANCED, 0);
    driver.poll();
    assert!(!driver.sent(0, at));
    network.set_up(true);
    driver.poll();
    assert!(driver.sent(0, at) && network.receive().is_some());
    for stop in [true, false] {
        let at = driver.send(0, &frame(OTHER, 61), ADVANCED, 0);
        if stop {
            driver.card.write_at(7, 4, &2u16.to_le_bytes()).unwrap();
        } else {
            driver.write(0, 0x45);
            assert_eq!(driver.read(8) >> 19 & 1, 0, "no more accesses");
        }
        driver.poll();
        assert!(!driver.sent(0, at) && network.receive().is_none());
        driver.start();
        assert!(driver.sent(0, at) && network.receive().is_some());
    }
}

#[test]
fn what_is_sent_in_loopback_comes_back() {
    let (mut driver, network) = Driver::new();
    driver.transmit_queue(0);
    driver.receive_queue(0, 1, 2);
    driver.write(RCTL, RCTL_VALUE | 0x40);
    driver.send(0, &frame(MAC, 77), ADVANCED, 0);
    network.send(&frame(MAC, 78));
    driver.poll();
    assert_eq!(driver.received(0).unwrap().data, frame(MAC, 77));
    assert!(driver.received(0).is_none() && network.receive().is_none());
}

#[test]
fn two_cards_are_joined_by_a_wire() -> Result<(), Error> {
    let (one, other) = Port::pair();
    let mut sender = Driver::of(Emulated::polled(Igb::new(OTHER).with_wire(one))?);
    let mut receiver = Driver::of(Emulated::polled(Igb::new(MAC).with_wire(other))?);
    sender.poll();
    sender.transmit_queue(0);
    receiver.receive_queue(0, 1, 2);
    for len in (60..1514).step_by(11) {
        sender.send(0, &frame(MAC, len), ADVANCED, 0);
        sender.poll();
        receiver.poll();
        assert_eq!(receiver.received(0).unwrap().data, frame(MAC, len));
    }
    let count = sender.read(0x4080);
    assert_eq!((count, receiver.read(0x4074)), (133, 133));
    Ok(())
}
