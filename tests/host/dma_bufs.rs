//! Windows of a device that makes dma-bufs, mapped for the DMA of one that maps nothing else of a device's.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use vfio_remap::device::{Iova, IovaPlacement};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{
    DeviceInfo, DmaLimits, MappedBy, MemoryDevice, RegionFile, RegionInfo, Transport,
};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result};

use crate::support::without_regions::without_regions;

const SIZE: u64 = 0x4000;

/// A device with a BAR, which makes dma-bufs of it.
#[derive(Debug)]
struct Target {
    bar: Arc<OwnedFd>,
    /// Region, range and access of each dma-buf.
    made: Mutex<Vec<(u32, std::ops::Range<u64>, Access)>>,
    makes_none: bool,
}

impl Target {
    fn new(makes_none: bool) -> Arc<Self> {
        let bar = File::from(memfd_create("bar", MFdFlags::MFD_CLOEXEC).unwrap());
        bar.set_len(SIZE).unwrap();
        Arc::new(Self { bar: Arc::new(bar.into()), made: Mutex::default(), makes_none })
    }

    fn made(&self) -> Vec<(u32, std::ops::Range<u64>, Access)> {
        std::mem::take(&mut self.made.lock().unwrap())
    }
}

impl Transport for Target {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("target", 3);
        info.resettable = true;
        info
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::mappable(SIZE))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        // SAFETY: the file is the test's, and nothing relies on what is in it.
        Ok(unsafe { RegionFile::device(self.bar.clone(), 0) })
    }

    fn dma_buf(&self, region: u32, range: std::ops::Range<u64>, access: Access) -> Result<OwnedFd> {
        if self.makes_none {
            return Err(Error::new(ErrorKind::Unsupported, "make a dma-buf of", "target"));
        }
        self.made.lock().unwrap().push((region, range, access));
        Ok(memfd_create("dma-buf", MFdFlags::MFD_CLOEXEC).unwrap())
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }
}

/// Maps a device's memory by its dma-buf, as iommufd does.
#[derive(Debug, Default)]
struct Peer {
    /// The inodes of the dma-bufs that were mapped.
    mapped: Mutex<Vec<u64>>,
}

impl Transport for Peer {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("peer", 0)
    }

    without_regions!();

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0..=0xf_ffff], 4096))
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.dma_map_named(iova, memory, access).map(drop)
    }

    fn dma_map_named(
        &self,
        _: u64,
        memory: &DmaMemory,
        access: Access,
    ) -> Result<Option<MappedBy>> {
        let Some(dma_buf) = memory.dma_buf(access) else { return Ok(Some(MappedBy::Address)) };
        self.mapped.lock().unwrap().push(fstat(dma_buf?.as_fd()).unwrap().st_ino);
        Ok(Some(MappedBy::DmaBuf))
    }

    fn dma_unmap(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

const HERE: IovaPlacement = IovaPlacement::At(Iova(0x4000));

#[test]
fn each_mapping_of_a_window_has_a_dma_buf_of_its_own() {
    let (target, peer) = (Target::new(false), Arc::new(Peer::default()));
    let device = Device::new(target.clone());
    let space = Device::new(peer.clone()).dma().unwrap();
    // Whole pages, wherever the window begins and ends.
    let mut window = device.bar(2).unwrap().map(0x1800..0x2010, Placement::Anywhere).unwrap();
    window.relocate(Placement::Anywhere).unwrap();
    let pages = (2, 0x1000..0x3000, Access::ReadWrite);
    let mapping = space.map(window.dma_memory(), HERE, Access::ReadWrite).unwrap();
    assert_eq!((mapping.mapped_by(), mapping.size()), (Some(MappedBy::DmaBuf), 0x2000));
    assert_eq!(target.made(), std::slice::from_ref(&pages));
    // What a reset has revoked is not mapped again.
    for _ in 0..2 {
        assert!(device.reset().unwrap().is_over());
        assert_eq!(target.made(), std::slice::from_ref(&pages));
    }
    let mut inodes = peer.mapped.lock().unwrap().clone();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), 3, "each is a new one");
    drop(mapping);
    drop(window.dma_buf().unwrap());
    assert_eq!(target.made(), [pages]);
}

#[test]
fn a_window_that_is_only_read_has_no_dma_buf_to_write() {
    let (target, peer) = (Target::new(false), Arc::new(Peer::default()));
    let device = Device::new(target.clone());
    let space = Device::new(peer.clone()).dma().unwrap();
    let bar = device.bar(0).unwrap();
    let window = bar.map(.., Placement::Anywhere).unwrap();
    let (copy, _) = window.duplicate_read_only(Placement::Anywhere).unwrap();
    let error = space.map(copy.dma_memory(), HERE, Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    assert!(error.advice().contains("Access::ReadOnly"), "{error}");
    assert_eq!((target.made(), space.mapping_count()), (vec![], 0));
    drop(space.map(copy.dma_memory(), HERE, Access::ReadOnly).unwrap());
    drop(copy.dma_buf().unwrap());
    let read_only = (0, 0..SIZE, Access::ReadOnly);
    assert_eq!(target.made(), [read_only.clone(), read_only]);
}

#[test]
fn memory_without_a_dma_buf_says_so_or_needs_none() {
    let peer = Arc::new(Peer::default());
    let space = Device::new(peer.clone()).dma().unwrap();
    // The transport makes none.
    let device = Device::new(Target::new(true));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    assert_eq!(window.dma_buf().unwrap_err().kind(), ErrorKind::Unsupported);
    let error = space.map(window.dma_memory(), HERE, Access::ReadOnly).unwrap_err();
    assert_eq!((error.kind(), space.mapping_count()), (ErrorKind::Unsupported, 0), "{error}");
    // Memory of a file is mapped as memory is.
    let device = Device::new(Arc::new(MemoryDevice::new(0x1000).unwrap()));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let mapping = space.map(window.dma_memory(), HERE, Access::ReadWrite).unwrap();
    assert_eq!(mapping.mapped_by(), Some(MappedBy::Address));
    assert_eq!(window.dma_buf().unwrap_err().kind(), ErrorKind::Unsupported);
}
