//! A PCI device as sysfs has it, and moves of its BARs by configuration writes, as a kernel makes them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

pub const PAGE: u64 = 4096;

/// Configuration space (PCI 3.0 §6.1): the command register, and its bits.
pub const COMMAND: u64 = 0x04;
pub const MEMORY: u16 = 1 << 1;
pub const BUS_MASTER: u16 = 1 << 2;
pub const INTX_DISABLE: u16 = 1 << 10;
const BAR0: u64 = 0x10;

/// Where a BAR is moved to: in the guest's windows, and past what a kernel has placed there.
const LOW: u64 = 0xe000_0000;
const HIGH: u64 = 0x8_0000_0000;
/// How many places there are in each.
const PLACES: u64 = 4;

pub struct Pci {
    directory: PathBuf,
    config: File,
}

impl Pci {
    pub fn new(address: &str) -> Result<Self> {
        let directory = PathBuf::from("/sys/bus/pci/devices").join(address);
        let config = File::options().read(true).write(true).open(directory.join("config"));
        Ok(Self { config: config.context("cannot open configuration space")?, directory })
    }

    fn read(&self, offset: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.config.read_exact_at(&mut bytes, offset)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn set_command(&self, bits: u16, on: bool) -> Result<()> {
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
    pub fn map(&self, bar: u64) -> Result<MmapRegion> {
        let file = self.directory.join(format!("resource{bar}"));
        map(File::options().read(true).write(true).open(file)?, 0, self.size(bar)?)
    }

    fn is_wide(&self, bar: u64) -> Result<bool> {
        let low = self.read(BAR0 + 4 * bar)?;
        ensure!(low & 1 == 0, "bar {bar} has ports: {low:#x}");
        Ok(low & 6 == 4)
    }

    pub fn address(&self, bar: u64) -> Result<u64> {
        let low = u64::from(self.read(BAR0 + 4 * bar)? & !15);
        let high = if self.is_wide(bar)? { self.read(BAR0 + 4 * bar + 4)? } else { 0 };
        Ok(low | u64::from(high) << 32)
    }

    /// Moves a BAR as a kernel does: with decoding disabled, one register after the other.
    fn set_address(&self, bar: u64, address: u64) -> Result<()> {
        self.set_command(MEMORY, false)?;
        let [low, high] = [address as u32, (address >> 32) as u32].map(u32::to_le_bytes);
        self.config.write_all_at(&low, BAR0 + 4 * bar)?;
        if self.is_wide(bar)? {
            self.config.write_all_at(&high, BAR0 + 4 * bar + 4)?;
        }
        self.set_command(MEMORY, true)
    }
}

/// A BAR that moves. A word of it has to move along, and the old place has to read all ones.
pub struct Mover<'a> {
    pci: &'a Pci,
    bar: u64,
    size: u64,
    /// Where the kernel has placed it.
    pub home: u64,
    /// Where it is.
    pub at: u64,
    is_wide: bool,
    /// The word, and its offset.
    word: u32,
    offset: u64,
    moves: u32,
    begin: Instant,
}

impl<'a> Mover<'a> {
    /// Compares the word at an offset.
    pub fn new(pci: &'a Pci, bar: u64, offset: u64) -> Result<Self> {
        let (size, home, is_wide) = (pci.size(bar)? as u64, pci.address(bar)?, pci.is_wide(bar)?);
        let (at, moves, begin) = (home, 0, Instant::now());
        let mut this = Self { pci, bar, size, home, at, is_wide, word: 0, offset, moves, begin };
        this.word = this.load(home)?;
        Ok(this)
    }

    /// The page with the word, if the BAR is at this address.
    fn page(&self, at: u64) -> Result<MmapRegion> {
        physical(at + self.offset / PAGE * PAGE, PAGE as usize)
    }

    fn load(&self, at: u64) -> Result<u32> {
        load(&self.page(at)?, self.offset % PAGE)
    }

    /// The place of a number: those of even numbers are below 4 GiB, the others above, if the BAR has 64 bits.
    pub fn place(&self, number: u32) -> u64 {
        let number = u64::from(number);
        let (start, place) = match (self.is_wide, number % 2) {
            (false, _) => (LOW, number),
            (true, 0) => (LOW, number / 2),
            (true, _) => (HIGH, number / 2),
        };
        start + place % PLACES * self.size
    }

    /// Moves it to an address.
    pub fn go(&mut self, next: u64) -> Result<()> {
        let Self { bar, at, word, moves, .. } = *self;
        self.pci.set_address(bar, next)?;
        ensure!(self.pci.address(bar)? == next, "bar {bar} is not at {next:#x}");
        let found = self.load(next)?;
        ensure!(found == word, "move {moves} to {next:#x}: {found:#x} is there, not {word:#x}");
        // Right after a page fault, because KVM has taken such an access for one in the fault's delivery.
        let (old, fresh) = (self.page(at)?, MmapRegion::new(PAGE as usize)?);
        store(&fresh, 0, 1)?;
        let left = load(&old, self.offset % PAGE)?;
        ensure!(left == u32::MAX, "move {moves} to {next:#x}: {left:#x} is still at {at:#x}");
        (self.at, self.moves) = (next, moves + 1);
        Ok(())
    }

    /// Changes the word, which has to be memory.
    fn change(&mut self) -> Result<()> {
        self.word = 0x600d_0000 + self.moves;
        store(&self.page(self.at)?, self.offset % PAGE, self.word)
    }

    pub fn report(&self) {
        let Self { bar, size, moves, begin, .. } = self;
        println!("bar {bar}, {size:#x} bytes: {moves} moves in {} ms", begin.elapsed().as_millis());
    }
}

/// Moves a BAR of memory so many times. The last page changes after each move.
pub fn move_memory(pci: &Pci, bar: u64, count: u32) -> Result<()> {
    let mut mover = Mover::new(pci, bar, pci.size(bar)? as u64 - PAGE)?;
    for n in 0..count {
        mover.go(if n + 1 == count { mover.home } else { mover.place(n) })?;
        mover.change()?;
    }
    mover.report();
    Ok(())
}

/// Moves a BAR of registers so many times, of which the one at an offset stays the same.
pub fn move_registers(pci: &Pci, bar: u64, offset: u64, count: u32) -> Result<()> {
    let mut mover = Mover::new(pci, bar, offset)?;
    for n in 0..count {
        mover.go(if n + 1 == count { mover.home } else { mover.place(n) })?;
    }
    mover.report();
    Ok(())
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
pub fn physical(address: u64, size: usize) -> Result<MmapRegion> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/mem")?;
    map(file, address, size).with_context(|| format!("{size:#x} bytes at {address:#x}"))
}

/// The physical address of a page of this process (Linux, Documentation/admin-guide/mm/pagemap.rst).
pub fn frame(address: u64) -> Result<u64> {
    let mut pagemap = File::open("/proc/self/pagemap")?;
    pagemap.seek(SeekFrom::Start(address / PAGE * 8))?;
    let mut bytes = [0; 8];
    pagemap.read_exact(&mut bytes)?;
    let entry = u64::from_le_bytes(bytes);
    ensure!(entry >> 63 == 1, "the page at {address:#x} is not in memory");
    Ok((entry & ((1 << 55) - 1)) * PAGE)
}

pub fn load(memory: &MmapRegion, offset: u64) -> Result<u32> {
    Ok(memory.as_volatile_slice().load(offset as usize, Relaxed)?)
}

pub fn store(memory: &MmapRegion, offset: u64, value: u32) -> Result<()> {
    Ok(memory.as_volatile_slice().store(value, offset as usize, Relaxed)?)
}
