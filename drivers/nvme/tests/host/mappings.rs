//! The driver, where there are 16 mappings and nobody says so, as with libvfio-user.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use vfio_remap::device::DmaBuffer;
use vfio_remap::emulated::nvme::Namespace as Storage;
use vfio_remap::emulated::{Emulated, Nvme};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, RegionFile, RegionInfo, Transport};
use vfio_remap::{Device, Error, ErrorKind, Result};
use vfio_remap_nvme::{Completion, Controller, IoQueue, Namespace, Settings};

const MOST: usize = 16;
const BLOCK: usize = 4096;
const NAMESPACE: u64 = 64 << 20;

const SETTINGS: Settings = Settings::DEFAULT
    // Nothing here is about commands that are late.
    .with_timeout(Duration::from_secs(60))
    .with_admin_timeout(Duration::from_secs(60));

/// A device that accepts so many mappings, and how many there are.
#[derive(Debug)]
struct Few(Emulated, Arc<AtomicUsize>);

impl Transport for Few {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.0.region(index)
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.0.read_at(region, offset, data)
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.0.write_at(region, offset, data)
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        self.0.backing(region)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        let mut limits = self.0.dma_limits()?;
        limits.available_mappings = None;
        Ok(limits)
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        if self.1.fetch_add(1, Ordering::Relaxed) >= MOST {
            self.1.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::new(ErrorKind::Os, "map for DMA", format!("{memory:?}"))
                .with_errno(nix::errno::Errno::EINVAL as i32));
        }
        self.0.dma_map(iova, memory, access).inspect_err(|_| {
            self.1.fetch_sub(1, Ordering::Relaxed);
        })
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.0.dma_unmap(iova, size)?;
        self.1.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }
}

fn controller(settings: Settings) -> (Arc<AtomicUsize>, Arc<Controller>) {
    let storage = Storage::memory(NAMESPACE, BLOCK as u32).unwrap();
    let model = Emulated::new(Nvme::new(vec![storage])).unwrap();
    let mapped = Arc::new(AtomicUsize::new(0));
    let device = Device::new(Arc::new(Few(model, mapped.clone())));
    (mapped, Controller::new(device, settings).unwrap())
}

/// What a run of blocks holds that begins at `block`.
fn mark(block: u64) -> u64 {
    block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Moves all blocks, as many at a time as there are buffers.
fn run(
    queue: &mut IoQueue,
    namespace: &Namespace,
    buffers: &mut Vec<DmaBuffer>,
    submit: impl Fn(&mut IoQueue, u64, DmaBuffer),
    done: impl Fn(u64, &DmaBuffer),
) {
    let mut next = 0;
    loop {
        while next < namespace.block_count()
            && let Some(buffer) = buffers.pop()
        {
            let blocks = (buffer.size() / BLOCK) as u64;
            submit(queue, next, buffer);
            next += blocks;
        }
        let Some(Completion { tag, status, buffer, .. }) = queue.wait() else { break };
        assert!(status.is_success());
        let buffer = buffer.unwrap();
        done(tag, &buffer);
        buffers.push(buffer);
    }
    assert_eq!(next, namespace.block_count());
}

#[test]
fn a_namespace_of_64_mib_is_written_and_read() {
    let (mapped, controller) = controller(SETTINGS);
    let namespace = controller.namespace(1).unwrap();
    let most = controller.identity().max_transfer;
    let mut queue = controller.queue().unwrap();
    let mut buffers: Vec<_> = (0..128).map(|_| controller.buffer(most).unwrap()).collect();
    let write = |queue: &mut IoQueue, block: u64, buffer: DmaBuffer| {
        buffer.store(0, mark(block));
        buffer.store(most - 8, mark(block + 1));
        queue.write(&namespace, block, buffer, block).unwrap();
    };
    run(&mut queue, &namespace, &mut buffers, write, |_, _| {});
    let read = |queue: &mut IoQueue, block: u64, buffer: DmaBuffer| {
        buffer.store(0, 0u64);
        buffer.store(most - 8, 0u64);
        queue.read(&namespace, block, buffer, block).unwrap();
    };
    run(&mut queue, &namespace, &mut buffers, read, |block, buffer| {
        let marks = [buffer.load::<u64>(0), buffer.load::<u64>(most - 8)];
        assert_eq!(marks, [mark(block), mark(block + 1)], "block {block}");
    });
    assert!((2..=MOST).contains(&mapped.load(Ordering::Relaxed)), "{mapped:?}");
    drop((queue, buffers));
    controller.close().unwrap();
    assert_eq!(mapped.load(Ordering::Relaxed), 0);
}

#[test]
fn eight_threads_have_128_commands_each_with_a_buffer_for_each() {
    const THREADS: u64 = 8;
    const DEPTH: u64 = 128;
    let (mapped, controller) = controller(SETTINGS.with_queues(THREADS as u16));
    let namespace = controller.namespace(1).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let controller = &controller;
            scope.spawn(move || {
                let mut queue = controller.queue().unwrap();
                let block = |tag: u64| thread * DEPTH + tag;
                for round in 0..4 {
                    for tag in 0..DEPTH {
                        let buffer = controller.buffer(BLOCK).unwrap();
                        if round % 2 == 0 {
                            buffer.store(8, mark(block(tag)) + round);
                            queue.write(&namespace, block(tag), buffer, tag).unwrap();
                        } else {
                            queue.read(&namespace, block(tag), buffer, tag).unwrap();
                        }
                    }
                    queue.ring();
                    while let Some(Completion { tag, status, buffer, .. }) = queue.wait() {
                        assert!(status.is_success());
                        let found: u64 = buffer.unwrap().load(8);
                        assert_eq!(found, mark(block(tag)) + round / 2 * 2);
                    }
                }
            });
        }
    });
    assert!((1..=MOST).contains(&mapped.load(Ordering::Relaxed)), "{mapped:?}");
    controller.close().unwrap();
    assert_eq!(mapped.load(Ordering::Relaxed), 0);
}
