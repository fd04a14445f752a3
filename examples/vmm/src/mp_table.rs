//! The MP table, which describes the processors and the interrupts to a kernel without ACPI (MultiProcessor
//! Specification 1.4 §4).

use anyhow::Result;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{BIOS, GuestMemory};
use crate::pci;

const IOAPIC: u32 = 0xfec0_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The version of both kinds of APIC that KVM emulates.
const APIC_VERSION: u8 = 0x14;
/// The bus of PCI devices has its number in their addresses.
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
/// ISA interrupt n arrives at pin n of the IOAPIC.
const ISA_INTERRUPTS: u8 = 16;
/// Polarity and trigger of an interrupt: those of its bus, and level-triggered and active low.
const OF_THE_BUS: u16 = 0;
const LEVEL_LOW: u16 = 0xf;
/// Sizes in bytes.
const POINTER: usize = 16;
const HEADER: usize = 44;

/// Writes the table for `cpus` processors and the PCI slots up to `slots`.
pub fn write(memory: &GuestMemory, cpus: u8, slots: u8) -> Result<()> {
    Ok(memory.write_slice(&table(cpus, slots), GuestAddress(BIOS))?)
}

/// The pointer that a kernel looks for, and the table after it.
fn table(cpus: u8, slots: u8) -> Vec<u8> {
    let ioapic = cpus;
    let mut entries = Vec::new();
    for cpu in 0..cpus {
        // Enabled, and the first one boots.
        let flags = if cpu == 0 { 3 } else { 1 };
        // Signature and features follow: a kernel takes them from CPUID.
        entries.push([&[0, cpu, APIC_VERSION, flags][..], &[0; 16]].concat());
    }
    for (number, name) in [(PCI_BUS, b"PCI   "), (ISA_BUS, b"ISA   ")] {
        entries.push([&[1, number][..], name].concat());
    }
    entries.push([&[2, ioapic, APIC_VERSION, 1][..], &IOAPIC.to_le_bytes()].concat());
    let interrupt = |kind, flags: u16, bus, source, pin| {
        let [low, high] = flags.to_le_bytes();
        vec![3, kind, low, high, bus, source, ioapic, pin]
    };
    for irq in 0..ISA_INTERRUPTS {
        entries.push(interrupt(0, OF_THE_BUS, ISA_BUS, irq, irq));
    }
    for slot in 1..slots {
        // Pin A of the device in the slot.
        entries.push(interrupt(0, LEVEL_LOW, PCI_BUS, slot << 2, pci::interrupt_line(slot)));
    }
    // ExtINT and NMI at the local APICs.
    entries.push(vec![4, 3, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let size = HEADER + entries.iter().map(Vec::len).sum::<usize>();
    let mut header = b"PCMP".to_vec();
    header.extend((size as u16).to_le_bytes());
    // Version 1.4, and room for the checksum.
    header.extend([4, 0]);
    header.extend(b"vfioremap   VMM     ");
    // No table of the maker.
    header.extend([0; 6]);
    header.extend((entries.len() as u16).to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    // No extended table.
    header.extend([0; 4]);
    let mut table = [header, entries.concat()].concat();
    table[7] = checksum(&table);

    let address = (BIOS as u32 + POINTER as u32).to_le_bytes();
    let mut pointer = [&b"_MP_"[..], &address, &[1, 4, 0], &[0; 5]].concat();
    pointer[10] = checksum(&pointer);
    [pointer, table].concat()
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_long_as_it_says_and_sums_to_zero() {
        let all = table(2, 5);
        let (pointer, table) = all.split_at(POINTER);
        assert_eq!(checksum(pointer), 0);
        assert_eq!(checksum(table), 0);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        // Processors, buses, the IOAPIC, interrupts of ISA and of slots 1 to 4, two local ones.
        let count = 2 + 2 + 1 + 16 + 4 + 2;
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), count);
        assert_eq!(table.len(), HEADER + 2 * 20 + (usize::from(count) - 2) * 8);
    }
}
