//! Compares mapping and unmapping for DMA with the same ioctls on the same container, and buffers that share
//! mappings with buffers that have one each.
//!
//! In the lab: `cargo lab bench dma --kernel NAME`. Elsewhere it measures only the crate's own part, with
//! a transport that does nothing.

use std::hint::black_box;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// How many buffers of a page there are at once, and in how many rounds they are allocated and dropped.
const BUFFERS: usize = 1024;
const ROUNDS: usize = 9;

/// How many times less a buffer in a shared mapping costs, in time and in ioctls.
const TIMES: f64 = 20.0;

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
        return if buffers(Nothing) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    };
    let open = || Vfio::options().by_group().open(edu).expect("a group");
    let mut good = buffers(open());
    let device = Device::new(Arc::new(open()));
    let space = device.dma().expect("edu does DMA");
    // Fragments the allocator's free ranges, as in a running driver.
    let own = BufferRequest::new(4096).own_mapping();
    let held: Vec<_> = (0..64).map(|_| space.buffer_with(own).expect("memory")).collect();
    let held: Vec<_> = held.into_iter().enumerate().filter(|(index, _)| index % 2 == 0).collect();
    let container = container().expect("the group's container is open");
    println!("map and unmap\n  {:<22} {:>9} {:>9} {:>9}", "", "ioctls", "crate", "excess");
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

/// Prints what a buffer of a page costs: with a mapping of its own, and in a shared one, the first time and after
/// others were dropped. Returns whether the latter costs so many times less.
fn buffers(transport: impl Transport) -> bool {
    let calls = Arc::new(AtomicU64::new(0));
    let device = Device::new(Arc::new(Counting { inner: transport, calls: calls.clone() }));
    let space = device.dma().expect("it does DMA");
    println!("a buffer of 4 KiB, allocated and dropped, of {BUFFERS} at once");
    // Nanoseconds and ioctls of each.
    let measure = |name: &str, request: BufferRequest| {
        let mut times = Vec::new();
        let before = calls.load(Ordering::Relaxed);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let all = (0..BUFFERS).map(|_| space.buffer_with(request).expect("memory"));
            drop(black_box(all.collect::<Vec<_>>()));
            times.push(start.elapsed().as_nanos() as f64 / BUFFERS as f64);
        }
        let ioctls = (calls.load(Ordering::Relaxed) - before) as f64 / (ROUNDS * BUFFERS) as f64;
        let time = median(times);
        println!("  {name:<34} {time:>7.0} ns {ioctls:>9.4} ioctls");
        (time, ioctls)
    };
    let request = BufferRequest::new(4096);
    let own = measure("with a mapping of its own", request.own_mapping());
    measure("in shared mappings, made each time", request);
    // Keeps the mappings, as a running driver does.
    let kept: Vec<_> = (0..BUFFERS + 1).map(|_| space.buffer(4096).expect("memory")).collect();
    let (_used, kept): (Vec<_>, Vec<_>) =
        kept.into_iter().enumerate().partition(|(index, _)| index % 16 > 0);
    drop(_used);
    let shared = measure("in shared mappings that exist", request);
    drop(kept);
    own.0 >= TIMES * shared.0 && own.1 >= TIMES * shared.1
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

/// Counts the mappings that are made and removed.
#[derive(Debug)]
struct Counting<T> {
    inner: T,
    calls: Arc<AtomicU64>,
}

impl<T: Transport> Transport for Counting<T> {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.inner.region(index)
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.inner.read_at(region, offset, data)
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.inner.write_at(region, offset, data)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        self.inner.dma_limits()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.inner.dma_map(iova, memory, access)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.inner.dma_unmap(iova, size)
    }
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
