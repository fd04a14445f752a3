//! What a card can be connected to.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use vfio_remap::ErrorKind;
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Capture, Igb, Packets, Port, Respond};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::driver::{Driver, MAC, OTHER, STATUS, frame};

const ADVANCED: u32 = 0x2b30_0000;

/// Memory that others can look at, and that is full at some point.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>, usize);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap();
        if all.len() + bytes.len() > self.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        all.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The frames of a capture.
fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    assert_eq!((word(bytes, 0), word(bytes, 4), word(bytes, 20)), (0xa1b2_c3d4, 0x0004_0002, 1));
    bytes = &bytes[24..];
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let len = word(bytes, 8) as usize;
        assert_eq!(word(bytes, 12) as usize, len);
        assert!(word(bytes, 0) > 1_600_000_000 && word(bytes, 4) < 1_000_000, "now");
        frames.push(bytes[16..16 + len].to_vec());
        bytes = &bytes[16 + len..];
    }
    frames
}

#[test]
fn a_capture_has_what_passes_both_ways_until_it_cannot_be_written() {
    for room in [1 << 20, 24 + 16 + 60] {
        let file = Shared(Arc::default(), room);
        let (port, network) = Port::pair();
        let wire = Capture::new(port, file.clone()).unwrap();
        let mut driver = Driver::of(Emulated::polled(Igb::new(MAC).with_wire(wire)).unwrap());
        driver.transmit_queue(0);
        driver.receive_queue(0, 1, 2);
        driver.send(0, &frame(OTHER, 60), ADVANCED, 0);
        driver.poll();
        network.send(&frame(MAC, 61));
        driver.poll();
        assert!(network.receive().is_some() && driver.received(0).is_some());
        let mut expected = vec![frame(OTHER, 60), frame(MAC, 61)];
        expected.truncate(if room == 1 << 20 { 2 } else { 1 });
        assert_eq!(frames(&file.0.lock().unwrap()), expected);
    }
    let (port, _network) = Port::pair();
    let error = Capture::new(port, Shared(Arc::default(), 23)).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os);
    let (port, _network) = Port::pair();
    let error = Capture::create(port, "/nowhere/frames.pcap").map(drop).unwrap_err();
    assert!(error.to_string().contains("/nowhere/frames.pcap"), "{error}");
}

#[test]
fn a_function_answers() {
    let echo = Respond::new(|frame: &[u8], answer: &mut dyn FnMut(&[u8])| {
        answer(&[&frame[6..12], &frame[..6], &frame[12..]].concat());
        answer(&[0xff; 60]);
    });
    let mut driver = Driver::of(Emulated::polled(Igb::new(MAC).with_wire(echo)).unwrap());
    driver.transmit_queue(0);
    driver.receive_queue(0, 1, 2);
    driver.send(0, &[&OTHER[..], &MAC, &[8; 90]].concat(), ADVANCED, 0);
    driver.poll();
    assert_eq!(driver.received(0).unwrap().data, [&MAC[..], &OTHER, &[8; 90]].concat());
    assert_eq!(driver.received(0).unwrap().data, [0xff; 60]);
    assert!(driver.received(0).is_none());
}

#[test]
fn an_unplugged_cable_loses_what_is_on_it() {
    let (one, other) = Port::pair();
    one.send(&[1; 60]);
    other.set_up(false);
    one.send(&[2; 60]);
    assert!(!one.is_up());
    other.set_up(true);
    assert_eq!(other.receive(), None);
    one.send(&[3; 60]);
    one.send(&[3; 10_000]);
    assert_eq!((other.receive().map(|frame| frame[0]), other.receive()), (Some(3), None));
    let count = (0..5000).filter(|_| {
        one.send(&[4; 9000]);
        other.is_up()
    });
    assert_eq!(count.count(), 5000);
    let waiting = std::iter::from_fn(|| other.receive()).count();
    assert_eq!(waiting, (1 << 20) / 9000, "no more than there is room for");
}

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

#[test]
fn packets_of_a_socket_are_frames() {
    for kind in [SockType::SeqPacket, SockType::Datagram] {
        let (ours, theirs) = pair(kind);
        let wire = Packets::new(ours).unwrap();
        let mut driver = Driver::of(Emulated::polled(Igb::new(MAC).with_wire(wire)).unwrap());
        driver.transmit_queue(0);
        driver.receive_queue(0, 1, 2);
        driver.send(0, &frame(OTHER, 99), ADVANCED, 0);
        driver.poll();
        let mut bytes = [0; 200];
        let len = recv(theirs.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!(bytes[..len], frame(OTHER, 99));
        for data in [vec![0; 12_000], frame(MAC, 77)] {
            send(theirs.as_raw_fd(), &data, MsgFlags::empty()).unwrap();
        }
        driver.poll();
        assert_eq!(driver.received(0).unwrap().data, frame(MAC, 77), "{kind:?}");
        assert!(driver.received(0).is_none());
        // Nobody reads: what finds no room is lost, and nothing waits.
        for _ in 0..2000 {
            driver.send(0, &frame(OTHER, 1514), ADVANCED, 0);
            driver.poll();
        }
        assert_eq!(driver.read(STATUS) & 2, 2);
        drop(theirs);
        driver.poll();
        driver.send(0, &frame(OTHER, 99), ADVANCED, 0);
        driver.poll();
        assert_eq!(driver.read(STATUS) & 2 != 0, kind == SockType::Datagram);
    }
}

#[test]
fn what_keeps_no_packets_apart_is_no_wire() {
    let (datagrams, _other) = UnixDatagram::pair().unwrap();
    assert!(Packets::new(datagrams).is_ok());
    let (stream, _other) = UnixStream::pair().unwrap();
    let (pipe, _other) = io::pipe().unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    for fd in [OwnedFd::from(stream), pipe.into(), file.into()] {
        let error = Packets::new(fd).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(!error.advice().is_empty());
    }
}
