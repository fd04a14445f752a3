//! Namespaces: the blocks of a file, with a volatile write cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use super::command::Status;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file;

/// The size of the cache in bytes. A larger one is written back.
const CACHE: usize = 1 << 20;
/// Punching a hole costs as much as writing 1/`HOLE_SHARE` of it.
const HOLE_SHARE: u64 = 16;
/// The least cost of a call, in written bytes.
const CALL: u64 = 4096;

/// A namespace: logical blocks of 512 or 4096 bytes, in memory or in a file. Written data is cached until a
/// flush, a write with forced unit access, a shutdown, or until the cache is full. A power loss drops cached
/// data.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    shift: u32,
    blocks: u64,
    cache: BTreeMap<u64, Box<[u8]>>,
    /// False once punching a hole into the file has failed as unsupported.
    has_holes: bool,
    read_only: bool,
}

impl Namespace {
    /// A namespace of `size` bytes of memory, all zero, in blocks of `block_size` bytes.
    ///
    /// # Errors
    /// `Unaligned` if the block size is not 512 or 4096, or does not divide the size; the kernel's error.
    pub fn memory(size: u64, block_size: u32) -> Result<Self> {
        let failed = |errno| Error::os(errno, "create", "a namespace");
        let file = file::memory_file("vfio-remap-namespace", size).map_err(failed)?;
        Self::file(file.into(), block_size)
    }

    /// A namespace on a file, in blocks of `block_size` bytes. The file is open for reading and writing, or only for
    /// reading if the namespace is [read-only](Self::read_only).
    ///
    /// # Errors
    /// As [`memory`](Self::memory).
    pub fn file(file: File, block_size: u32) -> Result<Self> {
        let failed = |error| Error::io(&error, "create", "a namespace");
        let size = file.metadata().map_err(failed)?.len();
        if ![512, 4096].contains(&block_size) || size == 0 || size % u64::from(block_size) != 0 {
            return Err(Error::new(ErrorKind::Unaligned, "create", "a namespace").with_reason(format!(
                "{size} bytes are not a whole number of blocks of {block_size}; 512 or 4096 are allowed"
            )));
        }
        let shift = block_size.trailing_zeros();
        Ok(Self {
            file,
            shift,
            blocks: size >> shift,
            cache: BTreeMap::new(),
            has_holes: true,
            read_only: false,
        })
    }

    /// The same, write protected: commands that would change it are refused (NVMe 1.4, Namespace
    /// Write Protection).
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The binary logarithm of the block size.
    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    pub(super) fn check(&self, block: u64, count: u64) -> std::result::Result<(), Status> {
        match block.checked_add(count) {
            Some(end) if end <= self.blocks => Ok(()),
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    /// Whether these blocks exist and may be changed.
    pub(super) fn check_write(&self, block: u64, count: u64) -> std::result::Result<(), Status> {
        self.check(block, count)?;
        if self.read_only { Err(Status::WRITE_PROTECTED) } else { Ok(()) }
    }

    /// Reads whole blocks. [`check`](Self::check) has found that they exist.
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

    /// Writes whole blocks, not to the cache if `durable`. [`check`](Self::check) has found that they exist.
    pub(super) fn write(&mut self, block: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let parts = data.chunks_exact(1 << self.shift).zip(block..);
        if durable {
            self.file.write_all_at(data, block << self.shift)?;
            parts.for_each(|(_, block)| drop(self.cache.remove(&block)));
            return self.file.sync_data();
        }
        for (part, block) in parts {
            self.cache.insert(block, part.into());
        }
        if self.cache.len() << self.shift > CACHE { self.flush() } else { Ok(()) }
    }

    /// Makes at most `count` blocks, starting at `block`, read as zeros. The `budget`, in written bytes, limits
    /// how many; at least one is done. Returns how many. They may be durable or not.
    pub(super) fn zero(&mut self, block: u64, count: u64, budget: &mut u64) -> io::Result<u64> {
        let share = if self.has_holes { HOLE_SHARE } else { 1 };
        let count = count.min(((*budget * share) >> self.shift).max(1));
        let (start, len) = (block << self.shift, count << self.shift);
        if self.has_holes {
            match file::punch_hole(&self.file, start, len) {
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    log::debug!("nvme: no holes can be punched: zeros are written");
                    self.has_holes = false;
                    return self.zero(block, count, budget);
                }
                punched => punched?,
            }
        } else {
            self.file.write_all_at(&vec![0; len as usize], start)?;
        }
        while let Some((&cached, _)) = self.cache.range(block..block + count).next() {
            self.cache.remove(&cached);
        }
        *budget = budget.saturating_sub((len / share).max(CALL));
        Ok(count)
    }

    /// Makes everything that was written durable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some((block, data)) = self.cache.first_key_value() {
            self.file.write_all_at(data, block << self.shift)?;
            self.cache.pop_first();
        }
        self.sync()
    }

    /// Makes everything that was written to the file durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Drops the cache, as a power loss does.
    pub(super) fn lose_power(&mut self) {
        self.cache.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_written_in_parts_if_holes_are_unsupported() {
        for has_holes in [true, false] {
            let mut namespace = Namespace::memory(1 << 20, 512).unwrap();
            namespace.has_holes = has_holes;
            namespace.write(0, &[1; 1 << 20], true).unwrap();
            // Another value, in the cache.
            namespace.write(9, &[2; 1024], false).unwrap();
            let (mut block, mut turns) = (1, 0);
            while block < 2000 {
                let mut budget = 64 << 10;
                let count = namespace.zero(block, 2000 - block, &mut budget).unwrap();
                let most = if has_holes { 16 * 128 } else { 128 };
                assert!((1..=most).contains(&count), "{count} blocks at once");
                (block, turns) = (block + count, turns + 1);
            }
            assert_eq!(turns, if has_holes { 1 } else { 16 });
            let mut data = vec![9; 1 << 20];
            namespace.read(0, &mut data).unwrap();
            let end = 2000 * 512;
            assert!(data[..512].iter().chain(&data[end..]).all(|byte| *byte == 1));
            assert!(data[512..end].iter().all(|byte| *byte == 0));
        }
    }
}
