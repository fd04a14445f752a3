//! A transport that somebody else writes answers all that ours do.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex};

use vfio_remap::device::{Iova, IovaPlacement};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{AffectedDevice, DeviceInfo, DmaLimits, MemoryDevice, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Result, Transport};

/// One of two functions in a slot, whose I/O address space somebody else uses, too.
#[derive(Debug, Default)]
struct Ours(Mutex<BTreeSet<u64>>);

const NEIGHBOUR: PciAddress = PciAddress { domain: 0, bus: 2, device: 0, function: 1 };

impl Transport for Ours {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("ours", 0)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        Err(Error::from_errno(libc::EINVAL, "find", format!("region {index}"))
            .into_kind(ErrorKind::NotFound))
    }

    fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn write_at(&self, region: u32, _: u64, _: &[u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        let mut ours = AffectedDevice::new(PciAddress { function: 0, ..NEIGHBOUR });
        ours.owned = true;
        let mut neighbour = AffectedDevice::new(NEIGHBOUR);
        neighbour.driver = Some("e1000e".to_owned());
        Ok(vec![ours, neighbour])
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0..=0xffff], 4096))
    }

    fn dma_map(&self, iova: u64, _: &DmaMemory, _: Access) -> Result<()> {
        if self.0.lock().unwrap().insert(iova) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::AddressTaken, "map for DMA", format!("{iova:#x}"))
            .with_errno(libc::EEXIST))
    }

    fn dma_unmap(&self, iova: u64, _: u64) -> Result<()> {
        assert!(self.0.lock().unwrap().remove(&iova));
        Ok(())
    }
}

#[test]
fn devices_that_a_hot_reset_affects_are_told_of() {
    let device = Device::new(Arc::new(Ours::default()));
    let affected = device.affected_by_hot_reset().unwrap();
    let names: Vec<_> = affected.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["0000:02:00.0 (no driver)", "0000:02:00.1 (e1000e)"]);
    assert_eq!(affected.iter().map(|device| device.owned).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_device_gives_its_transport_back_by_type() {
    let device = Device::new(Arc::new(Ours::default()));
    let ours = device.transport_as::<Ours>().expect("it is that one");
    ours.0.lock().unwrap().insert(0x5000);
    let again = device.clone();
    assert!(again.transport_as::<Ours>().unwrap().0.lock().unwrap().contains(&0x5000));
    assert!(device.transport_as::<MemoryDevice>().is_none());
}

#[test]
fn errors_have_the_kind_and_the_errno_that_they_were_given() {
    let device = Device::new(Arc::new(Ours::default()));
    let error = device.transport().region(0).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NotFound, Some(libc::EINVAL)));
}

#[test]
fn an_address_that_the_transport_says_is_taken_is_left_out() {
    let transport = Arc::new(Ours::default());
    transport.0.lock().unwrap().extend([0, 0x1000]);
    let space = Device::new(transport.clone()).dma().unwrap();
    let buffer = space.buffer(4096).unwrap();
    assert!(buffer.iova() > Iova(0x1000), "{buffer:?}");
    let at = IovaPlacement::At(Iova(0x1000));
    let error = space.map(buffer.memory(), at, Access::ReadWrite).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::AddressTaken, Some(libc::EEXIST)));
}

/// Whoever has the file of a device cannot make accesses to it fault.
#[test]
fn the_size_of_a_memory_device_is_fixed() {
    let device = MemoryDevice::new(0x2000).unwrap();
    let file = File::from(device.backing(0).unwrap().fd().try_clone_to_owned().unwrap());
    for size in [0, 0x1000, 0x4000] {
        assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
