//! The mapped parts of a region: memory that the model and the driver share.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::device::{Device, Register, Width, Window};
use crate::error::{Error, Result};
use crate::space::Placement;
use crate::sys::file;
use crate::transport::{DeviceInfo, RegionFile, RegionInfo, Transport};

/// The memory of a region. Drivers map its file; the model accesses it by its own registers.
///
/// A driver that has the file may write all of it at any time, but cannot change its size (it is sealed). So an
/// access of the model never faults.
pub struct Memory {
    window: Window,
    sealed: Arc<Sealed>,
}

impl Memory {
    /// `size` bytes, all zero. Pages are allocated at the first access.
    pub(super) fn new(size: u64) -> Result<Self> {
        let sealed = Arc::new(Sealed::new(size)?);
        let window = Device::new(sealed.clone())
            .bar(0)?
            .map(.., Placement::Anywhere)
            .map_err(Error::from)?;
        Ok(Self { window, sealed })
    }

    /// The register of `T` at `offset` bytes into the region.
    ///
    /// # Errors
    /// `OutOfRange`, `Unaligned`.
    pub fn register<T: Width>(&self, offset: usize) -> Result<Register<T>> {
        self.window.register(offset)
    }

    /// Reads `data.len()` bytes at `offset`, by accesses of any width.
    ///
    /// # Errors
    /// The kernel's error if they leave the region.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let done = self.sealed.file.read_exact_at(data, offset);
        done.map_err(|error| Error::io(&error, "read", "the memory of a model"))
    }

    /// Writes `data` at `offset`, by accesses of any width.
    ///
    /// # Errors
    /// The kernel's error if they leave the region.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let done = self.sealed.file.write_all_at(data, offset);
        done.map_err(|error| Error::io(&error, "write", "the memory of a model"))
    }

    /// Reads for a trapped access of a driver. If the access is aligned and has a register's width, it is one
    /// load.
    pub(super) fn load(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        fn one<T: Width, const N: usize>(
            memory: &Memory,
            offset: u64,
            data: &mut [u8],
            bytes: fn(T) -> [u8; N],
        ) -> Result<()> {
            let value = memory.register::<T>(offset as usize)?.read();
            data.copy_from_slice(&bytes(value));
            Ok(())
        }
        match data.len() {
            2 if offset.is_multiple_of(2) => one(self, offset, data, u16::to_le_bytes),
            4 if offset.is_multiple_of(4) => one(self, offset, data, u32::to_le_bytes),
            8 if offset.is_multiple_of(8) => one(self, offset, data, u64::to_le_bytes),
            _ => self.read(offset, data),
        }
    }

    /// Writes for a trapped access of a driver, as [`load`](Self::load) reads.
    pub(super) fn store(&self, offset: u64, data: &[u8]) -> Result<()> {
        let at = offset as usize;
        match *data {
            [a, b] if offset.is_multiple_of(2) => {
                self.register(at)?.write(u16::from_le_bytes([a, b]));
                Ok(())
            }
            [a, b, c, d] if offset.is_multiple_of(4) => {
                self.register(at)?.write(u32::from_le_bytes([a, b, c, d]));
                Ok(())
            }
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.register(at)?.write(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                Ok(())
            }
            _ => self.write(offset, data),
        }
    }

    pub(super) fn file(&self) -> Result<RegionFile> {
        RegionFile::memory(self.sealed.shared.clone(), 0)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({:#x} bytes)", self.sealed.size)
    }
}

/// A memory file of fixed size.
#[derive(Debug)]
struct Sealed {
    file: File,
    shared: Arc<OwnedFd>,
    size: u64,
}

impl Sealed {
    fn new(size: u64) -> Result<Self> {
        let make = || {
            let file = File::from(file::memory_file("vfio-remap-model", size)?);
            file::fix_size(&file)?;
            let shared = Arc::new(OwnedFd::from(file.try_clone()?));
            Ok(Self { file, shared, size })
        };
        make().map_err(|error: std::io::Error| Error::io(&error, "create", "a model's memory"))
    }
}

impl Transport for Sealed {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("the memory of a model", 1)
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::mappable(self.size))
    }

    fn read_at(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let done = self.file.read_exact_at(data, offset);
        done.map_err(|error| Error::io(&error, "read", "the memory of a model"))
    }

    fn write_at(&self, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        let done = self.file.write_all_at(data, offset);
        done.map_err(|error| Error::io(&error, "write", "the memory of a model"))
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        RegionFile::memory(self.shared.clone(), 0)
    }
}
