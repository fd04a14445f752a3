//! DHCP servers that offer what makes no sense: the stack takes what it can use, and nothing panics.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use clap::Parser;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use vfio_remap::emulated::igb::Port;

use crate::card::{Card, settings};
use crate::network::Network;
use crate::options::Options;
use crate::peer::{ADDRESS, OFFERED};
use crate::stack::Stack;
use crate::stop::Stop;

const SERVER: u16 = 67;
const CLIENT: u16 = 68;

/// What a server says.
#[derive(Clone, Copy)]
struct Lease {
    /// Where its packets come from.
    source: Ipv4Addr,
    router: Ipv4Addr,
    dns: [Ipv4Addr; 2],
    /// When the client is to renew and to rebind it, and when it ends, in seconds.
    times: [u32; 3],
}

const GOOD: Lease =
    Lease { source: ADDRESS, router: ADDRESS, dns: [ADDRESS; 2], times: [1800, 3000, 3600] };

impl Lease {
    /// The answer to a frame, if a DHCP client has sent it; and whether it had asked for offers.
    fn answer(&self, frame: &[u8]) -> Option<(Vec<u8>, bool)> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
        let udp = UdpPacket::new_checked(packet.payload()).ok()?;
        let asked = DhcpPacket::new_checked(udp.payload()).ok()?;
        let asked = DhcpRepr::parse(&asked).ok().filter(|_| udp.dst_port() == SERVER)?;
        let discovers = asked.message_type == DhcpMessageType::Discover;
        let [renew, rebind, end] = self.times;
        let answer = DhcpRepr {
            message_type: if discovers { DhcpMessageType::Offer } else { DhcpMessageType::Ack },
            transaction_id: asked.transaction_id,
            secs: 0,
            client_hardware_address: asked.client_hardware_address,
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: OFFERED,
            server_ip: self.source,
            router: Some(self.router),
            subnet_mask: Some(Ipv4Addr::new(255, 255, 255, 0)),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: true,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(ADDRESS),
            parameter_request_list: None,
            dns_servers: Some(self.dns.into_iter().collect()),
            max_size: None,
            lease_duration: Some(end),
            renew_duration: Some(renew),
            rebind_duration: Some(rebind),
            additional_options: &[],
        };
        let mut bytes = vec![0; answer.buffer_len()];
        answer.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
        Some((self.packet(asked.client_hardware_address, &bytes), discovers))
    }

    /// A frame with a message to a client.
    fn packet(&self, to: EthernetAddress, message: &[u8]) -> Vec<u8> {
        let udp = UdpRepr { src_port: SERVER, dst_port: CLIENT };
        let ip = Ipv4Repr {
            src_addr: self.source,
            dst_addr: Ipv4Addr::BROADCAST,
            next_header: IpProtocol::Udp,
            payload_len: udp.header_len() + message.len(),
            hop_limit: 64,
        };
        let ethernet = EthernetRepr {
            src_addr: EthernetAddress([2, 0, 0, 0, 0, 0xfe]),
            dst_addr: to,
            ethertype: EthernetProtocol::Ipv4,
        };
        let mut bytes = vec![0; ethernet.buffer_len() + ip.buffer_len() + ip.payload_len];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        ethernet.emit(&mut frame);
        let checksums = ChecksumCapabilities::default();
        let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
        ip.emit(&mut packet, &checksums);
        udp.emit(
            &mut UdpPacket::new_unchecked(packet.payload_mut()),
            &self.source.into(),
            &Ipv4Addr::BROADCAST.into(),
            message.len(),
            |payload| payload.copy_from_slice(message),
            &checksums,
        );
        bytes
    }
}

/// A server that makes the first client who asks the first of these offers, and the next one the next. How often it
/// was asked.
fn serve(wire: &Port, leases: &[Lease], stop: &Stop) -> usize {
    let mut asked = 0;
    while !stop.is_set() {
        let Some(frame) = wire.receive() else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let Some((_, discovers)) = GOOD.answer(&frame) else { continue };
        // An offer, and the acknowledgement after it, are of one lease.
        asked += usize::from(discovers);
        let lease = leases[asked.clamp(1, leases.len()) - 1];
        wire.send(&lease.answer(&frame).unwrap().0);
    }
    asked
}

/// The network that a stack is in after it has asked such a server, and how often it has asked.
fn network(leases: &[Lease]) -> (Network, usize) {
    let options = Options::parse_from(["nic", "info", "--link-timeout", "60"]);
    let common = &options.common;
    let stop = Stop::default();
    let card = Card::open(common, settings(common)).unwrap();
    let result = card.run(|card| {
        let wire = card.wire.take().unwrap();
        card.link(common, &stop)?;
        thread::scope(|scope| {
            let server = scope.spawn(|| serve(&wire, leases, &stop));
            let mut stack = Stack::new(&card.nic, &Stop::default()).unwrap();
            let configured = stack.configure(common);
            stop.set();
            let asked = server.join().unwrap();
            configured?;
            let network = stack.network.clone();
            stack.close()?;
            Ok((network, asked))
        })
    });
    result.unwrap()
}

#[test]
fn a_router_that_is_no_station_is_left_out() {
    let (expected, _) = network(&[GOOD]);
    assert_eq!(expected.router, Some(ADDRESS));
    let everybody = Ipv4Addr::new(224, 0, 0, 1);
    for router in [everybody, Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED] {
        let (found, _) = network(&[Lease { router, dns: [router, ADDRESS], ..GOOD }]);
        assert_eq!(found, Network { router: None, dns: vec![ADDRESS], ..expected.clone() });
    }
}

#[test]
fn a_lease_that_cannot_be_renewed_is_not_taken() {
    // It is to be renewed at once, at a server without an address.
    let bad = Lease { source: Ipv4Addr::UNSPECIFIED, times: [0, 1, 3600], ..GOOD };
    let (found, asked) = network(&[bad, GOOD]);
    assert_eq!(found.router, Some(ADDRESS));
    assert!(asked >= 2, "{asked}");
}
