//! What the driver has the cards do to frames.

use std::collections::BTreeMap;

use vfio_remap::ErrorKind;
use vfio_remap_ethernet::{Checksum, Frame, MacAddress, Settings};

use super::loopback::Loop;
use super::on_both;
use super::packets::{check_segments, fold, ip, sum, tcp, transport_sum, udp};

#[test]
fn puts_in_checksums_and_tells_wrong_ones() {
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::default());
        for is_ipv4 in [true, false] {
            for (protocol, content) in [(17, udp(700)), (6, tcp(700)), (6, tcp(1))] {
                let what = format!("{name}: IPv4 {is_ipv4}, protocol {protocol}");
                let (kind, packet) = ip(is_ipv4, protocol, 4000, &content);
                let bytes = card.ethernet(kind, &packet);
                let mut frame = card.frame(&bytes);
                frame.offload_checksums().unwrap();
                let received = card.exchange_one(frame);
                assert_eq!(
                    transport_sum(&received.bytes, is_ipv4),
                    0xffff,
                    "{what}: {received:x?}"
                );
                assert_eq!(received.transport, Checksum::Good, "{what}");
                if is_ipv4 {
                    assert_eq!(fold(sum(&received.bytes[14..34])), 0xffff, "{what}");
                    assert_eq!(received.ip, Checksum::Good, "{what}");
                }
                // As it is, it is wrong: also after the card had put in others.
                let frame = card.frame(&bytes);
                let received = card.exchange_one(frame);
                assert!(received.bytes.starts_with(&bytes), "{what}");
                assert_eq!(received.transport, Checksum::Wrong, "{what}");
                if is_ipv4 {
                    assert_eq!(received.ip, Checksum::Wrong, "{what}");
                }
            }
        }
        let bytes = card.ethernet([8, 6], &[0; 46]);
        let mut frame = card.frame(&bytes);
        assert_eq!(frame.offload_checksums().unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(frame.offload_segments(1000).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(card.exchange_one(frame).transport, Checksum::Unchecked);
        card.stop();
    });
}

#[test]
fn makes_segments_of_64_kib() {
    // As much as IP allows, also with the longer header of IPv6.
    const DATA: usize = 0xffff - 40 - 20;
    const MSS: usize = 1460;
    let pattern = |at: usize| (at * 31 + (at >> 8)) as u8;
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::default());
        for is_ipv4 in [true, false] {
            let mss = if is_ipv4 { MSS } else { MSS - 20 };
            let (kind, packet) = ip(is_ipv4, 6, 4000, &tcp(0));
            let headers = card.ethernet(kind, &packet);
            // The headers, and data in 33 buffers of which none is full.
            let mut frames = vec![card.frame(&headers)];
            frames[0].offload_segments(mss as u16).unwrap();
            let data: Vec<u8> = (0..DATA).map(pattern).collect();
            frames.extend(data.chunks(2000).map(|part| card.frame(part)));
            let last = frames.len() - 1;
            frames[..last].iter_mut().for_each(|frame| frame.set_goes_on(true));
            let found = card.exchange(frames);
            assert_eq!(found.len(), DATA.div_ceil(mss), "{name}");
            assert!(found.iter().all(|(_, segment)| segment.transport == Checksum::Good));
            let segments: Vec<_> = found.into_iter().map(|(_, segment)| segment.bytes).collect();
            check_segments(&segments, headers.len(), &data, is_ipv4);
        }
        assert_eq!(card.nic.statistics().unwrap().segmented, 2);
        card.stop();
    });
}

#[test]
fn sends_no_packet_that_it_cannot() {
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::DEFAULT.with_transmit_entries(16));
        let good = card.ethernet([0x88, 0xb5], &[1; 46]);
        let refused = |card: &mut Loop, frames: Vec<Frame>| {
            let mut frames = frames;
            let count = frames.len();
            // What comes before is sent.
            let first = card.frame(&good);
            frames.insert(0, first);
            let transmitter = &mut card.pairs[0].transmitter;
            assert_eq!(transmitter.transmit(&mut frames, &mut card.pool).unwrap(), 1);
            let error = transmitter.transmit(&mut frames, &mut card.pool).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
            assert_eq!(frames.len(), count);
            frames.into_iter().for_each(|frame| card.pool.put(frame).unwrap());
        };
        let short = card.frame(&good[..16]);
        refused(&mut card, vec![short]);
        let long = card.frame(&[7; 1519]);
        refused(&mut card, vec![long]);
        let mut endless = card.frame(&good);
        endless.set_goes_on(true);
        refused(&mut card, vec![endless]);
        let mut many: Vec<_> = (0..20).map(|_| card.frame(&good)).collect();
        many[..19].iter_mut().for_each(|frame| frame.set_goes_on(true));
        refused(&mut card, many);
        let (kind, packet) = ip(true, 6, 1, &tcp(100));
        let bytes = card.ethernet(kind, &packet);
        let mut segments = card.frame(&bytes);
        segments.offload_segments(1500).unwrap();
        refused(&mut card, vec![segments]);
        // It goes on as before.
        let bytes = card.ethernet([0x88, 0xb5], &[2; 60]);
        let frame = card.frame(&bytes);
        let found = card.exchange(vec![frame]);
        assert_eq!(found.len(), 6);
        assert!(found[5].1.bytes == bytes);
        card.stop();
    });
}

#[test]
fn sends_packets_of_several_buffers_and_of_every_length() {
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::default());
        let us = card.nic.address().0;
        for length in [17, 18, 59, 60, 61, 64, 127, 1000, 1513, 1514] {
            let mut bytes = [&us[..], &us, &[0x88, 0xb5]].concat();
            bytes.extend((bytes.len()..length).map(|at| (at % 251) as u8));
            // In one buffer, and in as many as can be told apart.
            let whole = card.frame(&bytes);
            let mut parts: Vec<_> =
                bytes.chunks(length.div_ceil(5).max(14)).map(|part| card.frame(part)).collect();
            let last = parts.len() - 1;
            parts[..last].iter_mut().for_each(|frame| frame.set_goes_on(true));
            let found = card.exchange(std::iter::once(whole).chain(parts).collect());
            assert_eq!(found.len(), 2, "{name}, {length} bytes");
            for (_, frame) in found {
                assert!(
                    frame.bytes.len() >= 60 && frame.bytes.starts_with(&bytes),
                    "{length} bytes"
                );
                assert!(frame.bytes[length..].iter().all(|byte| *byte == 0), "{length} bytes");
            }
        }
        card.stop();
    });
}

#[test]
fn inserts_strips_and_filters_vlan_tags() {
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::default());
        let bytes = card.ethernet([0x88, 0xb5], &[3; 100]);
        let tagged = |card: &mut Loop, tag: u16| {
            let mut frame = card.frame(&bytes);
            frame.set_vlan(Some(tag));
            frame
        };
        let frame = tagged(&mut card, 0x6005);
        let received = card.exchange_one(frame);
        assert_eq!((received.vlan, &received.bytes), (Some(0x6005), &bytes), "{name}");
        // A tag that is in the frame.
        let mut with_tag = bytes.clone();
        with_tag.splice(12..12, [0x81, 0, 0x20, 6]);
        let frame = card.frame(&with_tag);
        let received = card.exchange_one(frame);
        assert_eq!((received.vlan, &received.bytes), (Some(0x2006), &bytes), "{name}");
        let frame = card.frame(&bytes);
        assert_eq!(card.exchange_one(frame).vlan, None);
        // The tag and the checksums of one packet, and of the next without a tag.
        let (kind, packet) = ip(true, 17, 4000, &udp(300));
        let datagram = card.ethernet(kind, &packet);
        for tag in [Some(7), None, Some(8)] {
            let mut frame = card.frame(&datagram);
            frame.offload_checksums().unwrap();
            frame.set_vlan(tag);
            let received = card.exchange_one(frame);
            assert_eq!((received.vlan, received.transport), (tag, Checksum::Good), "{name}");
        }
        card.nic.set_vlan_filter(true).unwrap();
        card.nic.add_vlan(5).unwrap();
        let frames = [5, 6, 5].map(|tag| tagged(&mut card, tag)).into();
        let found: Vec<_> =
            card.exchange(frames).into_iter().map(|(_, frame)| frame.vlan).collect();
        assert_eq!(found, [Some(5), Some(5)], "{name}");
        card.nic.remove_vlan(5).unwrap();
        card.nic.add_vlan(6).unwrap();
        let frames = [5, 6].map(|tag| tagged(&mut card, tag)).into();
        let found: Vec<_> =
            card.exchange(frames).into_iter().map(|(_, frame)| frame.vlan).collect();
        assert_eq!(found, [Some(6)], "{name}");
        card.nic.set_vlan_filter(false).unwrap();
        let frames = [5, 6].map(|tag| tagged(&mut card, tag)).into();
        assert_eq!(card.exchange(frames).len(), 2, "{name}");
        assert_eq!(card.nic.add_vlan(4096).unwrap_err().kind(), ErrorKind::OutOfRange);
        card.stop();
    });
}

#[test]
fn has_jumbo_frames() {
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::DEFAULT.with_mtu(9000));
        assert!(card.nic.buffer_size() >= 9014);
        let payload: Vec<u8> = (0..9000u32).map(|at| ((at * 7) >> 3) as u8).collect();
        for length in [1500, 1501, 4000, 9000] {
            let bytes = card.ethernet([0x88, 0xb5], &payload[..length]);
            let mut frame = card.frame(&bytes);
            if length == 9000 {
                frame.set_vlan(Some(3));
            }
            let found = card.exchange(vec![frame]);
            assert_eq!(found.len(), 1, "{name}, {length} bytes: {:?}", card.nic.statistics());
            assert!(found[0].1.bytes == bytes, "{name}, {length} bytes");
        }
        card.stop();
    });
}

#[test]
fn receives_for_the_groups_that_it_has_joined() {
    const GROUP: MacAddress = MacAddress([1, 0, 0x5e, 0, 0, 0xfb]);
    on_both(|name, _| {
        let mut card = Loop::new(name, Settings::default());
        let us = card.nic.address().0;
        let bytes = [&GROUP.0[..], &us, &[0x88, 0xb5], &[4; 60]].concat();
        let comes = |card: &mut Loop| {
            let frame = card.frame(&bytes);
            !card.exchange(vec![frame]).is_empty()
        };
        assert!(!comes(&mut card), "{name}: nobody has joined");
        card.nic.join(GROUP).unwrap();
        card.nic.join(GROUP).unwrap();
        assert!(comes(&mut card), "{name}");
        assert!(card.nic.leave(GROUP).unwrap());
        assert!(!card.nic.leave(GROUP).unwrap());
        assert!(!comes(&mut card), "{name}: it was left");
        card.nic.set_promiscuous(true).unwrap();
        assert!(comes(&mut card), "{name}");
        card.nic.set_promiscuous(false).unwrap();
        let error = card.nic.join(MacAddress([2, 0, 0, 0, 0, 1])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        card.stop();
    });
}

#[test]
fn spreads_flows_over_the_queues_that_are_alive() {
    const FLOWS: u16 = 200;
    for (name, queues) in [("igb", 4), ("e1000e", 2)] {
        let mut card = Loop::new(name, Settings::DEFAULT.with_queues(queues));
        // UDP is not told apart by its ports on the 82574.
        let flows = |card: &mut Loop| {
            let flows: Vec<_> = (0..FLOWS)
                .map(|flow| {
                    let (kind, packet) = ip(true, 6, 5000 + 7 * flow, &tcp(20));
                    let bytes = card.ethernet(kind, &packet);
                    card.frame(&bytes)
                })
                .collect();
            let mut counts = BTreeMap::new();
            let mut places = BTreeMap::new();
            for (queue, frame) in card.exchange(flows) {
                assert!(frame.hash.is_some());
                *counts.entry(queue).or_insert(0u16) += 1;
                places.insert(u16::from_be_bytes([frame.bytes[34], frame.bytes[35]]), queue);
            }
            assert_eq!(places.len(), usize::from(FLOWS), "{name}: {counts:?}");
            (counts, places)
        };
        let (counts, places) = flows(&mut card);
        assert_eq!(counts.len(), usize::from(queues), "{name}: {counts:?}");
        let even = FLOWS / queues;
        assert!(counts.values().all(|count| *count > even / 3), "{name}: {counts:?}");
        assert_eq!(flows(&mut card).1, places, "{name}: a flow stays where it is");
        // Another key leads them elsewhere.
        let key: [u8; 40] = std::array::from_fn(|at| (at * 37 + 11) as u8);
        card.nic.set_rss_key(&key).unwrap();
        assert_ne!(flows(&mut card).1, places, "{name}");
        card.nic.set_rss_table(Some(&[queues - 1; 128])).unwrap();
        assert_eq!(flows(&mut card).0, BTreeMap::from([(queues - 1, FLOWS)]), "{name}");
        let error = card.nic.set_rss_table(Some(&[queues; 128])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        card.nic.set_rss_table(None).unwrap();
        // A queue that stops gives its flows to the others.
        let pair = card.pairs.pop().unwrap();
        let number = pair.receiver.queue();
        drop(pair);
        let (counts, _) = flows(&mut card);
        assert!(!counts.contains_key(&number), "{name}: {counts:?}");
        assert_eq!(counts.len(), usize::from(queues) - 1, "{name}: {counts:?}");
        let hash_of_none = card.ethernet([0x88, 0xb5], &[5; 60]);
        let frame = card.frame(&hash_of_none);
        let found = card.exchange(vec![frame]);
        assert_eq!((found[0].0, found[0].1.hash), (0, None), "{name}: not IP");
        card.stop();
    }
}
