//! What QEMU sees on the wire of what the driver sends.

use std::sync::Mutex;
use std::time::Instant;

use vfio_remap_ethernet::{MacAddress, Settings};

use super::host::Host;
use super::packets::{check_segments, ip, tcp};
use super::station::{Station, ethernet};
use super::{LONG, on_both};
use crate::machine::Machine;

/// To nobody: the user network ignores it.
const NOBODY: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

/// The frames of a capture file (draft-ietf-opsawg-pcap §4, §5).
fn frames(capture: &[u8]) -> Vec<Vec<u8>> {
    let word = |at: usize| u32::from_le_bytes(capture[at..at + 4].try_into().unwrap());
    // Its magic number, and Ethernet.
    assert_eq!((word(0), word(20)), (0xa1b2_c3d4, 1));
    let mut frames = Vec::new();
    let mut at = 24;
    while at < capture.len() {
        let length = word(at + 8) as usize;
        assert_eq!(word(at + 12) as usize, length, "a frame was not captured whole");
        frames.push(capture[at + 16..at + 16 + length].to_vec());
        at += 16 + length;
    }
    frames
}

#[test]
fn segments_of_64_kib_are_frames_on_the_wire() {
    // As much as IP allows, also with the longer header of IPv6.
    const DATA: usize = 0xffff - 40 - 20;
    const MSS: usize = 1440;
    let machine = Mutex::new(Machine::open());
    let say = |command: String| assert_eq!(machine.lock().unwrap().say(&command), "");
    let data: Vec<u8> = (0..DATA).map(|at| (at * 23 + (at >> 8)) as u8).collect();
    on_both(|name, _| {
        say(format!(
            "object_add filter-dump,id=dump-{name},netdev=net-{name},file=net-{name}.pcap"
        ));
        let mut station = Station::new(name, Settings::default());
        let us = station.nic.address();
        let packets = [true, false].map(|is_ipv4| (is_ipv4, ip(is_ipv4, 6, 4000, &tcp(0))));
        for (_, (kind, packet)) in &packets {
            let headers = ethernet(NOBODY, us, u16::from_be_bytes(*kind), packet);
            let mut frames = vec![station.pool.frame_of(&headers).unwrap()];
            frames[0].offload_segments(MSS as u16).unwrap();
            frames.extend(data.chunks(2000).map(|part| station.pool.frame_of(part).unwrap()));
            let last = frames.len() - 1;
            frames[..last].iter_mut().for_each(|frame| frame.set_goes_on(true));
            let end = Instant::now() + LONG;
            while !frames.is_empty() {
                station.queues.transmitter.transmit(&mut frames, &mut station.pool).unwrap();
                station.queues.transmitter.reclaim(&mut station.pool);
                assert!(Instant::now() < end);
            }
        }
        station.stop();
        say(format!("object_del dump-{name}"));
        let mut host = Host::new(name, Settings::default());
        host.configure();
        let captured = frames(&host.captured(50_003));
        host.stop();
        for (is_ipv4, (kind, packet)) in packets {
            let of_kind = |frame: &&Vec<u8>| frame[..6] == NOBODY.0 && frame[12..14] == kind;
            let segments: Vec<_> = captured.iter().filter(of_kind).cloned().collect();
            assert_eq!(segments.len(), DATA.div_ceil(MSS), "{name}, IPv4 {is_ipv4}");
            check_segments(&segments, 14 + packet.len(), &data, is_ipv4);
        }
    });
}
