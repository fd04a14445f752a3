//! What `cargo lab vmm` runs in the guest: uses devices that the guest's kernel has no driver for, and moves BARs
//! under it, by configuration writes as a kernel makes them.
//!
//! - `edu ADDRESS UIO COUNT`: identification, computation, that many interrupts (INTx, by uio_pci_generic), and DMA.
//! - `move ADDRESS BAR COUNT`: moves a BAR that many times, in turn above and below 4 GiB if it has 64 bits. Its memory
//!   has to keep what was written, and the old place has to read all ones.
//! - `probe ADDRESS BAR OFFSET COUNT`: as `move`, for a BAR of registers, of which the one at an offset does not change.
//! - `fly ADDRESS BAR COUNT`: as `probe`, for the registers of an NVMe controller without a driver, while it carries
//!   out commands.
//! - `busy DISK ADDRESS BAR COUNT`: as `probe`, for the registers of a disk's controller whose driver is bound, while
//!   threads write to the disk and read back. They stop for each move.
//! - `write DISK MIB NUMBER`, `check DISK MIB NUMBER`: writes so much to a disk, or reads it and compares. The number
//!   selects what.
//! - `ask DISK COUNT`: reads a page so many times, with one interrupt each.
//! - `raise ADDRESS BAR VECTOR COUNT`: has an 82574L raise interrupts of its transmit queue, each of which has one message.
//! - `touch ADDRESS BAR`: maps a BAR, waits for a line on standard input, and reads a word of each page.
//!
//! In the host: `decoding PROCESS IDENTIFIERS on|off` changes a device of a process behind its back.

#![forbid(unsafe_code)]

mod card;
mod decoding;
mod disk;
mod edu;
mod flight;
mod pci;

use std::env;
use std::io::stdin;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use pci::{MEMORY, PAGE, Pci, load};

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["edu", address, uio, count] => edu::edu(&Pci::new(address)?, uio, count.parse()?),
        ["move", address, bar, count] => {
            pci::move_memory(&Pci::new(address)?, bar.parse()?, count.parse()?)
        }
        ["probe", address, bar, offset, count] => {
            let (offset, count) = (u64::from_str_radix(offset, 16)?, count.parse()?);
            pci::move_registers(&Pci::new(address)?, bar.parse()?, offset, count)
        }
        ["fly", address, bar, count] => {
            flight::fly(&Pci::new(address)?, bar.parse()?, count.parse()?)
        }
        ["busy", disk, address, bar, count] => {
            disk::busy(disk, &Pci::new(address)?, bar.parse()?, count.parse()?)
        }
        ["write", disk, size, number] => disk::write(disk, size.parse()?, number.parse()?),
        ["check", disk, size, number] => disk::check(disk, size.parse()?, number.parse()?),
        ["ask", disk, count] => disk::ask(disk, count.parse()?),
        ["raise", address, bar, name, count] => {
            card::raise(&Pci::new(address)?, bar.parse()?, name, count.parse()?)
        }
        ["touch", address, bar] => touch(&Pci::new(address)?, bar.parse()?),
        ["decoding", process, identifiers, state @ ("on" | "off")] => {
            let identifiers = u32::from_str_radix(identifiers, 16)?;
            decoding::set(process.parse()?, identifiers, state == "on")
        }
        _ => bail!("what is there to do?"),
    }
}

fn touch(pci: &Pci, bar: u64) -> Result<()> {
    pci.set_command(MEMORY, true)?;
    let memory = pci.map(bar)?;
    println!("ready to touch");
    stdin().read_line(&mut String::new())?;
    for offset in (0..memory.size() as u64).step_by(PAGE as usize) {
        ensure!(load(&memory, offset)? != u32::MAX, "nothing responds at {offset:#x}");
    }
    println!("touched");
    Ok(())
}

fn wait(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !done()? {
        ensure!(begin.elapsed() < LIMIT, "the device is not done after {LIMIT:?}");
    }
    Ok(())
}
