//! QEMU's educational device, which no kernel has a driver for.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use vm_memory::MmapRegion;

use crate::pci::{BUS_MASTER, INTX_DISABLE, MEMORY, PAGE, Pci, frame, load, store};
use crate::{LIMIT, wait};

/// Registers of QEMU's educational device (its docs/specs/edu.rst).
const ID: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const CAUSES: u64 = 0x24;
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const TRANSFER: u64 = 0x98;
/// The address of its own buffer for DMA, and the bits that start a transfer to it and from it.
const BUFFER: u64 = 0x4_0000;
const TO_DEVICE: u32 = 1;
const TO_MEMORY: u32 = 3;

/// Identification, computation, `count` interrupts, and DMA.
pub fn edu(pci: &Pci, uio: &str, count: u32) -> Result<()> {
    pci.set_command(MEMORY | BUS_MASTER, true)?;
    let registers = pci.map(0)?;
    let id = load(&registers, ID)?;
    ensure!(id & 0xff == 0xed, "the identification is {id:#x}");
    store(&registers, LIVENESS, 0x1234_5678)?;
    ensure!(load(&registers, LIVENESS)? == !0x1234_5678, "the device does not invert");
    store(&registers, FACTORIAL, 10)?;
    wait(|| Ok(load(&registers, STATUS)? & 1 == 0))?;
    ensure!(load(&registers, FACTORIAL)? == 3_628_800, "10! is wrong");

    let mut interrupts = File::open(uio).context("cannot open the interrupt")?;
    pci.set_command(INTX_DISABLE, false)?;
    let mut before = None;
    for n in 1..=count {
        store(&registers, RAISE, n)?;
        let total = next(&mut interrupts).with_context(|| format!("interrupt {n} is lost"))?;
        ensure!(before.is_none_or(|before| total == before + 1), "{total} follows {before:?}");
        before = Some(total);
        ensure!(load(&registers, CAUSES)? == n, "interrupt {n} has another cause");
        store(&registers, ACKNOWLEDGE, n)?;
        // The kernel has disabled it before it told this program.
        pci.set_command(INTX_DISABLE, false)?;
    }
    println!("edu {id:#x}: {count} interrupts");

    let memory = MmapRegion::<()>::new(2 * PAGE as usize)?;
    for offset in (0..PAGE).step_by(4) {
        store(&memory, offset, offset as u32 ^ 0x5a5a_0000)?;
        store(&memory, PAGE + offset, 0)?;
    }
    let [from, to] = [0, PAGE].map(|offset| frame(memory.as_ptr() as u64 + offset));
    transfer(&registers, from?, BUFFER, TO_DEVICE)?;
    transfer(&registers, BUFFER, to?, TO_MEMORY)?;
    for offset in (0..PAGE).step_by(4) {
        let found = load(&memory, PAGE + offset)?;
        ensure!(found == offset as u32 ^ 0x5a5a_0000, "byte {offset} came back as {found:#x}");
    }
    println!("edu: a page by DMA, there and back");
    Ok(())
}

fn transfer(registers: &MmapRegion, from: u64, to: u64, command: u32) -> Result<()> {
    for (register, value) in [(SOURCE, from), (DESTINATION, to), (COUNT, PAGE)] {
        store(registers, register, value as u32)?;
    }
    store(registers, TRANSFER, command)?;
    wait(|| Ok(load(registers, TRANSFER)? & 1 == 0))
}

/// Waits for an interrupt. Returns how many there were in all.
fn next(interrupts: &mut File) -> Result<u32> {
    let mut fds = [PollFd::new(interrupts.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut fds, LIMIT.as_millis() as u16)? == 1, "none after {LIMIT:?}");
    let mut bytes = [0; 4];
    interrupts.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}
