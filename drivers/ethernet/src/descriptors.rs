//! Descriptors (82576 datasheet §7.1.5 and §7.2.2, 82574 datasheet §7.1 and §7.2).
//!
//! The 82576's advanced ones and the 82574's extended ones differ in two fields of the transmit
//! descriptor.

use vfio_remap::device::{DmaArray, Iova};

/// A ring of descriptors, each of two words.
pub type Descriptors = DmaArray<u64, 2>;
/// Bytes of a descriptor.
pub const SIZE: usize = 16;

/// A descriptor in either direction, as the driver writes it.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: Iova,
    /// Receive: zero. Transmit: length and command.
    pub command: u32,
    /// Receive: zero. Transmit: status, options, and on the 82576 the length of all of the packet.
    pub options: u32,
}

impl Descriptor {
    #[inline]
    pub fn words(self) -> [u64; 2] {
        [self.address.0, u64::from(self.options) << 32 | u64::from(self.command)]
    }
}

/// The words of a descriptor that the device writes when it is done.
pub const HASH: usize = 0;
pub const STATUS: usize = 1;

/// The second word of a received packet: extended status and error, length, VLAN tag.
#[derive(Clone, Copy, Debug)]
pub struct Received(pub u64);

impl Received {
    const DONE: u64 = 1;
    const END: u64 = 1 << 1;
    const TAGGED: u64 = 1 << 3;
    const TRANSPORT_CHECKED: u64 = 1 << 5;
    const IP_CHECKED: u64 = 1 << 6;
    const TRANSPORT_ERROR: u64 = 1 << 29;
    const IP_ERROR: u64 = 1 << 30;
    /// A byte that is none, of the PHY's (RXE).
    const ERROR: u64 = 1 << 31;

    #[inline]
    pub fn is_done(self) -> bool {
        self.0 & Self::DONE != 0
    }

    /// All of a packet, and no error but those of checksums: they do not say that the packet is bad.
    #[inline]
    pub fn is_whole(self) -> bool {
        self.0 & (Self::END | Self::ERROR) == Self::END
    }

    #[inline]
    pub fn is_end(self) -> bool {
        self.0 & Self::END != 0
    }

    #[inline]
    pub fn len(self) -> u32 {
        (self.0 >> 32) as u32 & 0xffff
    }

    /// The VLAN tag that the card has removed.
    #[inline]
    pub fn tag(self) -> Option<u16> {
        (self.0 & Self::TAGGED != 0).then_some((self.0 >> 48) as u16)
    }

    #[inline]
    pub fn without_tag(self) -> Self {
        Self(self.0 & !Self::TAGGED)
    }

    pub fn checksums(self) -> Checksums {
        let checked = |flag: u64, error: u64| match (self.0 & flag != 0, self.0 & error != 0) {
            (false, _) => Checksum::Unchecked,
            (true, false) => Checksum::Good,
            (true, true) => Checksum::Wrong,
        };
        Checksums {
            ip: checked(Self::IP_CHECKED, Self::IP_ERROR),
            transport: checked(Self::TRANSPORT_CHECKED, Self::TRANSPORT_ERROR),
        }
    }
}

/// What the card says of a checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It did not look: there is none, or it is not of a kind that it knows, or a part of a packet.
    Unchecked,
    /// It is right.
    Good,
    /// It is wrong.
    Wrong,
}

/// What the card says of the checksums of a packet (82576 datasheet §7.1.10, 82574 datasheet §7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checksums {
    /// That of the header of IPv4.
    pub ip: Checksum,
    /// That of TCP or UDP.
    pub transport: Checksum,
}

/// Transmit commands: the second word of a descriptor, lower half.
pub mod transmit {
    /// The 82576: an advanced data descriptor. The 82574: a data descriptor.
    pub const ADVANCED_DATA: u32 = 3 << 20;
    pub const EXTENDED_DATA: u32 = 1 << 20;
    pub const END_OF_PACKET: u32 = 1 << 24;
    pub const INSERT_CRC: u32 = 1 << 25;
    pub const REPORT_STATUS: u32 = 1 << 27;
    pub const EXTENDED: u32 = 1 << 29;
    pub const INSERT_TAG: u32 = 1 << 30;
    /// Segments are made of the packet (82576, 82574).
    pub const ADVANCED_SEGMENTS: u32 = 1 << 31;
    pub const EXTENDED_SEGMENTS: u32 = 1 << 26;
    /// In the upper half: the length of all of the packet (82576).
    pub const PAYLOAD_SHIFT: u32 = 14;
    /// In the whole word: the device is done.
    pub const DONE: u64 = 1 << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_received_packet_is_whole_if_it_ends_without_an_error() {
        assert!(!Received(0).is_done());
        assert!(Received(1).is_done());
        assert!(!Received(1).is_whole(), "it goes on");
        assert!(Received(3).is_whole());
        assert!(!Received(3 | 1 << 31).is_whole(), "a byte that is none");
        assert!(Received(3 | 1 << 29 | 1 << 5).is_whole(), "its checksum is another's to judge");
        assert_eq!(Received(0x1234_05ea_0000_0003).len(), 0x5ea);
    }

    #[test]
    fn checksums_are_told_as_far_as_they_were_checked() {
        let checksums = |bits| {
            let Checksums { ip, transport } = Received(bits).checksums();
            (ip, transport)
        };
        let (ip, transport) = (1 << 6, 1 << 5);
        assert_eq!(checksums(3), (Checksum::Unchecked, Checksum::Unchecked));
        assert_eq!(checksums(ip), (Checksum::Good, Checksum::Unchecked));
        assert_eq!(checksums(ip | 1 << 30 | transport), (Checksum::Wrong, Checksum::Good));
        assert_eq!(checksums(ip | 1 << 29 | transport), (Checksum::Good, Checksum::Wrong));
        assert_eq!(checksums(1 << 29 | 1 << 30), (Checksum::Unchecked, Checksum::Unchecked));
    }
}
