//! A window that cannot be restored is no sign that the controller is gone.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::emulated::Emulated;
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{
    AddressSpaceId, DeviceInfo, DmaLimits, IrqInfo, RegionFile, RegionInfo, Transport,
};
use vfio_remap::{Device, ErrorKind, Placement, Result};
use vfio_remap_nvme::{Completion, Controller, Settings, Status};

use crate::scripted::{HONEST, ScriptedController};

const SETTINGS: Settings = Settings::DEFAULT
    .with_queues(2)
    .with_entries(32)
    .with_timeout(Duration::from_secs(60))
    .with_admin_timeout(Duration::from_secs(60));

/// A BAR that is a file of its own, in addition to the controller's.
const EXTRA: u32 = 2;
const EXTRA_SIZE: u64 = 4096;

/// A controller with another BAR, whose file a test truncates.
#[derive(Debug)]
struct WithExtraBar {
    controller: Emulated,
    file: Arc<OwnedFd>,
}

impl Transport for WithExtraBar {
    fn info(&self) -> DeviceInfo {
        self.controller.info()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match index {
            EXTRA => Ok(RegionInfo::mappable(EXTRA_SIZE)),
            _ => self.controller.region(index),
        }
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.controller.read_at(region, offset, data)
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.controller.write_at(region, offset, data)
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        match region {
            EXTRA => RegionFile::memory(self.file.clone(), 0),
            _ => self.controller.backing(region),
        }
    }

    fn reset(&self) -> Result<()> {
        self.controller.reset()
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.controller.irq(index)
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        self.controller.set_irqs(index, start, fds)
    }

    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        self.controller.mask_irqs(index, vectors, masked)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        self.controller.dma_limits()
    }

    fn address_space(&self) -> Option<AddressSpaceId> {
        self.controller.address_space()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.controller.dma_map(iova, memory, access)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.controller.dma_unmap(iova, size)
    }
}

#[test]
fn a_lost_window_returns_no_buffers_of_a_live_controller() {
    let script = Arc::new(Mutex::new(HONEST));
    let file = File::from(memfd_create("extra", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(EXTRA_SIZE).unwrap();
    let model = Emulated::new(ScriptedController::new(&script, &Arc::default())).unwrap();
    let transport = WithExtraBar {
        controller: model.clone(),
        file: Arc::new(file.try_clone().unwrap().into()),
    };
    let device = Device::new(Arc::new(transport));
    let extra = device.region(EXTRA).unwrap().map(.., Placement::Anywhere).unwrap();
    let controller = Controller::new(device, SETTINGS).unwrap();
    let namespace = controller.namespace(1).unwrap();
    let mut queue = controller.queue().unwrap();
    let buffer = controller.buffer(4096).unwrap();
    let iova = buffer.iova();
    // The model has no I/O queues, and never answers.
    queue.read(&namespace, 0, buffer, 5).unwrap();
    extra.revoke().unwrap();
    file.set_len(0).unwrap();
    let error = controller.reset().unwrap_err();
    // As if the device were gone, which it is not.
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    let mut enabled = [0; 4];
    model.read_at(0, 0x14, &mut enabled).unwrap();
    assert_eq!(enabled[0] & 1, 1, "it is alive");
    let Completion { status, buffer, .. } = queue.wait().unwrap();
    assert_eq!((status, buffer.is_none()), (Status::ABORTED_BY_HOST, true), "it may write there");
    let buffers = || (0..64).map(|_| controller.buffer(4096).unwrap()).collect::<Vec<_>>();
    let reused = || buffers().iter().any(|buffer| buffer.iova() == iova);
    assert!(!reused(), "the controller may still write there");
    file.set_len(EXTRA_SIZE).unwrap();
    controller.reset().unwrap();
    // The queue notices.
    queue.read(&namespace, 0, controller.buffer(4096).unwrap(), 7).unwrap();
    assert!(reused(), "nothing is lost for good");
    drop(queue);
    // Nor does it keep a drop from making it quiet: the window is lost, and bus mastering can be switched off.
    extra.revoke().unwrap();
    file.set_len(0).unwrap();
    drop(controller);
    let mut command = [0; 2];
    model.read_at(7, 4, &mut command).unwrap();
    assert_eq!(command[0] & 4, 0, "it may still start accesses");
    model.read_at(0, 0x14, &mut enabled).unwrap();
    assert_eq!(enabled[0] & 1, 0, "its own registers can be reached");
}
