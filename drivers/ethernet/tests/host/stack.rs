//! A TCP/IP stack on the driver, and peers that are not to be trusted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::{IpAddress, IpCidr};
use vfio_remap::Device;
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap_ethernet::smoltcp::StackDevice;
use vfio_remap_ethernet::{Nic, Settings};

use super::LONG;

const CARD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const ADDRESS: [u8; 4] = [10, 0, 0, 1];

/// The sum of the Internet (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

/// A SYN to port 80, from an address.
fn syn(source: [u8; 4]) -> Vec<u8> {
    let mut ip = [&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0][..], &source, &ADDRESS].concat();
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum);
    let mut segment = [0; 20];
    segment[..4].copy_from_slice(&[0x04, 0xd2, 0, 80]);
    segment[12..16].copy_from_slice(&[0x50, 2, 0x10, 0]);
    let sum = checksum(&[&source, &ADDRESS, &[0, 6, 0, 20], &segment]);
    segment[16..18].copy_from_slice(&sum);
    [&CARD[..], &PEER, &[8, 0], &ip, &segment, &[0; 6]].concat()
}

/// Who has the card's address? 10.0.0.2 asks.
fn arp() -> Vec<u8> {
    let request = [0, 1, 8, 0, 6, 4, 0, 1];
    [&[0xff; 6][..], &PEER, &[8, 6], &request, &PEER, &[10, 0, 0, 2], &[0; 6], &ADDRESS, &[0; 18]]
        .concat()
}

/// smoltcp 0.12 panicked: it answered, to nobody.
#[test]
fn a_syn_from_no_address_does_not_end_the_stack() {
    let (port, network) = Port::pair();
    let model = Emulated::new(Igb::new(CARD).with_wire(port)).unwrap();
    let nic = Nic::new(Device::new(Arc::new(model)), Settings::DEFAULT).unwrap();
    nic.wait_for_link(LONG).unwrap();
    let mut device = StackDevice::new(nic.queue().unwrap()).unwrap();
    let started = Instant::now();
    let clock = || smoltcp::time::Instant::from_micros(started.elapsed().as_micros() as i64);
    let config = Config::new(device.hardware_address().into());
    let mut interface = Interface::new(config, &mut device, clock());
    interface.update_ip_addrs(|addresses| {
        addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, 1), 24)).unwrap();
    });
    let buffer = || tcp::SocketBuffer::new(vec![0; 256]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(80).unwrap();
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(socket);

    // The second is a peer's, for which the socket leaves its state: so both were looked at.
    for frame in [arp(), syn([0; 4]), syn([10, 0, 0, 2])] {
        network.send(&frame);
    }
    while sockets.get::<tcp::Socket>(handle).state() != tcp::State::SynReceived
        || network.receive().is_none()
    {
        assert!(started.elapsed() < LONG, "{}", sockets.get::<tcp::Socket>(handle).state());
        interface.poll(clock(), &mut device, &mut sockets);
        device.wait(Duration::from_millis(10)).unwrap();
    }
    let received = device.counts().received;
    assert_eq!(received, 3, "a frame was dropped before the stack");
    device.stop().unwrap();
    nic.close().unwrap();
}
