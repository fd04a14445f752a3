//! What `cargo lab vmm` runs in the guest: uses devices that the guest's kernel has no driver for, and moves BARs
//! under it, by configuration writes as a kernel makes them.
//!
//! - `edu ADDRESS UIO COUNT`: identification, computation, that many interrupts (INTx, by uio_pci_generic), and DMA.
//! - `move ADDRESS BAR COUNT`: moves a 64-bit BAR that many times, in turn above and below 4 GiB. Its memory has to
//!   keep what was written, and the old place has to read all ones.
//! - `probe ADDRESS BAR COUNT`: as `move`, for a BAR of registers: the first word has to stay the same.
//! - `write DISK MIB NUMBER`, `check DISK MIB NUMBER`: writes so much to a disk, or reads it and compares. The number
//!   selects what.
//! - `touch ADDRESS BAR`: maps a BAR, waits for a line on standard input, and reads a word of each page.

#![forbid(unsafe_code)]

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write, stdin};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const PAGE: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(60);

/// Configuration space (PCI 3.0 §6.1): the command register, and its bits.
const COMMAND: u64 = 0x04;
const MEMORY: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
const BAR0: u64 = 0x10;

/// Where a BAR is moved to: in the guest's windows, and past what a kernel has placed there.
const LOW: u64 = 0xe000_0000;
const HIGH: u64 = 0x8_0000_0000;
/// How many places there are in each.
const PLACES: u64 = 4;

fn main() -> Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["edu", address, uio, count] => edu(&Pci::new(address)?, uio, count.parse()?),
        ["move", address, bar, count] => {
            relocate(&Pci::new(address)?, bar.parse()?, count.parse()?, true)
        }
        ["probe", address, bar, count] => {
            relocate(&Pci::new(address)?, bar.parse()?, count.parse()?, false)
        }
        ["write", disk, size, number] => write(disk, size.parse()?, number.parse()?),
        ["check", disk, size, number] => check(disk, size.parse()?, number.parse()?),
        ["touch", address, bar] => touch(&Pci::new(address)?, bar.parse()?),
        _ => bail!("what is there to do?"),
    }
}

/// A device as sysfs has it.
struct Pci {
    directory: PathBuf,
    config: File,
}

impl Pci {
    fn new(address: &str) -> Result<Self> {
        let directory = PathBuf::from("/sys/bus/pci/devices").join(address);
        let config = File::options().read(true).write(true).open(directory.join("config"));
        Ok(Self { config: config.context("cannot open configuration space")?, directory })
    }

    fn read(&self, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.config.read_exact_at(&mut bytes, offset)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn set_command(&self, bits: u16, on: bool) -> Result<()> {
        let command = self.read(COMMAND)? as u16;
        let command = if on { command | bits } else { command & !bits };
        Ok(self.config.write_all_at(&command.to_le_bytes(), COMMAND)?)
    }

    /// The size of a BAR.
    fn size(&self, bar: u64) -> Result<usize> {
        let file = self.directory.join(format!("resource{bar}"));
        Ok(fs::metadata(file)?.len() as usize)
    }

    /// A BAR where the kernel believes that it is.
    fn map(&self, bar: u64) -> Result<MmapRegion> {
        let file = self.directory.join(format!("resource{bar}"));
        map(File::options().read(true).write(true).open(file)?, 0, self.size(bar)?)
    }

    fn address(&self, bar: u64) -> Result<u64> {
        let low = self.read(BAR0 + 4 * bar)?;
        ensure!(low & 7 == 4 || low & 15 == 12, "bar {bar} is not one of 64 bits: {low:#x}");
        Ok(u64::from(low & !15) | u64::from(self.read(BAR0 + 4 * bar + 4)?) << 32)
    }

    /// Moves a BAR as a kernel does: with decoding disabled, one register after the other.
    fn set_address(&self, bar: u64, address: u64) -> Result<()> {
        self.set_command(MEMORY, false)?;
        let [low, high] = [address as u32, (address >> 32) as u32].map(u32::to_le_bytes);
        self.config.write_all_at(&low, BAR0 + 4 * bar)?;
        self.config.write_all_at(&high, BAR0 + 4 * bar + 4)?;
        self.set_command(MEMORY, true)
    }
}

fn map(file: File, offset: u64, size: usize) -> Result<MmapRegion> {
    MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::new(file, offset))
        .build()
        .context("cannot map")
}

/// Physical addresses, uncached.
fn physical(address: u64, size: usize) -> Result<MmapRegion> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/mem")?;
    map(file, address, size).with_context(|| format!("{size:#x} bytes at {address:#x}"))
}

fn load(memory: &MmapRegion, offset: u64) -> Result<u32> {
    Ok(memory.as_volatile_slice().load(offset as usize, Relaxed)?)
}

fn store(memory: &MmapRegion, offset: u64, value: u32) -> Result<()> {
    Ok(memory.as_volatile_slice().store(value, offset as usize, Relaxed)?)
}

fn relocate(pci: &Pci, bar: u64, count: u32, is_memory: bool) -> Result<()> {
    let size = pci.size(bar)? as u64;
    let home = pci.address(bar)?;
    // The first word of the last page of memory, or of registers.
    let part = if is_memory { size - PAGE } else { 0 };
    let page = |at: u64| physical(at + part, PAGE as usize);
    let mut word = load(&page(home)?, 0)?;
    let begin = Instant::now();
    let mut at = home;
    for n in 0..count {
        let place = if n % 2 == 0 { LOW } else { HIGH } + u64::from(n / 2) % PLACES * size;
        let next = if n + 1 == count { home } else { place };
        pci.set_address(bar, next)?;
        ensure!(pci.address(bar)? == next, "bar {bar} is not at {next:#x}");
        let memory = page(next)?;
        let found = load(&memory, 0)?;
        ensure!(found == word, "move {n} to {next:#x}: {found:#x} is there, not {word:#x}");
        let left = load(&page(at)?, 0)?;
        ensure!(left == u32::MAX, "move {n} to {next:#x}: {left:#x} is still at {at:#x}");
        if is_memory {
            word = 0x600d_0000 + n;
            store(&memory, 0, word)?;
        }
        at = next;
    }
    println!("bar {bar}, {size:#x} bytes: {count} moves in {} ms", begin.elapsed().as_millis());
    Ok(())
}

/// A mebibyte that depends on its place and on a number.
fn content(place: u64, number: u64) -> Vec<u8> {
    // Marsaglia's xorshift.
    let mut state = place << 32 | number << 8 | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take((1 << 20) / 8).flatten().collect()
}

fn write(disk: &str, size: u64, number: u64) -> Result<()> {
    let mut file = File::options().write(true).open(disk)?;
    for place in 0..size {
        file.write_all(&content(place, number))?;
    }
    file.sync_all()?;
    println!("{disk}: wrote {size} MiB");
    Ok(())
}

fn check(disk: &str, size: u64, number: u64) -> Result<()> {
    let mut file = File::open(disk)?;
    let mut found = vec![0; 1 << 20];
    for place in 0..size {
        file.read_exact(&mut found)?;
        ensure!(found == content(place, number), "{disk} has other data at {place} MiB");
    }
    println!("{disk}: read {size} MiB");
    Ok(())
}

fn touch(pci: &Pci, bar: u64) -> Result<()> {
    pci.set_command(MEMORY, true)?;
    let memory = pci.map(bar)?;
    println!("ready to touch");
    stdin().read_line(&mut String::new())?;
    for offset in (0..memory.size() as u64).step_by(PAGE as usize) {
        load(&memory, offset)?;
    }
    println!("touched");
    Ok(())
}

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

fn edu(pci: &Pci, uio: &str, count: u32) -> Result<()> {
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

fn wait(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !done()? {
        ensure!(begin.elapsed() < LIMIT, "the device is not done after {LIMIT:?}");
    }
    Ok(())
}

/// Waits for an interrupt. Returns how many there were in all.
fn next(interrupts: &mut File) -> Result<u32> {
    let mut fds = [PollFd::new(interrupts.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut fds, LIMIT.as_millis() as u16)? == 1, "none after {LIMIT:?}");
    let mut bytes = [0; 4];
    interrupts.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The physical address of a page of this process (Linux, Documentation/admin-guide/mm/pagemap.rst).
fn frame(address: u64) -> Result<u64> {
    let mut pagemap = File::open("/proc/self/pagemap")?;
    pagemap.seek(SeekFrom::Start(address / PAGE * 8))?;
    let mut bytes = [0; 8];
    pagemap.read_exact(&mut bytes)?;
    let entry = u64::from_le_bytes(bytes);
    ensure!(entry >> 63 == 1, "the page at {address:#x} is not in memory");
    Ok((entry & ((1 << 55) - 1)) * PAGE)
}
