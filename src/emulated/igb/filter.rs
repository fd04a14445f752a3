//! Receive filters (82576 datasheet §7.1.1).

use super::packet::tag;
use super::registers::{
    ADDRESS_VALID, MTA, RAH, RAL, RAL_HIGH, RCTL, RCTL_BROADCAST, RCTL_CFI, RCTL_CFI_ENABLE,
    RCTL_LONG, RCTL_MULTICAST, RCTL_UNICAST, RCTL_VLAN_FILTER, RLPML, Registers, UTA, VET, VFTA,
};

/// How many receive addresses are in the first and the second range of registers.
const ADDRESSES: u32 = 16;
const ADDRESSES_HIGH: u32 = 8;
/// Without long packets: a frame's longest with its check sequence, and what a tag adds.
const LONGEST: usize = 1518;
const TAG: usize = 4;
const CRC: usize = 4;

/// How a frame has passed the filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match {
    /// By its address.
    Exact,
    /// By its hash, or because of promiscuous mode.
    Inexact,
}

/// Whether a frame is too long.
pub(super) fn is_oversized(registers: &Registers, frame: &[u8]) -> bool {
    let longest = if registers.has(RCTL, RCTL_LONG) {
        registers.get(RLPML) as usize
    } else if tag(frame, registers.get(VET) as u16).is_some() {
        LONGEST + TAG
    } else {
        LONGEST
    };
    frame.len() + CRC > longest
}

/// Whether a frame is received, by its address and its tag.
pub(super) fn admit(registers: &Registers, frame: &[u8]) -> Option<Match> {
    let to = frame.first_chunk::<6>()?;
    let found = by_address(registers, to)?;
    has_vlan(registers, frame).then_some(found)
}

fn by_address(registers: &Registers, to: &[u8; 6]) -> Option<Match> {
    let control = registers.get(RCTL);
    if *to == [0xff; 6] {
        return (control & RCTL_BROADCAST != 0 || control & RCTL_MULTICAST != 0)
            .then_some(Match::Exact);
    }
    let [a, b, c, d, e, f] = *to;
    let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from(u16::from_le_bytes([e, f])));
    let is = |at: u32| {
        let valid = registers.get(at + 4);
        valid & ADDRESS_VALID != 0 && valid & 0xffff == high && registers.get(at) == low
    };
    let mut addresses = (0..ADDRESSES)
        .map(|index| RAL + (RAH - RAL) * 2 * index)
        .chain((0..ADDRESSES_HIGH).map(|index| RAL_HIGH + 8 * index));
    if addresses.any(is) {
        return Some(Match::Exact);
    }
    let (table, all) = if a & 1 != 0 { (MTA, RCTL_MULTICAST) } else { (UTA, RCTL_UNICAST) };
    let shift = [4, 3, 2, 0][(control >> 12 & 3) as usize];
    // The last byte of the address is the high one.
    let hash = high >> shift & 0xfff;
    let hit = registers.get(table + 4 * (hash >> 5)) & 1 << (hash & 31) != 0;
    (hit || control & all != 0).then_some(Match::Inexact)
}

fn has_vlan(registers: &Registers, frame: &[u8]) -> bool {
    let control = registers.get(RCTL);
    if control & RCTL_VLAN_FILTER == 0 {
        return true;
    }
    let Some(tag) = tag(frame, registers.get(VET) as u16) else { return true };
    let canonical = tag & 1 << 12 != 0;
    if control & RCTL_CFI_ENABLE != 0 && canonical != (control & RCTL_CFI != 0) {
        return false;
    }
    let vlan = u32::from(tag & 0xfff);
    registers.get(VFTA + 4 * (vlan >> 5)) & 1 << (vlan & 31) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTICAST: [u8; 6] = [1, 0, 0x5e, 0, 0x12, 0x34];

    #[test]
    fn a_multicast_address_has_a_bit_in_the_table_by_the_offset() {
        // By the offset in RCTL: bits 47:36, 46:35, 45:34, 43:32 of the address, whose last byte is highest.
        for (offset, hash) in [(0, 0x341), (1, 0x682), (2, 0xd04), (3, 0x412)] {
            let mut registers = Registers::new(0x2_0000);
            registers.set(RCTL, offset << 12);
            assert_eq!(by_address(&registers, &MULTICAST), None);
            registers.set(MTA + 4 * (hash >> 5), 1 << (hash & 31));
            assert_eq!(by_address(&registers, &MULTICAST), Some(Match::Inexact), "{offset}");
        }
    }

    #[test]
    fn each_of_the_24_addresses_counts_if_it_is_valid() {
        for index in 0..24 {
            let at = if index < 16 { RAL + 8 * index } else { RAL_HIGH + 8 * (index - 16) };
            let mut registers = Registers::new(0x2_0000);
            registers.set(at, 0x3322_1102);
            registers.set(at + 4, 0x5544);
            let to = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
            assert_eq!(by_address(&registers, &to), None);
            registers.set(at + 4, 0x5544 | ADDRESS_VALID);
            assert_eq!(by_address(&registers, &to), Some(Match::Exact));
        }
    }
}
