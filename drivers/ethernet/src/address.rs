//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// An address of Ethernet (IEEE 802.3 §3.2.3), in the order of transmission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it is a group's, as that of everybody is.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a station can have it: not a group's, and not zero.
    pub fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }

    /// As registers hold it: low and high word (82576 datasheet §8.10.15).
    pub(crate) const fn words(self) -> (u32, u32) {
        let [a, b, c, d, e, f] = self.0;
        (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]) as u32)
    }

    pub(crate) const fn from_words(low: u32, high: u32) -> Self {
        let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
        Self([a, b, c, d, e, f])
    }

    /// Its bit of the multicast table: bits 47:36 of the address (82576 datasheet §8.10.14, RCTL.MO = 0).
    pub(crate) const fn table_bit(self) -> (usize, u32) {
        let [.., high, highest] = self.0;
        let bit = ((highest as usize) << 8 | high as usize) >> 4;
        (bit >> 5, 1 << (bit & 31))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A text that is no address of Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMacAddress;

impl fmt::Display for NoMacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an Ethernet address: six bytes in hexadecimal, as in 52:54:00:12:34:56")
    }
}

impl std::error::Error for NoMacAddress {}

impl FromStr for MacAddress {
    type Err = NoMacAddress;

    fn from_str(text: &str) -> Result<Self, NoMacAddress> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(NoMacAddress)?;
            // `from_str_radix` takes a sign.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(NoMacAddress);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| NoMacAddress)?;
        }
        parts.next().map_or(Ok(Self(bytes)), |_| Err(NoMacAddress))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    #[test]
    fn an_address_is_read_as_it_is_written() {
        assert_eq!(ADDRESS.to_string(), "52:54:00:12:34:56");
        assert_eq!("52:54:00:12:34:56".parse(), Ok(ADDRESS));
        assert_eq!("52-54-00-12-34-56".parse(), Ok(ADDRESS));
        for wrong in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "5:54:00:12:34:56", "+1:54:00:12:34:56"]
        {
            assert_eq!(wrong.parse::<MacAddress>(), Err(NoMacAddress), "{wrong}");
        }
    }

    #[test]
    fn registers_hold_the_first_byte_lowest() {
        assert_eq!(ADDRESS.words(), (0x1200_5452, 0x5634));
        assert_eq!(MacAddress::from_words(0x1200_5452, 0xffff_5634), ADDRESS);
    }

    #[test]
    fn groups_and_zero_are_no_stations() {
        assert!(ADDRESS.is_station());
        assert!(!MacAddress([0; 6]).is_station());
        assert!(!MacAddress::BROADCAST.is_station());
    }

    #[test]
    fn a_group_has_a_bit_of_the_table() {
        // 82576 datasheet §8.10.14: the twelve highest bits; the five lowest of them are the bit.
        assert_eq!(
            MacAddress([1, 0, 0x5e, 0, 0, 0xfb]).table_bit(),
            (0xfb0 >> 5, 1 << (0xfb0 & 31))
        );
    }
}
