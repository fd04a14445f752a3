//! Addresses for BARs that have none. Firmware and the kernel assign them to real devices. A device behind a
//! server has neither, and QEMU's server rejects accesses to a BAR without an address.

use std::ops::Range;

use super::client::VfioUser;
use super::interrupts::CONFIG;
use super::protocol::wire::{SmallWrite, WriteCount, command};
use crate::error::Result;
use crate::transport::Transport;

const BAR0: u64 = 0x10;
const BARS: u32 = 6;

/// Two BARs never share a page.
const MEMORY_ALIGNMENT: u64 = 4096;
/// First below the MSI window and the local APIC of x86, then anywhere in 32 bits.
const MEMORY_32: [Range<u64>; 2] = [0x8000_0000..0xfec0_0000, 0x10_0000..0xffff_f000];
const MEMORY_64: [Range<u64>; 1] = [1 << 32..1 << 52];
const PORTS: [Range<u64>; 1] = [0x1000..0x1_0000];

/// What a BAR decodes (PCI 3.0 §6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ports,
    Memory32,
    Memory64,
}

impl Kind {
    fn places(self) -> &'static [Range<u64>] {
        match self {
            Self::Ports => &PORTS,
            Self::Memory32 => &MEMORY_32,
            Self::Memory64 => &MEMORY_64,
        }
    }

    fn is_memory(self) -> bool {
        self != Self::Ports
    }
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: u32,
    kind: Kind,
    /// A power of two.
    size: u64,
    /// 0 if it has none.
    address: u64,
    /// The bits of its register that are no address.
    low: u32,
}

/// The BARs that have no address, each with one that is aligned to its size and overlaps no other BAR; `None` if
/// there is no room.
fn place(bars: &[Bar]) -> Vec<(Bar, Option<u64>)> {
    let (mut taken, mut open): (Vec<Bar>, Vec<Bar>) = bars.iter().partition(|bar| bar.address != 0);
    open.sort_by_key(|bar| std::cmp::Reverse(bar.size));
    let mut placed = Vec::new();
    for bar in open {
        let address = find(&bar, &taken);
        taken.extend(address.map(|address| Bar { address, ..bar }));
        placed.push((bar, address));
    }
    placed
}

fn find(bar: &Bar, taken: &[Bar]) -> Option<u64> {
    bar.kind.places().iter().find_map(|place| {
        let mut address = place.start.checked_next_multiple_of(bar.size)?;
        loop {
            let end = address.checked_add(bar.size).filter(|&end| end <= place.end)?;
            let other = taken.iter().find(|other| {
                let end_of_other = other.address.saturating_add(other.size);
                other.kind.is_memory() == bar.kind.is_memory()
                    && other.address < end
                    && address < end_of_other
            });
            let Some(other) = other else { return Some(address) };
            // Behind the other, so that each BAR is in the way once.
            let past = other.address.saturating_add(other.size);
            address = past.checked_next_multiple_of(bar.size)?;
        }
    })
}

impl VfioUser {
    /// Gives addresses to BARs that have none.
    pub(super) fn place_bars(&self) -> Result<()> {
        if !self.has_config() {
            return Ok(());
        }
        let mut writes = Vec::new();
        for (bar, address) in place(&self.read_bars()?) {
            let name = self.info.region_name(bar.index);
            let Some(address) = address else {
                log::warn!("there is no room to give {name} an address");
                continue;
            };
            log::debug!("{name} is given the address {address:#x}");
            let register = BAR0 + 4 * u64::from(bar.index);
            writes.push((register, address as u32 | bar.low));
            if bar.kind == Kind::Memory64 {
                writes.push((register + 4, (address >> 32) as u32));
            }
        }
        self.write_config(&writes)
    }

    fn read_bars(&self) -> Result<Vec<Bar>> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < BARS {
            let at = BAR0 + 4 * u64::from(index);
            let low = self.config_u32(at)?;
            let (kind, mask) = match low & 7 {
                bits if bits & 1 != 0 => (Kind::Ports, 3),
                4 if index + 1 < BARS => (Kind::Memory64, 0xf),
                _ => (Kind::Memory32, 0xf),
            };
            let mut address = u64::from(low & !mask);
            let mut next = index + 1;
            if kind == Kind::Memory64 {
                address |= u64::from(self.config_u32(at + 4)?) << 32;
                next += 1;
            }
            let smallest = if kind.is_memory() { MEMORY_ALIGNMENT } else { 4 };
            let size = self.region(index).ok().and_then(|region| {
                // A server may serve less than what the register decodes.
                region.size.max(smallest).checked_next_power_of_two()
            });
            if let Some(size) = size {
                bars.push(Bar { index, kind, size, address, low: low & mask });
            }
            index = next;
        }
        Ok(bars)
    }

    fn config_u32(&self, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read_at(CONFIG, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes registers of configuration space, in one message if the server takes several writes in one.
    fn write_config(&self, writes: &[(u64, u32)]) -> Result<()> {
        if !self.capabilities.write_multiple || writes.len() < 2 {
            return writes.iter().try_for_each(|&(register, value)| {
                self.write_at(CONFIG, register, &value.to_le_bytes())
            });
        }
        let count = writes.len() as u64;
        let mut body = WriteCount { count }.encode().to_vec();
        for &(offset, value) in writes {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            let data = u64::from_ne_bytes(data);
            body.extend(SmallWrite { offset, region: CONFIG, count: 4, data }.encode());
        }
        let name = self.info.region_name(CONFIG);
        let expected = WriteCount::SIZE;
        let reply = self.tell(command::REGION_WRITE_MULTI, &body, expected, "write", &name)?;
        let done = WriteCount::decode(&reply).unwrap_or_default().0.count;
        if done != count {
            let reason = format!("the server answered that it has made {done} of {count} writes");
            return Err(self.connection.malformed(reason, "write", name));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(kind: Kind, size: u64, address: u64) -> Bar {
        Bar { index: 0, kind, size, address, low: 0 }
    }

    fn addresses(bars: &[Bar]) -> Vec<Option<u64>> {
        place(bars).into_iter().map(|(_, address)| address).collect()
    }

    #[test]
    fn bars_are_aligned_to_their_size_and_do_not_overlap() {
        let sizes = [0x1000, 0x10_0000, 0x4000, 1 << 28, 0x2000, 0x1000];
        let mut bars: Vec<_> = sizes.map(|size| bar(Kind::Memory32, size, 0)).to_vec();
        bars[1].address = 0x8000_0000;
        bars[2].kind = Kind::Memory64;
        bars[4].kind = Kind::Ports;
        let placed = place(&bars);
        assert_eq!(placed.len(), 5, "what has an address keeps it");
        let mut all: Vec<_> =
            placed.iter().map(|(bar, address)| Bar { address: address.unwrap(), ..*bar }).collect();
        all.push(bars[1]);
        for (at, one) in all.iter().enumerate() {
            assert!(one.address > 0 && one.address % one.size == 0, "{one:?}");
            assert!(one.kind == Kind::Memory64 || one.address + one.size <= 1 << 32, "{one:?}");
            for other in &all[at + 1..] {
                let apart = one.address + one.size <= other.address
                    || other.address + other.size <= one.address;
                assert!(
                    apart || one.kind.is_memory() != other.kind.is_memory(),
                    "{one:?} {other:?}"
                );
            }
        }
    }

    #[test]
    fn what_finds_no_room_stays_without_an_address() {
        let large = [bar(Kind::Memory32, 1 << 31, 0), bar(Kind::Memory32, 1 << 31, 0)];
        assert_eq!(addresses(&large), [None, None], "the upper half has the window of MSI");
        let one_gib = [bar(Kind::Memory32, 1 << 30, 0); 4];
        assert_eq!(
            addresses(&one_gib),
            [Some(0x8000_0000), Some(0x4000_0000), None, None],
            "0 is no address"
        );
        assert_eq!(addresses(&[bar(Kind::Ports, 1 << 16, 0)]), [None]);
        assert_eq!(addresses(&[bar(Kind::Memory64, 1 << 63, 0)]), [None]);
        assert_eq!(addresses(&[bar(Kind::Memory64, 1 << 40, 0)]), [Some(1 << 40)]);
    }

    #[test]
    fn what_others_have_wherever_it_is_is_passed_over() {
        let taken = bar(Kind::Memory32, 0x1000, u64::MAX - 0xfff);
        let other = bar(Kind::Memory64, 1 << 33, 1 << 32);
        let open = bar(Kind::Memory64, 1 << 32, 0);
        assert_eq!(addresses(&[taken, other, open]), [Some(3 << 32)]);
    }
}
