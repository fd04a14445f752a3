//! Receive-side scaling: the hash of a flow, and the queue that it goes to (82576 datasheet §7.1.1.7).

use super::packet::{Headers, Network, TCP, UDP};
use super::registers::{MRQC, RETA, RSSRK, RXCSUM, RXCSUM_HASH, Registers};

/// MRQC's low bits for RSS.
const ENABLED: u32 = 2;
const KEY: usize = 40;

/// The types of hash: the bit of MRQC that enables it, and its number in a descriptor.
const TCP_V4: (u32, u16) = (1 << 16, 1);
const V4: (u32, u16) = (1 << 17, 2);
const TCP_V6_EXTENDED: (u32, u16) = (1 << 18, 6);
const V6_EXTENDED: (u32, u16) = (1 << 19, 4);
const V6: (u32, u16) = (1 << 20, 5);
const TCP_V6: (u32, u16) = (1 << 21, 3);
const UDP_V4: (u32, u16) = (1 << 22, 7);
const UDP_V6: (u32, u16) = (1 << 23, 8);
const UDP_V6_EXTENDED: (u32, u16) = (1 << 24, 9);

/// The flow of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) queue: usize,
    pub(super) hash: u32,
    /// 0 if there is no hash.
    pub(super) kind: u16,
}

impl Flow {
    /// The flow of a frame with these headers. Without RSS, all frames go to queue 0.
    pub(super) fn of(registers: &Registers, frame: &[u8], headers: &Headers) -> Self {
        let modes = registers.get(MRQC);
        if modes & 7 != ENABLED || !registers.has(RXCSUM, RXCSUM_HASH) {
            return Self::default();
        }
        let ports = headers.ports(frame);
        let Some((kind, with_ports)) = kind(modes, headers, ports.is_some()) else {
            return Self::default();
        };
        let ports = ports.filter(|_| with_ports).unwrap_or(&[]);
        let hash = toeplitz(&key(registers), headers.addresses(frame).iter().chain(ports));
        let entry = hash & 0x7f;
        let queue = registers.get(RETA + (entry & !3)) >> (8 * (entry & 3)) & 15;
        Self { queue: queue as usize, hash, kind }
    }
}

/// The first type that is enabled, and whether it includes ports.
fn kind(modes: u32, headers: &Headers, has_ports: bool) -> Option<(u16, bool)> {
    let (network, _) = headers.network?;
    let protocol = headers.transport.filter(|_| has_ports).map(|(protocol, _)| protocol);
    let (with_ports, without): (&[_], &[_]) = match (network, protocol) {
        (Network::V4, Some(TCP)) => (&[TCP_V4], &[V4]),
        (Network::V4, Some(UDP)) => (&[UDP_V4], &[V4]),
        (Network::V4, _) => (&[], &[V4]),
        (Network::V6, Some(TCP)) => (&[TCP_V6, TCP_V6_EXTENDED], &[V6, V6_EXTENDED]),
        (Network::V6, Some(UDP)) => (&[UDP_V6, UDP_V6_EXTENDED], &[V6, V6_EXTENDED]),
        (Network::V6, _) => (&[], &[V6, V6_EXTENDED]),
    };
    let enabled = |kinds: &[(u32, u16)]| kinds.iter().find(|(bit, _)| modes & bit != 0).copied();
    let first = enabled(with_ports).map(|(_, kind)| (kind, true));
    first.or_else(|| enabled(without).map(|(_, kind)| (kind, false)))
}

fn key(registers: &Registers) -> [u8; KEY] {
    let mut key = [0; KEY];
    for (bytes, offset) in key.as_chunks_mut::<4>().0.iter_mut().zip((RSSRK..).step_by(4)) {
        *bytes = registers.get(offset).to_le_bytes();
    }
    key
}

/// The Toeplitz hash: for each bit that is set, the 32 bits of the key at its position.
fn toeplitz<'a>(key: &[u8; KEY], data: impl Iterator<Item = &'a u8>) -> u32 {
    let mut hash = 0;
    for (byte, window) in data.zip(key.windows(5)) {
        let window = window.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for bit in 0..8 {
            if byte & 0x80 >> bit != 0 {
                hash ^= (window >> (8 - bit)) as u32;
            }
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and two of the flows by which the hash is verified ("RSS hashing: verification suite").
    #[test]
    fn the_hash_is_that_of_the_verification_suite() {
        let key = [
            0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3,
            0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3,
            0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
        ];
        let addresses = [66, 9, 149, 187, 161, 142, 100, 80];
        let ports = [2794u16.to_be_bytes(), 1766u16.to_be_bytes()];
        assert_eq!(toeplitz(&key, addresses.iter()), 0x323e_8fc2);
        assert_eq!(toeplitz(&key, addresses.iter().chain(ports.as_flattened())), 0x51cc_c178);
    }
}
