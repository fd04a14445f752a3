//! A device whose memory can be truncated under its windows, as a vfio-user server can.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::transport::{DeviceInfo, RegionFile, RegionInfo, Transport};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Window};

pub const PAGE: usize = 4096;
/// The size of each of its two BARs.
pub const SIZE: usize = 4 * PAGE;

#[derive(Debug)]
pub struct Truncatable {
    files: [Arc<OwnedFd>; 2],
    size: usize,
}

impl Truncatable {
    pub fn new() -> Self {
        Self::of_size(SIZE)
    }

    pub fn of_size(size: usize) -> Self {
        let files = [(); 2].map(|()| {
            let file = File::from(memfd_create("truncatable", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(size as u64).unwrap();
            Arc::new(file.into())
        });
        Self { files, size }
    }

    /// The file behind a BAR.
    pub fn file(&self, bar: usize) -> File {
        self.files[bar].try_clone().unwrap().into()
    }
}

impl Transport for Truncatable {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("truncatable", 2);
        info.resettable = true;
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        if index as usize >= self.files.len() {
            return Err(Error::new(ErrorKind::NotFound, "find", format!("region {index}")));
        }
        Ok(RegionInfo::mappable(self.size as u64))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "read", "it"))
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "write", "it"))
    }

    fn backing(&self, index: u32) -> Result<RegionFile> {
        RegionFile::memory(self.files[index as usize].clone(), 0)
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }
}

/// A device, and the files behind its BARs.
pub fn device() -> (Device, [File; 2]) {
    let transport = Truncatable::new();
    let files = [0, 1].map(|bar| transport.file(bar));
    (Device::new(Arc::new(transport)), files)
}

/// An original, a duplicate and one that was relocated.
pub fn aliases(device: &Device, bar: u32) -> [Window; 3] {
    let original = device.bar(bar).unwrap().map(.., Placement::Anywhere).unwrap();
    let (duplicate, _) = original.duplicate(Placement::Anywhere).unwrap();
    let (mut relocated, _) = original.duplicate(Placement::Anywhere).unwrap();
    relocated.relocate(Placement::Anywhere).unwrap();
    [original, duplicate, relocated]
}

/// Tells threads to stop, also when a test has failed.
pub struct StopAtEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Truncates a file to nothing, or gives it its size again.
pub fn set_there(file: &File, there: bool) {
    file.set_len(if there { SIZE as u64 } else { 0 }).unwrap();
}
