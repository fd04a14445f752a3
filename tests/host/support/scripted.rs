//! A transport that maps for DMA what it is told to, and remembers it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::stat::fstat;
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{AddressSpaceId, DeviceInfo, DmaLimits, Transport};
use vfio_remap::{Error, ErrorKind, Result};

use super::without_regions::without_regions;

/// Inode and offset.
pub type FilePart = (u64, u64);

/// It maps below and above the addresses of interrupts, and answers as the script says.
#[derive(Debug, Default)]
pub struct Scripted {
    /// By IOVA: size, and the file that came along.
    pub mapped: Mutex<BTreeMap<u64, (u64, Option<FilePart>)>>,
    /// Answers to the next unmaps, last first; none is success.
    pub unmaps: Mutex<Vec<Option<Error>>>,
    /// What it says of its limits, if not what is above.
    pub limits: Option<DmaLimits>,
    /// The address space that it is in, if not in one of its own.
    pub space: Option<AddressSpaceId>,
    /// What somebody else has mapped, and how often that was in the way.
    pub neighbours: Vec<RangeInclusive<u64>>,
    pub refused: AtomicUsize,
    /// Where it maps memory for the device, where nothing translates; at the key otherwise.
    pub physical: Option<u64>,
}

impl Scripted {
    pub fn with_limits(limits: DmaLimits) -> Self {
        Self { limits: Some(limits), ..Self::default() }
    }

    /// What is mapped: address and size.
    pub fn mapped(&self) -> Vec<(u64, u64)> {
        self.mapped.lock().unwrap().iter().map(|(iova, (size, _))| (*iova, *size)).collect()
    }

    /// The files that came along, in the order of addresses.
    pub fn files(&self) -> Vec<Option<FilePart>> {
        self.mapped.lock().unwrap().values().map(|(_, file)| *file).collect()
    }
}

impl Transport for Scripted {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("scripted", 0)
    }

    without_regions!();

    fn dma_limits(&self) -> Result<DmaLimits> {
        let usual = || DmaLimits::new(vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1], 4096);
        Ok(self.limits.clone().unwrap_or_else(usual))
    }

    fn address_space(&self) -> Option<AddressSpaceId> {
        self.space
    }

    fn dma_address(&self, iova: u64, _: u64) -> Result<u64> {
        Ok(self.physical.unwrap_or(iova))
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, _: Access) -> Result<()> {
        let end = iova + (memory.size() as u64 - 1);
        if self.neighbours.iter().any(|range| *range.start() <= end && iova <= *range.end()) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let object = format!("{iova:#x}");
            return Err(
                Error::new(ErrorKind::AddressTaken, "map for DMA", object).with_errno(libc::EEXIST)
            );
        }
        let file = memory.file().map(|(fd, offset)| (fstat(fd).unwrap().st_ino, offset));
        self.mapped.lock().unwrap().insert(iova, (memory.size() as u64, file));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, _: u64) -> Result<()> {
        if let Some(Some(error)) = self.unmaps.lock().unwrap().pop() {
            return Err(error);
        }
        self.mapped.lock().unwrap().remove(&iova);
        Ok(())
    }
}
