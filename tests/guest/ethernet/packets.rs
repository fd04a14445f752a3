//! Packets of TCP and UDP, made by hand.

use super::loopback::ETHERNET;

pub fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum()
}

pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum over TCP or UDP and its pseudo header, which is all ones if the checksum is right.
pub fn transport_sum(frame: &[u8], is_ipv4: bool) -> u16 {
    let ip = &frame[ETHERNET..];
    let (header, addresses, protocol, length) = if is_ipv4 {
        (20, &ip[12..20], ip[9], u16::from_be_bytes([ip[2], ip[3]]) - 20)
    } else {
        (40, &ip[8..40], ip[6], u16::from_be_bytes([ip[4], ip[5]]))
    };
    let data = &ip[header..header + usize::from(length)];
    fold(sum(addresses) + u32::from(protocol) + u32::from(length) + sum(data))
}

/// IP with this content, without checksums, or with the wrong ones that are there.
pub fn ip(is_ipv4: bool, protocol: u8, source_port: u16, content: &[u8]) -> ([u8; 2], Vec<u8>) {
    let length = content.len() as u16;
    let mut content = content.to_vec();
    content[..2].copy_from_slice(&source_port.to_be_bytes());
    if is_ipv4 {
        let total = (20 + length).to_be_bytes();
        let mut header = vec![
            0x45, 0, total[0], total[1], 0, 9, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        header.extend(content);
        ([8, 0], header)
    } else {
        let length = length.to_be_bytes();
        let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
        header.extend([0xfd; 32]);
        header.extend(content);
        ([0x86, 0xdd], header)
    }
}

pub fn udp(length: usize) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 9, 0, 0, 0xaa, 0x55];
    bytes[4..6].copy_from_slice(&(8 + length as u16).to_be_bytes());
    bytes.extend((0..length).map(|at| at as u8));
    bytes
}

pub fn tcp(length: usize) -> Vec<u8> {
    let mut bytes =
        vec![0, 0, 0, 80, 0, 0, 0x10, 0, 0, 0, 0, 7, 0x50, 0x18, 0x20, 0, 0xaa, 0x55, 0, 0];
    bytes.extend((0..length).map(|at| at as u8));
    bytes
}

/// The longest frame of an MTU of 1,500 bytes.
const LONGEST: usize = 1514;

/// Sees that frames are the segments of `data` that [`tcp`] without data was made into, in order. `header` is the
/// length of the headers.
pub fn check_segments(frames: &[Vec<u8>], header: usize, data: &[u8], is_ipv4: bool) {
    let mut at = 0;
    for bytes in frames {
        assert!(bytes.len() <= LONGEST, "a frame of {} bytes", bytes.len());
        let length = |offset: usize| {
            u16::from_be_bytes([bytes[ETHERNET + offset], bytes[ETHERNET + offset + 1]])
        };
        let length = if is_ipv4 { length(2) } else { 40 + length(4) };
        let end = ETHERNET + usize::from(length);
        let tcp_at = header - 20;
        let sequence = u32::from_be_bytes(bytes[tcp_at + 4..tcp_at + 8].try_into().unwrap());
        assert_eq!(sequence as usize, 0x1000 + at);
        assert_eq!(transport_sum(bytes, is_ipv4), 0xffff);
        assert!(bytes[header..end] == data[at..at + end - header], "at {at}");
        at += end - header;
    }
    assert_eq!(at, data.len());
}
