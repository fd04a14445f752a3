//! How the driver reaches the controller's registers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vfio_remap::emulated::Emulated;
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, RegionFile, RegionInfo, Transport};
use vfio_remap::{Device, Result};
use vfio_remap_nvme::{Controller, Settings};

use crate::scripted::{HONEST, Script, ScriptedController};

/// A device, and how often registers were read and written by calls of its transport.
#[derive(Debug)]
struct Counting(Emulated, Arc<AtomicUsize>);

impl Counting {
    fn count(&self, region: u32) {
        if region == 0 {
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Transport for Counting {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.0.region(index)
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.count(region);
        self.0.read_at(region, offset, data)
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.count(region);
        self.0.write_at(region, offset, data)
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        self.0.backing(region)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        self.0.dma_limits()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.0.dma_map(iova, memory, access)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.0.dma_unmap(iova, size)
    }
}

/// Calls for registers, from opening to closing.
fn calls(script: Script) -> usize {
    let calls = Arc::new(AtomicUsize::new(0));
    let model =
        Emulated::new(ScriptedController::new(&Arc::new(Mutex::new(script)), &Arc::default()))
            .unwrap();
    let device = Device::new(Arc::new(Counting(model, calls.clone())));
    let controller = Controller::new(device, Settings::DEFAULT).unwrap();
    assert_eq!(controller.version().unwrap(), "1.4");
    assert_eq!(controller.namespaces().unwrap(), [1]);
    controller.reset().unwrap();
    drop(controller.queue().unwrap());
    controller.close().unwrap();
    calls.load(Ordering::Relaxed)
}

#[test]
fn mapped_registers_are_reached_without_calls() {
    assert_eq!(calls(Script { mapped: true, ..HONEST }), 0);
    assert!(calls(HONEST) > 20, "trapped ones are reached by calls");
}
