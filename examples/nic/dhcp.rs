//! A DHCP server for one client (RFC 2131): the station at the other end of an emulated card's wire.

use std::net::Ipv4Addr;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp;
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, Ipv4Cidr};

const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// How long the client may keep its address, in seconds.
const LEASE: u32 = 3600;

/// Offers one address. The server is the router and the DNS server.
pub struct Dhcp {
    socket: SocketHandle,
    server: Ipv4Addr,
    offer: Ipv4Cidr,
}

impl Dhcp {
    pub fn new(sockets: &mut SocketSet<'static>, server: Ipv4Addr, offer: Ipv4Cidr) -> Self {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        // A new socket can be bound to any port but 0.
        let _ = socket.bind(SERVER);
        Self { socket: sockets.add(socket), server, offer }
    }

    /// Answers what clients have asked.
    pub fn poll(&self, sockets: &mut SocketSet<'static>) {
        let socket = sockets.get_mut::<udp::Socket>(self.socket);
        while let Some(answer) = socket.recv().ok().map(|(packet, _)| self.answer(packet)) {
            // Without room, the client asks again.
            let _ = answer.map(|bytes| socket.send_slice(&bytes, (Ipv4Addr::BROADCAST, CLIENT)));
        }
    }

    /// What a client is told; `None` if there is nothing to say.
    fn answer(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let packet = DhcpPacket::new_checked(packet).ok()?;
        let asked = DhcpRepr::parse(&packet).ok()?;
        let offer = self.offer.address();
        let message_type = match asked.message_type {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            DhcpMessageType::Request
                if asked.server_identifier.is_some_and(|server| server != self.server) =>
            {
                return None;
            }
            DhcpMessageType::Request => {
                let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
                if wanted == offer { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
            }
            _ => return None,
        };
        let answer = DhcpRepr {
            message_type,
            transaction_id: asked.transaction_id,
            secs: 0,
            client_hardware_address: asked.client_hardware_address,
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: offer,
            server_ip: self.server,
            router: Some(self.server),
            subnet_mask: Some(self.offer.netmask()),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: asked.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(self.server),
            parameter_request_list: None,
            dns_servers: Some([self.server].into_iter().collect()),
            max_size: None,
            lease_duration: Some(LEASE),
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; answer.buffer_len()];
        answer.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).ok()?;
        Some(bytes)
    }
}
