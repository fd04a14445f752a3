//! The frames that are sent: of the size and with the headers of those of testpmd's `txonly`.

/// Bytes of a frame, without the checksum of Ethernet.
pub const LEN: usize = 64;
/// Those that are written into each frame: Ethernet (14), IPv4 (20) and UDP (8).
pub const HEADERS: usize = 42;
/// Frames of a burst.
pub const BURST: usize = 32;

/// Headers of a frame from a card: to a locally administered address; UDP from 198.18.0.1 to 198.18.0.2,
/// which are for benchmarks (RFC 2544), port 9 to port 9.
pub fn headers(from: [u8; 6]) -> [u8; HEADERS] {
    const IP: usize = 14;
    let mut bytes = [0; HEADERS];
    bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0]);
    bytes[6..12].copy_from_slice(&from);
    bytes[12..14].copy_from_slice(&[0x08, 0x00]);
    let ip = &mut bytes[IP..IP + 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&((LEN - IP) as u16).to_be_bytes());
    (ip[8], ip[9]) = (64, 17);
    ip[12..16].copy_from_slice(&[198, 18, 0, 1]);
    ip[16..20].copy_from_slice(&[198, 18, 0, 2]);
    let sum: u32 = ip.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let udp = &mut bytes[IP + 20..];
    udp[0..2].copy_from_slice(&9_u16.to_be_bytes());
    udp[2..4].copy_from_slice(&9_u16.to_be_bytes());
    udp[4..6].copy_from_slice(&((LEN - IP - 20) as u16).to_be_bytes());
    bytes
}
