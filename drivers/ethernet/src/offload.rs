//! What a card does to a frame that it sends: checksums, segments, a VLAN tag.
//!
//! It needs to know where the headers are, and finds the checksum of the pseudo header (RFC 9293 §3.1,
//! RFC 768) where that of the whole is to be (82576 datasheet §7.2.4 and §7.2.5, 82574 datasheet §7.2 and §7.3).

use vfio_remap::{Error, ErrorKind, Result};

use super::pool::Frame;

const ETHERNET: usize = 14;
const TAG: usize = 4;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAGGED: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Where in its header a checksum is.
const IPV4_CHECKSUM: usize = 10;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
/// The most that headers have: Ethernet with two tags, IPv4 with options, TCP with options.
const MOST_HEADERS: usize = ETHERNET + 2 * TAG + 60 + 60;

/// Where the headers of a packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Bytes of the Ethernet header, with tags.
    pub ethernet: u8,
    /// Bytes of the IP header.
    pub ip: u8,
    /// Bytes of the header of TCP or UDP.
    pub transport: u8,
    pub is_ipv4: bool,
    pub is_tcp: bool,
}

impl Headers {
    fn transport_at(self) -> usize {
        usize::from(self.ethernet) + usize::from(self.ip)
    }

    fn transport_checksum_at(self) -> usize {
        self.transport_at() + if self.is_tcp { TCP_CHECKSUM } else { UDP_CHECKSUM }
    }

    /// Those of a packet of TCP or UDP that is not a fragment, over IPv4, or IPv6 without extensions; `None`
    /// if it is another.
    pub fn of(packet: &[u8]) -> Option<Self> {
        let mut ethernet = ETHERNET;
        while TAGGED.contains(&word(packet, ethernet - 2)?) && ethernet < ETHERNET + 2 * TAG {
            ethernet += TAG;
        }
        let (ip, protocol, is_ipv4) = match word(packet, ethernet - 2)? {
            IPV4 => {
                let length = 4 * usize::from(packet.get(ethernet)? & 0xf);
                // Neither more fragments nor an offset.
                let whole = word(packet, ethernet + 6)? & 0x3fff == 0;
                if packet[ethernet] >> 4 != 4 || length < 20 || !whole {
                    return None;
                }
                (length, *packet.get(ethernet + 9)?, true)
            }
            IPV6 => (40, *packet.get(ethernet + 6)?, false),
            _ => return None,
        };
        let at = ethernet + ip;
        let (transport, is_tcp) = match protocol {
            TCP => (4 * usize::from(packet.get(at + 12)? >> 4), true),
            UDP => (8, false),
            _ => return None,
        };
        if (is_tcp && transport < 20) || packet.len() < at + transport {
            return None;
        }
        Some(Self {
            ethernet: ethernet as u8,
            ip: ip as u8,
            transport: transport as u8,
            is_ipv4,
            is_tcp,
        })
    }

    /// What the IP header says of the length of what follows it.
    fn transport_length(self, packet: &[u8]) -> u16 {
        let ip = usize::from(self.ethernet);
        if self.is_ipv4 {
            word(packet, ip + 2).unwrap_or(0).saturating_sub(self.ip.into())
        } else {
            word(packet, ip + 4).unwrap_or(0)
        }
    }

    /// The sum of the pseudo header, with `length` bytes of TCP or UDP, not complemented.
    fn pseudo_sum(self, packet: &[u8], length: u16) -> u16 {
        let ip = usize::from(self.ethernet);
        let addresses = if self.is_ipv4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
        let protocol = if self.is_tcp { TCP } else { UDP };
        let words = packet[addresses].chunks_exact(2);
        let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        fold(sum + u32::from(protocol) + u32::from(length))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The request to put in the checksums of a packet of TCP, and their beginnings in it; `None` if it is no
/// whole packet of TCP.
#[cfg(feature = "smoltcp")]
pub fn checksums_of_tcp(packet: &mut [u8]) -> Option<Request> {
    let headers = Headers::of(packet).filter(|headers| headers.is_tcp)?;
    let sum = headers.pseudo_sum(packet, headers.transport_length(packet));
    let at = headers.transport_checksum_at();
    packet.get_mut(at..at + 2)?.copy_from_slice(&sum.to_be_bytes());
    let mut request = Request::default();
    request.set_headers(headers);
    request.set(Request::CHECKSUMS, true);
    Some(request)
}

/// Whether a packet is of TCP, whole or a part, and if whole, whether its checksum is right.
#[cfg(feature = "smoltcp")]
pub fn tcp_is_right(packet: &[u8]) -> Option<bool> {
    if let Some(headers) = Headers::of(packet) {
        let length = headers.transport_length(packet);
        let start = headers.transport_at();
        let segment = packet.get(start..start + usize::from(length));
        return headers.is_tcp.then(|| {
            segment.is_some_and(|segment| {
                let pseudo = u32::from(headers.pseudo_sum(packet, length));
                let words = segment.chunks(2);
                let bytes = words.map(|word| [word[0], word.get(1).copied().unwrap_or(0)]);
                let sum: u32 = bytes.map(|word| u32::from(u16::from_be_bytes(word))).sum();
                fold(pseudo + sum) == 0xffff
            })
        });
    }
    // A fragment, or after extensions: nobody can say before it is whole.
    let protocol = match word(packet, ETHERNET - 2)? {
        IPV4 => *packet.get(ETHERNET + 9)?,
        IPV6 => match *packet.get(ETHERNET + 6)? {
            // Hop-by-hop options, routing, a fragment, options for the destination.
            0 | 43 | 44 | 60 => *packet.get(ETHERNET + 40)?,
            protocol => protocol,
        },
        _ => return None,
    };
    (protocol == TCP).then_some(false)
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What the card is to do to a frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    pub flags: u8,
    pub ethernet: u8,
    pub ip: u8,
    pub transport: u8,
    /// The most bytes of TCP in a segment.
    pub mss: u16,
    pub tag: u16,
}

impl Request {
    pub const CHECKSUMS: u8 = 1;
    pub const SEGMENTS: u8 = 1 << 1;
    pub const IPV4: u8 = 1 << 2;
    pub const TCP: u8 = 1 << 3;
    pub const TAGGED: u8 = 1 << 4;
    /// The next frame is a part of this packet.
    pub const GOES_ON: u8 = 1 << 5;

    /// Nothing is asked for: one descriptor says all.
    #[inline]
    pub fn is_plain(self) -> bool {
        self.flags == 0
    }

    #[inline]
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    fn set_headers(&mut self, headers: Headers) {
        (self.ethernet, self.ip, self.transport) =
            (headers.ethernet, headers.ip, headers.transport);
        self.set(Self::IPV4, headers.is_ipv4);
        self.set(Self::TCP, headers.is_tcp);
    }

    pub fn headers_len(self) -> usize {
        usize::from(self.ethernet) + usize::from(self.ip) + usize::from(self.transport)
    }
}

impl Frame {
    /// Has the card put in the checksums of TCP or UDP, and of IPv4 (82576 datasheet §7.2.5, 82574 datasheet
    /// §7.2). What is in their places does not matter. It is asked for once the headers are in the frame.
    ///
    /// # Errors
    /// `Unsupported` if the frame does not begin with the headers of TCP or UDP over IPv4 or IPv6 without
    /// extensions, or is a fragment. Nothing changes.
    pub fn offload_checksums(&mut self) -> Result<()> {
        let (mut bytes, headers) = self.headers()?;
        let sum = headers.pseudo_sum(&bytes, headers.transport_length(&bytes));
        self.put_checksums(&mut bytes, headers, sum);
        self.0.request.set(Request::CHECKSUMS, true);
        self.0.request.set(Request::SEGMENTS, false);
        Ok(())
    }

    /// Has the card send a packet of TCP as segments, each with `mss` bytes of data at most, and with headers
    /// made of those of this frame (82576 datasheet §7.2.4, 82574 datasheet §7.3). With its IP header the packet
    /// may have 65,535 bytes, in this frame and in others that [go on](Self::set_goes_on) with it. Checksums
    /// are put in.
    ///
    /// # Errors
    /// `Unsupported` if the frame does not begin with the headers of TCP, as of
    /// [`offload_checksums`](Self::offload_checksums); `OutOfRange` if `mss` is 0. Nothing changes.
    pub fn offload_segments(&mut self, mss: u16) -> Result<()> {
        let (mut bytes, headers) = self.headers()?;
        if !headers.is_tcp {
            return Err(refused(ErrorKind::Unsupported, "it is not TCP")
                .with_advice("send it as it is, in fragments if it is too long"));
        }
        if mss == 0 {
            return Err(refused(ErrorKind::OutOfRange, "its segments would have no data"));
        }
        // The card puts in the length of each segment, and adds it to the sum.
        let ip = usize::from(headers.ethernet);
        let length_at = if headers.is_ipv4 { ip + 2 } else { ip + 4 };
        self.0.buffer.write(length_at, &[0, 0]);
        let sum = headers.pseudo_sum(&bytes, 0);
        self.put_checksums(&mut bytes, headers, sum);
        self.0.request.mss = mss;
        self.0.request.set(Request::CHECKSUMS | Request::SEGMENTS, true);
        Ok(())
    }

    fn put_checksums(&mut self, bytes: &mut [u8], headers: Headers, sum: u16) {
        let at = headers.transport_checksum_at();
        self.0.buffer.write(at, &sum.to_be_bytes());
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        if headers.is_ipv4 {
            self.0.buffer.write(usize::from(headers.ethernet) + IPV4_CHECKSUM, &[0, 0]);
        }
        self.0.request.set_headers(headers);
    }

    /// The first bytes, and where their headers are.
    fn headers(&self) -> Result<([u8; MOST_HEADERS], Headers)> {
        let mut bytes = [0; MOST_HEADERS];
        let len = self.read(0, &mut bytes);
        let headers = Headers::of(&bytes[..len]).ok_or_else(|| {
            refused(
                ErrorKind::Unsupported,
                "it does not begin with whole headers of TCP or UDP over IPv4 or IPv6",
            )
            .with_advice("put the checksums in by software")
        })?;
        Ok((bytes, headers))
    }

    /// The VLAN tag's control information (IEEE 802.1Q §9.6): of a frame that was received, the one that the
    /// card has removed; of one to be sent, the one that it is to insert.
    #[inline]
    pub fn vlan(&self) -> Option<u16> {
        let request = self.0.request;
        if request.has(Request::TAGGED) { Some(request.tag) } else { self.0.received.tag() }
    }

    /// Has the card insert a VLAN tag, or none. A frame that was received with one is sent with it.
    #[inline]
    pub fn set_vlan(&mut self, tag: Option<u16>) {
        self.0.received = self.0.received.without_tag();
        self.0.request.tag = tag.unwrap_or(0);
        self.0.request.set(Request::TAGGED, tag.is_some());
    }

    /// What was asked for, and the tag that it came with.
    #[inline]
    pub(crate) fn request(&self) -> Request {
        let mut request = self.0.request;
        if let Some(tag) = self.vlan() {
            request.tag = tag;
            request.set(Request::TAGGED, true);
        }
        request
    }

    /// Whether the next frame of a burst goes on with the packet of this one, as its next bytes.
    #[inline]
    pub fn goes_on(&self) -> bool {
        self.0.request.has(Request::GOES_ON)
    }

    /// Says whether the next frame of a burst goes on with the packet of this one. What the card is to do is
    /// asked for at the first frame.
    #[inline]
    pub fn set_goes_on(&mut self, goes_on: bool) {
        self.0.request.set(Request::GOES_ON, goes_on);
    }
}

fn refused(kind: ErrorKind, reason: &'static str) -> Error {
    Error::new(kind, "offload", "the checksums of a frame").with_reason(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet of TCP over IPv4, with options of four bytes in both headers.
    fn tcp() -> Vec<u8> {
        let mut packet = vec![0; 14 + 24 + 24 + 3];
        packet[12..14].copy_from_slice(&[8, 0]);
        packet[14] = 0x46;
        packet[23] = TCP;
        packet[26..34].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2]);
        packet[14 + 24 + 12] = 0x60;
        packet
    }

    #[test]
    fn headers_are_found_where_they_are() {
        let found = Headers { ethernet: 14, ip: 24, transport: 24, is_ipv4: true, is_tcp: true };
        assert_eq!(Headers::of(&tcp()), Some(found));
        let mut tagged = tcp();
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        assert_eq!(Headers::of(&tagged), Some(Headers { ethernet: 18, ..found }));
        let mut udp = vec![0; 14 + 40 + 8];
        udp[12..14].copy_from_slice(&[0x86, 0xdd]);
        udp[20] = UDP;
        let six = Headers { ethernet: 14, ip: 40, transport: 8, is_ipv4: false, is_tcp: false };
        assert_eq!(Headers::of(&udp), Some(six));
    }

    #[test]
    fn no_headers_are_found_where_there_are_none() {
        let cut = |at: usize, value: u8| {
            let mut packet = tcp();
            packet[at] = value;
            packet
        };
        let cases = [
            cut(14, 0x44),
            cut(14, 0x66),
            cut(12, 9),
            cut(20, 0x20),
            cut(21, 1),
            cut(23, 1),
            cut(14 + 24 + 12, 0x40),
            cut(14 + 24 + 12, 0xf0),
        ];
        for packet in cases {
            assert_eq!(Headers::of(&packet), None, "{packet:x?}");
        }
        let whole = tcp();
        for len in 0..14 + 24 + 24 {
            assert_eq!(Headers::of(&whole[..len]), None, "{len}");
        }
    }

    #[test]
    fn the_length_is_that_of_the_ip_header() {
        let mut packet = tcp();
        packet[16..18].copy_from_slice(&[0, 51]);
        // A frame may be padded.
        packet.extend([0; 20]);
        assert_eq!(Headers::of(&packet).unwrap().transport_length(&packet), 27);
        packet[17] = 3;
        assert_eq!(Headers::of(&packet).unwrap().transport_length(&packet), 0);
    }

    #[test]
    fn the_pseudo_header_is_summed() {
        let headers = Headers::of(&tcp()).unwrap();
        // RFC 9293 §3.1: addresses, protocol, length.
        let sum = 0x0a00 + 0x020f + 0x0a00 + 0x0202 + 6 + 27;
        assert_eq!(headers.pseudo_sum(&tcp(), 27), sum);
        assert_eq!(headers.pseudo_sum(&tcp(), 0xffff), sum - 27);
    }

    #[cfg(feature = "smoltcp")]
    #[test]
    fn a_checksum_of_tcp_is_told_from_a_wrong_one() {
        let mut packet = tcp();
        packet[16..18].copy_from_slice(&[0, 51]);
        packet[61..65].copy_from_slice(b"odd!");
        packet.extend([0; 3]);
        assert_eq!(tcp_is_right(&packet), Some(false));
        let request = checksums_of_tcp(&mut packet).unwrap();
        assert!(request.has(Request::CHECKSUMS) && request.has(Request::TCP));
        // The card sums all of the segment, the pseudo header's sum in it.
        let words = packet[38..65].chunks(2);
        let sum: u32 =
            words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
        packet[54..56].copy_from_slice(&(!fold(sum)).to_be_bytes());
        assert_eq!(tcp_is_right(&packet), Some(true));
        for at in 38..65 {
            packet[at] ^= 4;
            assert_ne!(tcp_is_right(&packet), Some(true), "byte {at}");
            packet[at] ^= 4;
        }
        // A part of a segment, and a length beyond the frame.
        packet[20] = 0x20;
        assert_eq!(tcp_is_right(&packet), Some(false));
        packet[20..22].copy_from_slice(&[0, 0]);
        packet[16..18].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(tcp_is_right(&packet), Some(false));
        packet[23] = UDP;
        assert_eq!(tcp_is_right(&packet), None);
        assert!(checksums_of_tcp(&mut packet).is_none());
        assert_eq!(tcp_is_right(&[]), None);
    }
}
