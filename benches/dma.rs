//! Compares mapping and unmapping for DMA with the same ioctls on the same container.
//!
//! In the lab: `cargo lab bench dma --kernel NAME`. Elsewhere it measures only the crate's own part, with
//! a transport that does nothing.

use std::hint::black_box;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vfio_remap::device::{BufferRequest, DmaSpace, Iova, IovaPlacement};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, RegionInfo, Transport, Vfio};
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Result};

/// Calls in a batch. Short batches are disturbed less often.
const BATCH: usize = 10;

/// Sizes in KiB, and the count of pairs of batches for each. Each size takes some seconds.
const SIZES: [(usize, usize); 3] = [(4, 4000), (64, 1000), (2048, 100)];

/// The share of additional time that the crate may take.
const SHARE: f64 = 0.05;

fn main() -> ExitCode {
    let Some(edu) = lab_device("edu") else {
        let space = Device::new(Arc::new(Nothing)).dma().expect("it maps");
        let memory = memory(&space, 4096);
        row(
            "the crate alone",
            SIZES[0].1,
            || {},
            || through(&space, &memory, IovaPlacement::default()),
        );
        return ExitCode::SUCCESS;
    };
    let device = Device::new(Arc::new(Vfio::options().by_group().open(edu).expect("a group")));
    let space = device.dma().expect("edu does DMA");
    // Fragments the allocator's free ranges, as in a running driver.
    let own = BufferRequest::new(4096).own_mapping();
    let held: Vec<_> = (0..64).map(|_| space.buffer_with(own).expect("memory")).collect();
    let held: Vec<_> = held.into_iter().enumerate().filter(|(index, _)| index % 2 == 0).collect();
    let container = container().expect("the group's container is open");
    println!("map and unmap\n  {:<22} {:>9} {:>9} {:>9}", "", "ioctls", "crate", "excess");
    let mut good = true;
    for (kib, pairs) in SIZES {
        let memory = memory(&space, kib << 10);
        // Both sides map at the same address alternately: whether the IOMMU's tables exist already makes
        // more difference than the crate.
        let place = space.map(memory.clone(), IovaPlacement::default(), Access::ReadWrite);
        let iova = place.expect("a mapping").iova();
        let by_hand = || by_hand(container, &memory, iova);
        good &= row(&format!("{kib} KiB, anywhere"), pairs, by_hand, || {
            through(&space, &memory, IovaPlacement::default())
        });
        good &= row(&format!("{kib} KiB, fixed"), pairs, by_hand, || {
            through(&space, &memory, IovaPlacement::At(iova))
        });
    }
    drop((held, space));
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Memory of a buffer with a mapping of its own.
fn memory(space: &DmaSpace, size: usize) -> DmaMemory {
    space.buffer_with(BufferRequest::new(size).own_mapping()).expect("memory").memory()
}

fn lab_device(name: &str) -> Option<PciAddress> {
    let devices = std::env::var("LAB_DEVICES").ok()?;
    let address = devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))?;
    address.parse().ok()
}

/// Prints one line: the medians of alternating batches, and the median difference of the pairs. Returns
/// whether the difference is within the limit.
fn row(name: &str, count: usize, mut by_hand: impl FnMut(), mut by_library: impl FnMut()) -> bool {
    let batch = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        for _ in 0..BATCH {
            f();
        }
        start.elapsed().as_nanos() as f64 / BATCH as f64
    };
    let mut pairs = Vec::new();
    // The first pairs are a warm-up.
    for pair in 0..count + count / 4 {
        // Each side is first in every second pair, so that neither has an advantage.
        let (by_hand, by_library) = if pair % 2 == 0 {
            (batch(&mut by_hand), batch(&mut by_library))
        } else {
            let by_library = batch(&mut by_library);
            (batch(&mut by_hand), by_library)
        };
        if pair >= count / 4 {
            pairs.push((by_hand, by_library));
        }
    }
    let hand = median(pairs.iter().map(|(by_hand, _)| *by_hand).collect());
    let library = median(pairs.iter().map(|(_, by_library)| *by_library).collect());
    let over = median(pairs.iter().map(|(by_hand, by_library)| by_library - by_hand).collect());
    let share = 100.0 * over / hand;
    println!("  {name:<22} {hand:>6.0} ns {library:>6.0} ns {over:>6.0} ns {share:>5.1} %");
    over <= hand * SHARE
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn through(space: &DmaSpace, memory: &DmaMemory, placement: IovaPlacement) {
    drop(black_box(space.map(memory.clone(), placement, Access::ReadWrite).expect("a mapping")));
}

/// The crate's descriptor of the container, which it does not expose.
fn container() -> Option<RawFd> {
    std::fs::read_dir("/proc/self/fd").ok()?.flatten().find_map(|entry| {
        let is_container = std::fs::read_link(entry.path()).ok()?.ends_with("vfio/vfio");
        is_container.then(|| entry.file_name().to_str()?.parse().ok())?
    })
}

fn by_hand(container: RawFd, memory: &DmaMemory, iova: Iova) {
    let mut map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: memory.address() as u64,
        iova: iova.0,
        size: memory.size() as u64,
    };
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
        iova: map.iova,
        size: map.size,
        ..Default::default()
    };
    let request = |number: u32| nix::request_code_none!(VFIO_TYPE, VFIO_BASE + number);
    // SAFETY: each structure is as long as its argsz says, and the memory outlives the mapping.
    let done = unsafe {
        [
            libc::ioctl(container, request(13), &raw mut map),
            libc::ioctl(container, request(14), &raw mut unmap),
        ]
    };
    assert_eq!((done, unmap.size), ([0, 0], map.size));
}

/// Accepts all mappings and does nothing.
#[derive(Debug)]
struct Nothing;

impl Transport for Nothing {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("nothing", 0)
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Err(Error::new(ErrorKind::NotFound, "find", "a region of nothing"))
    }

    fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn write_at(&self, region: u32, _: u64, _: &[u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 48) - 1], 4096))
    }

    fn dma_map(&self, _: u64, _: &DmaMemory, _: Access) -> Result<()> {
        Ok(())
    }

    fn dma_unmap(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}
