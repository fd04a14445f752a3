//! A transport that has few mappings.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::DmaBuffer;
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, Transport};
use vfio_remap::{Error, ErrorKind, Result};

use super::without_regions::without_regions;

/// What libvfio-user accepts, unless it is built otherwise.
pub const MOST: usize = 16;
/// A transport that accepts so many mappings, and answers the next by EINVAL, as libvfio-user does.
#[derive(Debug)]
pub struct Few {
    pub most: usize,
    /// A mapping of more bytes is refused, with this kind.
    pub largest: AtomicUsize,
    pub refusal: ErrorKind,
    pub limits: DmaLimits,
    /// How many more bytes it locks; all that there are, if this is `u64::MAX`.
    pub lockable: AtomicU64,
    /// What somebody else has mapped.
    pub neighbours: RangeInclusive<u64>,
    pub mapped: Mutex<BTreeMap<u64, u64>>,
    /// How often it was asked for a mapping.
    pub asked: AtomicUsize,
    /// Whether it waits for a second question before it answers the first.
    pub waits: bool,
}

impl Default for Few {
    fn default() -> Self {
        Self {
            most: MOST,
            largest: AtomicUsize::new(usize::MAX),
            refusal: ErrorKind::LockedMemory,
            limits: DmaLimits::new(vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1], 4096),
            lockable: AtomicU64::new(u64::MAX),
            neighbours: 0..=0,
            mapped: Mutex::default(),
            asked: AtomicUsize::new(0),
            waits: false,
        }
    }
}

impl Few {
    pub fn with_limits(change: impl FnOnce(&mut DmaLimits)) -> Self {
        let mut few = Self::default();
        change(&mut few.limits);
        few
    }

    pub fn sizes(&self) -> Vec<u64> {
        self.mapped.lock().unwrap().values().copied().collect()
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    pub fn largest(&self, size: usize) {
        self.largest.store(size, Ordering::Relaxed);
    }

    /// Whether the device reaches all of a buffer, by one mapping.
    pub fn reaches(&self, buffer: &DmaBuffer) -> bool {
        let (start, size) = (buffer.iova().0, buffer.size() as u64);
        let mapped = self.mapped.lock().unwrap();
        let before = mapped.range(..=start).next_back();
        before.is_some_and(|(first, all)| start - first + size <= *all)
    }
}

impl Transport for Few {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("few mappings", 0)
    }

    without_regions!();

    fn dma_limits(&self) -> Result<DmaLimits> {
        let mut limits = self.limits.clone();
        limits.lockable_bytes =
            Some(self.lockable.load(Ordering::Relaxed)).filter(|bytes| *bytes != u64::MAX);
        Ok(limits)
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, _: Access) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        // In vain, where all is well.
        let start = Instant::now();
        while self.waits && self.asked() == 1 && start.elapsed() < Duration::from_millis(300) {
            std::thread::yield_now();
        }
        let refuse = |kind| Err(Error::new(kind, "map for DMA", format!("{memory:?}")));
        let mut mapped = self.mapped.lock().unwrap();
        if mapped.len() == self.most {
            return refuse(ErrorKind::Os);
        }
        let size = memory.size() as u64;
        if iova <= *self.neighbours.end() && *self.neighbours.start() <= iova + (size - 1) {
            return refuse(ErrorKind::AddressTaken);
        }
        let lockable = self.lockable.load(Ordering::Relaxed);
        if memory.size() > self.largest.load(Ordering::Relaxed) || size > lockable {
            return refuse(self.refusal);
        }
        if lockable != u64::MAX {
            self.lockable.store(lockable - size, Ordering::Relaxed);
        }
        mapped.insert(iova, size);
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        assert_eq!(self.mapped.lock().unwrap().remove(&iova), Some(size));
        if self.lockable.load(Ordering::Relaxed) != u64::MAX {
            self.lockable.fetch_add(size, Ordering::Relaxed);
        }
        Ok(())
    }
}
