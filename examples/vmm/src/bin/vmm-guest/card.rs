//! An Intel 82574L that the kernel's driver has.

use std::fs;

use anyhow::{Context, Result};

use crate::pci::{PAGE, Pci, physical, store};
use crate::wait;

/// Interrupt cause set, and the cause of the first transmit queue (Intel 82574 datasheet, §10.2.4).
const CAUSE_SET: u64 = 0xc8;
const TRANSMIT: u32 = 1 << 22;

/// Raises so many interrupts of the transmit queue, whose vector has this name, each when the kernel has handled the
/// last one.
pub fn raise(pci: &Pci, bar: u64, name: &str, count: u32) -> Result<()> {
    let registers = physical(pci.address(bar)?, PAGE as usize)?;
    for _ in 0..count {
        let before = handled(name)?;
        store(&registers, CAUSE_SET, TRANSMIT)?;
        wait(|| Ok(handled(name)? > before))?;
    }
    println!("{name}: {count} interrupts");
    Ok(())
}

/// How many interrupts of a vector the kernel has handled.
fn handled(name: &str) -> Result<u64> {
    let all = fs::read_to_string("/proc/interrupts")?;
    let mut words = all.lines().map(str::split_whitespace);
    let line = words.find(|words| words.clone().next_back() == Some(name));
    let counts = line.with_context(|| format!("there is no vector {name}"))?.skip(1);
    Ok(counts.map_while(|count| count.parse::<u64>().ok()).sum())
}
