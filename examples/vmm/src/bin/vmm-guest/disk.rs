//! Disks that the kernel's driver has, and moves of their controller's registers under it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use vm_memory::{Bytes, MmapRegion, ReadVolatile, VolatileMemory, WriteVolatile};

use crate::pci::{Mover, PAGE, Pci};
use crate::wait;

/// How many threads keep a disk busy, and how much each transfers at a time.
const THREADS: u32 = 4;
const CHUNK: usize = 64 << 10;

/// A mebibyte that depends on its place and on a number.
fn content(place: u64, number: u64) -> Vec<u8> {
    // Marsaglia's xorshift.
    let mut state = place << 32 | number << 8 | 1;
    let mut all = vec![0; 1 << 20];
    // Whole words, because each byte costs in an emulated machine.
    for word in all.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    all
}

/// Writes so many mebibytes. The number selects what.
pub fn write(disk: &str, size: u64, number: u64) -> Result<()> {
    let mut file = File::options().write(true).open(disk)?;
    for place in 0..size {
        file.write_all(&content(place, number))?;
    }
    file.sync_all()?;
    println!("{disk}: wrote {size} MiB");
    Ok(())
}

/// Reads what [`write()`] has written, and compares.
pub fn check(disk: &str, size: u64, number: u64) -> Result<()> {
    let mut file = File::open(disk)?;
    let mut found = vec![0; 1 << 20];
    for place in 0..size {
        file.read_exact(&mut found)?;
        ensure!(found == content(place, number), "{disk} has other data at {place} MiB");
    }
    println!("{disk}: read {size} MiB");
    Ok(())
}

/// A disk without the kernel's cache: each access is one command to the controller.
fn open_direct(disk: &str) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(disk).with_context(|| format!("cannot open {disk}"))
}

/// Reads so many times, one after the other: each read ends by one interrupt.
pub fn ask(disk: &str, count: u64) -> Result<()> {
    let mut file = open_direct(disk)?;
    let memory = MmapRegion::<()>::new(PAGE as usize)?;
    for number in 0..count {
        file.seek(SeekFrom::Start(number * PAGE))?;
        file.read_exact_volatile(&mut memory.as_volatile_slice())?;
    }
    println!("{disk}: {count} reads");
    Ok(())
}

/// Moves the registers of a disk's controller, while its driver is bound and threads write to the disk and read back.
///
/// Linux's driver has mapped the registers where it found them, and cannot be told of another place. So the threads
/// stop for a moment, as the driver does when a kernel assigns addresses: no command is in the queues when the registers
/// move away, and they have moved back when the next one is. Each thread does something between two such moments.
pub fn busy(disk: &str, pci: &Pci, bar: u64, count: u32) -> Result<()> {
    let mut mover = Mover::new(pci, bar, 0)?;
    let (gate, stop) = (RwLock::new(()), AtomicBool::new(false));
    let chunks = [const { AtomicU32::new(0) }; THREADS as usize];
    thread::scope(|scope| {
        let works = (0..THREADS).zip(&chunks).map(|(number, chunks)| {
            let (gate, stop) = (&gate, &stop);
            scope.spawn(move || work(disk, number, gate, stop, chunks))
        });
        let works: Vec<_> = works.collect();
        let mut move_all = || {
            for n in 0..count / 2 {
                let before = chunks.each_ref().map(|chunks| chunks.load(Relaxed));
                wait(|| {
                    thread::sleep(Duration::from_millis(1));
                    ensure!(!works.iter().any(|work| work.is_finished()), "a thread has ended");
                    Ok(chunks.iter().zip(before).all(|(now, before)| now.load(Relaxed) > before))
                })?;
                let _stopped = gate.write().map_err(|_| anyhow!("a thread has panicked"))?;
                mover.go(mover.place(n))?;
                mover.go(mover.home)?;
            }
            Ok(())
        };
        let moved: Result<()> = move_all();
        stop.store(true, Relaxed);
        for work in works {
            work.join().map_err(|_| anyhow!("a thread has panicked"))??;
        }
        moved
    })?;
    mover.report();
    let total: u32 = chunks.iter().map(|chunks| chunks.load(Relaxed)).sum();
    println!("{disk}: {total} chunks of {CHUNK} bytes written and read meanwhile");
    Ok(())
}

/// Writes a chunk of the disk and reads it back until it is stopped, and counts that.
fn work(
    disk: &str,
    number: u32,
    gate: &RwLock<()>,
    stop: &AtomicBool,
    chunks: &AtomicU32,
) -> Result<()> {
    let mut file = open_direct(disk)?;
    let memory = MmapRegion::<()>::new(CHUNK)?;
    let slice = memory.as_volatile_slice();
    let start = SeekFrom::Start(u64::from(number) * CHUNK as u64);
    let mut found = vec![0; CHUNK];
    while !stop.load(Relaxed) {
        let _running = gate.read().map_err(|_| anyhow!("the mover has panicked"))?;
        let round = chunks.load(Relaxed);
        let wanted = (round << 8 | number).to_le_bytes().repeat(CHUNK / 4);
        slice.write_slice(&wanted, 0)?;
        file.seek(start)?;
        file.write_all_volatile(&slice)?;
        slice.write_slice(&found, 0)?;
        file.seek(start)?;
        file.read_exact_volatile(&mut memory.as_volatile_slice())?;
        slice.read_slice(&mut found, 0)?;
        ensure!(found == wanted, "{disk}: chunk {number} came back differently");
        chunks.store(round + 1, Relaxed);
    }
    Ok(())
}
