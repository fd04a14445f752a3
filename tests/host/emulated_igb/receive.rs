//! Receive queues: descriptors, filters, RSS, checksums, statistics; and drivers that mean harm.

use std::collections::BTreeSet;

use super::driver::{
    BUFFER, Driver, ENTRIES, IOVA, MAC, RCTL, RCTL_VALUE, RXCSUM, SIZE, datagram, frame,
};
use crate::support::shared;

const CTRL: u64 = 0;
const VLAN_MODE: u32 = 0x4000_0041;

fn tagged(frame: &[u8], tag: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let [a, b] = tag.to_be_bytes();
    frame.splice(12..12, [0x81, 0, a, b]);
    frame
}

#[test]
fn frames_go_to_buffers_and_descriptors_say_what_they_are() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    for round in 0..40 {
        network.send(&frame(MAC, 60 + round));
        driver.poll();
        let received = driver.received(0).unwrap();
        assert_eq!((received.data, received.words[2]), (frame(MAC, 60 + round), 3));
    }
    for (protocol, kind, sums) in [(6, 0x11, 0x60), (17, 0x21, 0x70)] {
        network.send(&datagram(protocol, 7, 100));
        driver.poll();
        let received = driver.received(0).unwrap();
        assert_eq!(received.status(), 3 | sums);
        assert_eq!((received.words[0] >> 4, received.words[1] & 0xffff), (kind, 0x1234));
        for (at, error) in [(22, 1 << 30), (60, 1 << 29)] {
            let mut wrong = datagram(protocol, 7, 100);
            wrong[at] ^= 4;
            network.send(&wrong);
            driver.poll();
            assert_eq!(driver.received(0).unwrap().status(), 3 | sums | error);
        }
    }
    driver.write(RXCSUM, 0);
    network.send(&datagram(6, 7, 100));
    driver.poll();
    assert_eq!(driver.received(0).unwrap().status(), 3);
}

#[test]
fn legacy_descriptors_say_the_same() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 0, 2);
    driver.write(CTRL, VLAN_MODE);
    let mut wrong = datagram(17, 7, 100);
    wrong[60] ^= 1;
    network.send(&tagged(&wrong, 0x2003));
    driver.poll();
    let at = 0x4000;
    let words = shared::get(&driver.memory, at, 16);
    let (place, at) = driver.buffer(0);
    assert_eq!(words[..8], place.to_le_bytes(), "the address stays");
    assert_eq!(words[8..10], (wrong.len() as u16).to_le_bytes());
    assert_eq!(words[12..], [0x7b, 0x20, 0x03, 0x20]);
    assert_eq!(shared::get(&driver.memory, at, wrong.len()), wrong);
}

#[test]
fn a_jumbo_frame_takes_several_buffers_and_the_check_sequence_if_it_is_wanted() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    driver.write(RCTL, RCTL_VALUE & !(1 << 26));
    let jumbo = frame(MAC, 9018);
    network.send(&jumbo);
    network.send(&frame(MAC, 9726));
    driver.poll();
    let parts: Vec<_> = std::iter::from_fn(|| driver.received(0)).collect();
    let sizes: Vec<_> = parts.iter().map(|part| part.data.len()).collect();
    assert_eq!(sizes, [2048, 2048, 2048, 2048, 830]);
    let states: Vec<_> = parts.iter().map(|part| part.status()).collect();
    assert_eq!(states, [1, 1, 1, 1, 3]);
    let data = parts.into_iter().flat_map(|part| part.data).collect::<Vec<_>>();
    assert_eq!(data[..9018], jumbo);
    assert_eq!(driver.read(0x40ac), 1, "the other one is too long");
    // Without long packets: 1,518 bytes with the check sequence, and 4 more with a tag.
    driver.write(RCTL, RCTL_VALUE & !0x20);
    for (data, fits) in [
        (frame(MAC, 1514), true),
        (frame(MAC, 1515), false),
        (tagged(&frame(MAC, 1514), 1), true),
        (tagged(&frame(MAC, 1515), 1), false),
    ] {
        network.send(&data);
        driver.poll();
        assert_eq!(driver.received(0).map(|received| received.data), fits.then_some(data));
    }
}

#[test]
fn addresses_are_filtered_as_the_driver_asks() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    let (stranger, group, all) = ([2, 0, 0, 0, 0, 8], [1, 0, 0x5e, 0, 0, 1], [0xff; 6]);
    let arrive = |driver: &mut Driver, to: [u8; 6]| {
        network.send(&frame(to, 60));
        driver.poll();
        driver.received(0).map(|received| received.status() & 0x80 == 0)
    };
    let all_four = |driver: &mut Driver| [MAC, stranger, group, all].map(|to| arrive(driver, to));
    let exact = Some(true);
    assert_eq!(all_four(&mut driver), [exact, None, None, exact]);
    driver.write(RCTL, RCTL_VALUE & !0x8000);
    assert_eq!(all_four(&mut driver), [exact, None, None, None]);
    driver.write(RCTL, RCTL_VALUE | 0x8);
    assert_eq!(all_four(&mut driver), [exact, Some(false), None, exact]);
    driver.write(RCTL, RCTL_VALUE | 0x10);
    assert_eq!(all_four(&mut driver), [exact, None, Some(false), exact]);
    driver.write(RCTL, RCTL_VALUE);
    // Bits 47:36 of the group's address.
    driver.write(0x5200, 1 << 0x10);
    assert_eq!(all_four(&mut driver), [exact, None, Some(false), exact]);
    driver.write(0x5408, u32::from_le_bytes([2, 0, 0, 0]));
    driver.write(0x540c, 0x8000_0800);
    assert_eq!(all_four(&mut driver), [exact, exact, Some(false), exact]);
    assert_eq!(driver.read(0x407c), 3, "multicast frames");
}

#[test]
fn tags_are_stripped_and_filtered() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    let data = datagram(6, 7, 100);
    let arrive = |driver: &mut Driver, tag: u16| {
        network.send(&tagged(&data, tag));
        driver.poll();
        driver.received(0)
    };
    let received = arrive(&mut driver, 0x6005).unwrap();
    assert_eq!((received.data, received.words[2] & 8), (tagged(&data, 0x6005), 0));
    driver.write(CTRL, VLAN_MODE);
    let received = arrive(&mut driver, 0x6005).unwrap();
    assert_eq!((received.tag(), received.status()), (0x6005, 0x6b));
    assert_eq!(received.data, data);
    driver.write(RCTL, RCTL_VALUE | 1 << 18);
    assert!(arrive(&mut driver, 0x6005).is_none());
    driver.write(0x5600 + 4 * (0xfff >> 5), 1 << 31);
    assert!(arrive(&mut driver, 0x6005).is_none() && arrive(&mut driver, 0x1fff).is_some());
    driver.write(RCTL, RCTL_VALUE | 3 << 18);
    assert!(arrive(&mut driver, 0x1fff).is_none() && arrive(&mut driver, 0x0fff).is_some());
    network.send(&frame(MAC, 60));
    driver.poll();
    assert!(driver.received(0).is_some(), "without a tag");
}

#[test]
fn flows_are_spread_over_queues_and_each_stays_on_its_own() {
    let (mut driver, network) = Driver::new();
    for queue in 0..4 {
        driver.receive_queue(queue, 1, 2);
    }
    driver.write(RXCSUM, 0x2300);
    driver.write(0x5818, 0x0043_0002);
    let mut key = 0x9e37_79b9u32;
    for index in 0..10 {
        key = key.wrapping_mul(0x2c1b_3c6d) ^ key >> 13;
        driver.write(0x5c80 + 4 * index, key);
    }
    for index in 0..32 {
        driver.write(0x5c00 + 4 * index, 0x0302_0100);
    }
    let mut counts = [0; 4];
    let mut hashes = BTreeSet::new();
    for port in 0..200 {
        let mut places = BTreeSet::new();
        for _ in 0..2 {
            for protocol in [6, 17] {
                network.send(&datagram(protocol, port, 20));
                driver.poll();
                let found = (0..4).find_map(|queue| Some((queue, driver.received(queue)?)));
                let (queue, received) = found.unwrap();
                assert_eq!(received.words[0] & 15, if protocol == 6 { 1 } else { 7 });
                assert_eq!(received.words[1] & 3, queue as u32, "by the table");
                counts[queue] += 1;
                hashes.insert(received.words[1]);
                places.insert(queue);
            }
        }
        assert_eq!(places.len(), 1, "port {port}");
    }
    assert!(counts.iter().all(|count| *count > 80), "{counts:?}");
    assert_eq!(hashes.len(), 200);
    network.send(&frame(MAC, 60));
    driver.poll();
    assert_eq!(driver.received(0).unwrap().words[..2], [0, 0], "what has no flow has no hash");
}

#[test]
fn a_frame_without_a_descriptor_waits_or_is_dropped_and_counted() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    let count = ENTRIES as usize + 4;
    let send_all = || (0..count).for_each(|index| network.send(&frame(MAC, 60 + index)));
    send_all();
    driver.poll();
    let head = driver.receive_page.register::<u32>(0x10).unwrap();
    assert_eq!(head.read(), ENTRIES - 1);
    assert_eq!((driver.read(0x40a0), driver.read(0x4010)), (1, 0), "it waits, nothing is missed");
    for index in 0..count {
        driver.poll();
        assert_eq!(driver.received(0).unwrap().data, frame(MAC, 60 + index));
    }
    driver.poll();
    driver.receive_queue(0, 1, 2);
    driver.receive_page.register::<u32>(0x0c).unwrap().write(1 << 31 | 1 << 25 | 2);
    send_all();
    driver.poll();
    let received = ENTRIES - 1;
    assert_eq!((driver.read(0x4010), driver.read(0x4074)), (5, count as u32 + received));
    assert_eq!(std::iter::from_fn(|| driver.received(0)).count() as u32, received);
    // No queue, and no room on the wire.
    driver.receive_page.register::<u32>(0x28).unwrap().write(0);
    network.send(&frame(MAC, 60));
    driver.poll();
    assert_eq!(driver.read(0x4010), 1);
    for _ in 0..5000 {
        network.send(&frame(MAC, 60));
    }
    driver.poll();
    assert_eq!(driver.read(0x4010), 5000);
}

#[test]
fn statistics_agree_with_what_was_sent_and_clear_when_read() {
    let (mut driver, network) = Driver::new();
    driver.receive_queue(0, 1, 2);
    let mut octets = 0;
    for len in [60, 61, 200, 300, 600, 1200, 1514] {
        network.send(&frame(MAC, len));
        octets += len as u32 + 4;
        driver.poll();
        driver.received(0).unwrap();
    }
    network.send(&frame([0xff; 6], 60));
    network.send(&frame([2, 9, 9, 9, 9, 9], 60));
    driver.poll();
    let by_size = [0, 1, 2, 3, 4, 5].map(|class| driver.read(0x405c + 4 * class));
    assert_eq!(by_size, [2, 1, 1, 1, 1, 2]);
    assert_eq!([0x4074, 0x4078, 0x40d0].map(|at| driver.read(at)), [8, 1, 9]);
    assert_eq!([0x4074, 0x4078, 0x40d0].map(|at| driver.read(at)), [0; 3]);
    assert_eq!(
        [0x4088, 0x4088, 0x408c, 0x4088].map(|at| driver.read(at)),
        [octets + 64, octets + 64, 0, 0]
    );
}

/// Registers, descriptors and frames of noise: the card answers, comes to rest, and works after a reset.
#[test]
fn no_driver_however_hostile_stops_the_card() {
    let mut noise = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise
    };
    for round in 0..300 {
        let (mut driver, network) = Driver::new();
        for index in 0..0x400 {
            // Addresses that are mapped, often.
            let low = (IOVA + next() % (SIZE as u64 + 0x1000)) as u32;
            let high = if next() % 8 == 0 { next() as u32 } else { 0 };
            let command =
                next() as u32 & if round % 2 == 0 { !0 } else { 0xf930_ffff } | 0x2000_0000;
            let words = [low, high, command, next() as u32];
            shared::put(&driver.memory, 16 * index, words.map(u32::to_le_bytes).as_flattened());
        }
        driver.receive_queue(0, next() as u32 % 8, next() as u32 % 4);
        for queue in 0..16 {
            driver.transmit_queue(queue);
            for page in [&driver.receive_page, &driver.transmit_page] {
                let register = |offset| page.register::<u32>(0x40 * queue + offset).unwrap();
                match next() % 4 {
                    0 => register(0x08).write(next() as u32),
                    1 => register(0x10).write(next() as u32 % 32),
                    2 => register(0x00).write(next() as u32),
                    _ => register(0x28).write(next() as u32 | 1 << 25),
                }
                register(0x18).write(next() as u32 % if round % 3 == 0 { 0x1_0000 } else { 16 });
            }
        }
        for _ in 0..40 {
            let offset = next() % 0x8000 * 4;
            // Not what resets it, or takes what it works with away.
            if !(0xc000..0xf000).contains(&offset) && offset > 4 && offset != 0x400 {
                driver.write(offset, next() as u32);
            }
            driver.read(next() % 0x8000 * 4);
            network.send(&vec![next() as u8; next() as usize % BUFFER]);
            let start = std::time::Instant::now();
            driver.card.poll().unwrap();
            // A turn of 128 KiB takes a millisecond or so; the machine may be busy.
            assert!(start.elapsed() < std::time::Duration::from_secs(2));
            while network.receive().is_some() {}
        }
        driver.write(CTRL, 1 << 26);
        driver.start();
        driver.write(RCTL, RCTL_VALUE | 8);
        driver.receive_queue(0, 1, 2);
        network.send(&frame(MAC, 60));
        driver.poll();
        assert_eq!(driver.received(0).unwrap().data, frame(MAC, 60), "round {round}");
    }
}
