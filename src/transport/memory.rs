//! A device with one BAR that is plain memory, for experiments on any machine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{DeviceInfo, RegionFile, RegionInfo, Transport};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file;

/// A device in this process whose only BAR is a memfd.
///
/// A read returns what was written. On Linux 5.13 and newer, windows over it are duplicated and relocated
/// by `MREMAP_DONTUNMAP`.
#[derive(Debug)]
pub struct MemoryDevice {
    memory: File,
    shared: Arc<OwnedFd>,
    size: u64,
}

impl MemoryDevice {
    /// A device whose BAR 0 has `size` bytes, all zero.
    ///
    /// # Errors
    /// `Os` if the kernel cannot create the memfd.
    pub fn new(size: u64) -> Result<Self> {
        let failed = |errno| Error::os(errno, "create", "a memory device");
        let memory = File::from(file::memory_file("vfio-remap-bar", size).map_err(failed)?);
        // Whoever gets the file by `Transport::backing` could truncate it, and accesses to windows would fault.
        file::fix_size(&memory).map_err(failed)?;
        let shared =
            memory.try_clone().map_err(|error| Error::io(&error, "create", "a memory device"))?;
        Ok(Self { memory, shared: Arc::new(shared.into()), size })
    }

    fn check(&self, region: u32, offset: u64, len: usize, operation: &'static str) -> Result<()> {
        self.only_bar_0(region, operation)?;
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, operation, "bar 0 of memory").with_reason(
                format!("{len} bytes at {offset:#x} leave its {:#x} bytes", self.size),
            )),
        }
    }

    fn only_bar_0(&self, region: u32, operation: &'static str) -> Result<()> {
        if region == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, operation, format!("region {region} of memory"))
            .with_reason("it has only region 0"))
    }
}

impl Transport for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("memory", 1)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.only_bar_0(index, "find")?;
        Ok(RegionInfo::mappable(self.size))
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check(region, offset, data.len(), "read")?;
        self.memory
            .read_exact_at(data, offset)
            .map_err(|error| Error::io(&error, "read", "bar 0 of memory"))
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.check(region, offset, data.len(), "write")?;
        self.memory
            .write_all_at(data, offset)
            .map_err(|error| Error::io(&error, "write", "bar 0 of memory"))
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        self.only_bar_0(region, "map")?;
        RegionFile::memory(self.shared.clone(), 0)
    }
}
