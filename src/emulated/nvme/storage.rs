//! Namespaces: blocks on a file, behind a volatile write cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::command::Status;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file;

/// The cache is written back when it holds more than this, in bytes.
const CACHE: usize = 1 << 20;

/// A namespace: logical blocks of 512 or 4096 bytes, in memory or in a file. What is written is cached
/// until a flush, a write with forced unit access, a shutdown, or until the cache is full; a loss of
/// power loses it.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    shift: u32,
    blocks: u64,
    cache: BTreeMap<u64, Box<[u8]>>,
}

impl Namespace {
    /// `size` bytes of memory, all zero, in blocks of `block_size` bytes.
    ///
    /// # Errors
    /// `Unaligned` where the size is no multiple of the block's, or that is not 512 or 4096; what the
    /// kernel answers.
    pub fn memory(size: u64, block_size: u32) -> Result<Self> {
        let failed = |errno| Error::os(errno, "create", "a namespace");
        let file = file::memory_file("vfio-remap-namespace", size).map_err(failed)?;
        Self::file(file.into(), block_size)
    }

    /// All of a file, open for reading and writing, in blocks of `block_size` bytes.
    ///
    /// # Errors
    /// As [`memory`](Self::memory).
    pub fn file(file: File, block_size: u32) -> Result<Self> {
        let failed = |error| Error::io(&error, "create", "a namespace");
        let size = file.metadata().map_err(failed)?.len();
        if ![512, 4096].contains(&block_size) || size == 0 || size % u64::from(block_size) != 0 {
            return Err(Error::new(ErrorKind::Unaligned, "create", "a namespace").because(format!(
                "{size} bytes are no whole number of blocks of {block_size}; 512 or 4096 are allowed"
            )));
        }
        let shift = block_size.trailing_zeros();
        Ok(Self { file, shift, blocks: size >> shift, cache: BTreeMap::new() })
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The block's size as a power of two.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    pub(super) fn check(&self, block: u64, count: u64) -> std::result::Result<(), Status> {
        match block.checked_add(count) {
            Some(end) if end <= self.blocks => Ok(()),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    /// Reads whole blocks, which are there.
    pub(super) fn read(&self, block: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, block << self.shift)?;
        let parts = data.chunks_exact_mut(1 << self.shift);
        for (part, block) in parts.zip(block..) {
            if let Some(cached) = self.cache.get(&block) {
                part.copy_from_slice(cached);
            }
        }
        Ok(())
    }

    /// Writes whole blocks, which are there: past the cache where they must last.
    pub(super) fn write(&mut self, block: u64, data: &[u8], lasting: bool) -> io::Result<()> {
        let parts = data.chunks_exact(1 << self.shift).zip(block..);
        if lasting {
            self.file.write_all_at(data, block << self.shift)?;
            parts.for_each(|(_, block)| drop(self.cache.remove(&block)));
            return self.file.sync_data();
        }
        for (part, block) in parts {
            self.cache.insert(block, part.into());
        }
        if self.cache.len() << self.shift > CACHE { self.flush() } else { Ok(()) }
    }

    /// What was written before will last.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some((block, data)) = self.cache.first_key_value() {
            self.file.write_all_at(data, block << self.shift)?;
            self.cache.pop_first();
        }
        self.file.sync_data()
    }

    /// Power is lost, and with it what was cached.
    pub(super) fn lose_power(&mut self) {
        self.cache.clear();
    }
}
