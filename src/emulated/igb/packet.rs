//! The headers of a frame, and the checksums in them (RFC 791, 793, 768, 1071, 8200).

const VLAN_TAG: usize = 4;
const ETHERNET: usize = 14;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const SCTP: u8 = 132;
/// IPv6 headers that may lie before the transport's: hop by hop, routing, fragment, destination.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// How many of them are parsed.
const MAX_EXTENSIONS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    V4,
    V6,
}

/// The headers of a frame, as far as they are known. All offsets lie in the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Headers {
    /// The version of IP, and where its header starts.
    pub(super) network: Option<(Network, usize)>,
    /// The header has options or extensions.
    pub(super) extended: bool,
    /// The transport protocol, and where its header starts; `None` for fragments.
    pub(super) transport: Option<(u8, usize)>,
    /// Where the datagram ends.
    pub(super) end: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The VLAN tag of a frame, if its type is `vlan`.
pub(super) fn tag(frame: &[u8], vlan: u16) -> Option<u16> {
    (u16_at(frame, 12)? == vlan).then(|| u16_at(frame, ETHERNET))?
}

impl Headers {
    /// Parses a frame, which may have one VLAN tag of the type `vlan`.
    pub(super) fn parse(frame: &[u8], vlan: u16) -> Self {
        let at = if tag(frame, vlan).is_some() { ETHERNET + VLAN_TAG } else { ETHERNET };
        let found = match u16_at(frame, at - 2) {
            Some(0x0800) => Self::v4(frame, at),
            Some(0x86dd) => Self::v6(frame, at),
            _ => None,
        };
        found.unwrap_or_default()
    }

    fn v4(frame: &[u8], at: usize) -> Option<Self> {
        let header = frame.get(at..)?;
        let first = *header.first()?;
        let (size, len) = (usize::from(first & 15) * 4, usize::from(u16_at(header, 2)?));
        if first >> 4 != 4 || size < 20 || len < size || header.len() < len {
            return None;
        }
        let fragment = u16_at(header, 6)? & 0x3fff != 0;
        let protocol = *header.get(9)?;
        Some(Self {
            network: Some((Network::V4, at)),
            extended: size > 20,
            transport: (!fragment).then_some((protocol, at + size)),
            end: at + len,
        })
    }

    fn v6(frame: &[u8], at: usize) -> Option<Self> {
        let header = frame.get(at..).filter(|header| header.len() >= 40)?;
        let len = 40 + usize::from(u16_at(header, 4)?);
        if header[0] >> 4 != 6 || header.len() < len {
            return None;
        }
        let (mut next, mut offset) = (header[6], 40);
        let mut found = Self { network: Some((Network::V6, at)), end: at + len, ..Self::default() };
        for _ in 0..MAX_EXTENSIONS {
            let rest = header.get(offset..len)?;
            match next {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    let Some((following, size)) = rest.first().zip(rest.get(1)) else { break };
                    next = *following;
                    offset += 8 + 8 * usize::from(*size);
                    found.extended = true;
                }
                FRAGMENT => {
                    found.extended = true;
                    break;
                }
                _ => {
                    found.transport = Some((next, at + offset));
                    break;
                }
            }
            if offset > len {
                break;
            }
        }
        Some(found)
    }

    /// The source and destination addresses, which are adjacent.
    pub(super) fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let range = match self.network {
            Some((Network::V4, at)) => at + 12..at + 20,
            Some((Network::V6, at)) => at + 8..at + 40,
            None => 0..0,
        };
        frame.get(range).unwrap_or(&[])
    }

    /// The source and destination ports, which are adjacent.
    pub(super) fn ports<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let (TCP | UDP, at) = self.transport? else { return None };
        frame.get(at..at + 4).filter(|_| at + 4 <= self.end)
    }

    /// The packet type of an advanced receive descriptor (82576 datasheet §7.1.5.2).
    pub(super) fn packet_type(&self) -> u16 {
        let network = match (self.network, self.extended) {
            (None, _) => return 0,
            (Some((Network::V4, _)), false) => 1,
            (Some((Network::V4, _)), true) => 3,
            (Some((Network::V6, _)), false) => 4,
            (Some((Network::V6, _)), true) => 0xc,
        };
        let transport = match self.transport {
            Some((TCP, _)) => 1 << 4,
            Some((UDP, _)) => 1 << 5,
            Some((SCTP, _)) => 1 << 6,
            _ => 0,
        };
        network | transport
    }

    /// Whether the checksum of the IPv4 header is correct; `None` for other frames.
    pub(super) fn check_network(&self, frame: &[u8]) -> Option<bool> {
        let Some((Network::V4, at)) = self.network else { return None };
        let size = usize::from(frame.get(at)? & 15) * 4;
        Some(fold(sum(frame.get(at..at + size)?)) == 0xffff)
    }

    /// Whether the checksum of TCP or UDP is correct; `None` if there is none.
    pub(super) fn check_transport(&self, frame: &[u8]) -> Option<bool> {
        let (protocol @ (TCP | UDP), at) = self.transport? else { return None };
        let segment = frame.get(at..self.end)?;
        let least = if protocol == TCP { 20 } else { 8 };
        if segment.len() < least || (protocol == UDP && segment.get(6..8)? == [0, 0]) {
            return None;
        }
        let pseudo = pseudo_sum(self.addresses(frame), protocol, segment.len());
        Some(fold(pseudo + sum(segment)) == 0xffff)
    }
}

/// The sum of the pseudo header before a segment of `len` bytes.
pub(super) fn pseudo_sum(addresses: &[u8], protocol: u8, len: usize) -> u64 {
    sum(addresses) + u64::from(protocol) + len as u64
}

/// The sum of big-endian 16-bit words, not folded.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |last| u64::from(*last) << 8);
    words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>() + last
}

/// Folds a sum to 16 bits (one's complement).
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The check sequence of a frame (IEEE 802.3 §3.2.9), in the order of transmission.
pub(super) fn check_sequence(frame: &[u8]) -> [u8; 4] {
    let crc = frame.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 }
        })
    });
    (!crc).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// UDP over IPv4, to be changed: 18 bytes of payload.
    fn datagram() -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0, 53, 0, 26, 0, 0]);
        frame.extend([7; 18]);
        let header = !fold(sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&header.to_be_bytes());
        let transport = !fold(pseudo_sum(&frame[26..34], UDP, 26) + sum(&frame[34..]));
        frame[40..42].copy_from_slice(&transport.to_be_bytes());
        frame
    }

    #[test]
    fn headers_are_found_behind_a_tag_or_not_and_padding_is_no_part() {
        let mut frame = datagram();
        frame.extend([0xee; 9]);
        let plain = Headers::parse(&frame, 0x8100);
        assert_eq!(plain.network, Some((Network::V4, 14)));
        assert_eq!((plain.transport, plain.end), (Some((UDP, 34)), 60));
        assert_eq!(plain.ports(&frame), Some(&[0x12, 0x34, 0, 53][..]));
        assert_eq!(
            (plain.check_network(&frame), plain.check_transport(&frame)),
            (Some(true), Some(true))
        );
        frame.splice(12..12, [0x81, 0, 0x20, 5]);
        let tagged = Headers::parse(&frame, 0x8100);
        assert_eq!((tagged.transport, tag(&frame, 0x8100)), (Some((UDP, 38)), Some(0x2005)));
        assert_eq!(Headers::parse(&frame, 0x88a8), Headers::default());
    }

    #[test]
    fn a_wrong_byte_is_a_wrong_checksum_and_none_is_none() {
        let good = datagram();
        let checks = |frame: &[u8]| {
            let headers = Headers::parse(frame, 0x8100);
            (headers.check_network(frame), headers.check_transport(frame))
        };
        let mut frame = good.clone();
        frame[50] ^= 1;
        assert_eq!(checks(&frame), (Some(true), Some(false)));
        let mut frame = good.clone();
        frame[22] ^= 1;
        assert_eq!(checks(&frame), (Some(false), Some(true)));
        let mut frame = good;
        frame[40..42].fill(0);
        assert_eq!(checks(&frame), (Some(true), None));
        // A fragment.
        frame[20] = 0x20;
        assert_eq!(checks(&frame).1, None);
        assert_eq!(Headers::parse(&frame, 0x8100).ports(&frame), None);
    }

    #[test]
    fn no_frame_however_short_or_wrong_leads_outside_of_it() {
        let mut good = datagram();
        good[14] = 0x65;
        for seed in 0..200_000u32 {
            let mut frame = if seed % 2 == 0 { datagram() } else { good.clone() };
            if seed % 3 == 0 {
                frame[12..14].copy_from_slice(&[0x86, 0xdd]);
            }
            let mut noise = seed.wrapping_mul(0x9e37_79b9);
            for _ in 0..3 {
                noise = noise.wrapping_mul(0x2c1b_3c6d) ^ noise >> 15;
                let at = 12 + (noise as usize >> 8) % (frame.len() - 12);
                frame[at] = noise as u8;
            }
            frame.truncate(seed as usize % (frame.len() + 1));
            let headers = Headers::parse(&frame, 0x8100);
            headers.addresses(&frame);
            headers.ports(&frame);
            headers.check_network(&frame);
            headers.check_transport(&frame);
            assert!(headers.end <= frame.len());
        }
    }

    #[test]
    fn the_check_sequence_is_that_of_the_standard() {
        assert_eq!(check_sequence(b"123456789"), 0xcbf4_3926u32.to_le_bytes());
    }
}
