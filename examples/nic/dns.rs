//! A DNS server that knows one host (RFC 1035): the station at the other end of an emulated card's wire.

use std::net::Ipv4Addr;

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp;
use smoltcp::wire::{DnsPacket, DnsQueryType, DnsQuestion};

const PORT: u16 = 53;
const HEADER: usize = 12;
/// A response with authority, to one question; with one answer, and the error that there is no such name.
const RESPONSE: u16 = 0x8400;
const NO_NAME: u16 = 3;
/// The name of the question, type A, class IN, kept for a minute, four bytes (RFC 1035 §4.1.3, §4.1.4).
const ANSWER: [u8; 12] = [0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4];

/// Knows a host by name.
pub struct Dns {
    socket: SocketHandle,
    host: &'static str,
    address: Ipv4Addr,
}

impl Dns {
    pub fn new(sockets: &mut SocketSet<'static>, host: &'static str, address: Ipv4Addr) -> Self {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        // A new socket can be bound to any port but 0.
        let _ = socket.bind(PORT);
        Self { socket: sockets.add(socket), host, address }
    }

    /// Answers what clients have asked.
    pub fn poll(&self, sockets: &mut SocketSet<'static>) {
        let socket = sockets.get_mut::<udp::Socket>(self.socket);
        while let Some((answer, from)) = socket
            .recv()
            .ok()
            .map(|(packet, from)| (answer(packet, self.host, self.address), from.endpoint))
        {
            // Without room, the client asks again.
            let _ = answer.map(|bytes| socket.send_slice(&bytes, from));
        }
    }
}

/// What a client is told; `None` if it has asked nothing.
fn answer(packet: &[u8], host: &str, address: Ipv4Addr) -> Option<Vec<u8>> {
    let query = DnsPacket::new_checked(packet).ok()?;
    let (rest, question) = DnsQuestion::parse(query.payload()).ok()?;
    let mut name = String::new();
    for label in query.parse_name(question.name) {
        let separator = if name.is_empty() { "" } else { "." };
        name.push_str(separator);
        name.push_str(std::str::from_utf8(label.ok()?).ok()?);
    }
    let known = name.eq_ignore_ascii_case(host);
    let has_answer = known && question.type_ == DnsQueryType::A;
    let flags = RESPONSE | if known { 0 } else { NO_NAME };
    let mut bytes = query.transaction_id().to_be_bytes().to_vec();
    for word in [flags, 1, has_answer.into(), 0, 0] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    let question_len = query.payload().len() - rest.len();
    bytes.extend_from_slice(&query.payload()[..question_len]);
    if has_answer {
        bytes.extend_from_slice(&ANSWER);
        bytes.extend_from_slice(&address.octets());
    }
    Some(bytes)
}
