//! PCI devices that are odd: MSI-X where a BAR has nothing else, and a configuration space that has gone.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::device::{BarKind, Trap};
use vfio_remap::transport::{DeviceInfo, RegionFile, RegionInfo};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Transport};

const CONFIG: u32 = 7;

/// A device of one BAR, a memory file, with MSI-X in it.
#[derive(Debug)]
struct Pci {
    /// `None` once the device has gone.
    config: Mutex<Option<[u8; 256]>>,
    /// What was written to configuration space, and where.
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    bar: RegionInfo,
    file: Arc<OwnedFd>,
}

impl Pci {
    /// BAR 0 of `size` bytes, with the MSI-X table, 64 vectors, at its offset `table`, and the pending bits
    /// right after that. Its file has `file` bytes.
    fn new(size: u64, table: u32, file: u64) -> Arc<Self> {
        let mut config = [0; 256];
        let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        set(0x00, &[0xf4, 0x1a, 0x41, 0x10]);
        set(0x06, &[0x10, 0]);
        set(0x34, &[0x40]);
        set(0x40, &[0x11, 0x60, 63, 0]);
        set(0x44, &table.to_le_bytes());
        set(0x48, &(table + 64 * 16).to_le_bytes());
        set(0x60, &[0x10, 0, 2, 0]);
        let mut bar = RegionInfo::mappable(size);
        bar.msix_mappable = true;
        let fd = memfd_create("vfio-remap-test-bar", MFdFlags::MFD_CLOEXEC).unwrap();
        File::from(fd.try_clone().unwrap()).set_len(file).unwrap();
        let (config, written) = (Mutex::new(Some(config)), Mutex::default());
        Arc::new(Self { config, written, bar, file: Arc::new(fd) })
    }

    fn pull(&self) {
        *self.config.lock().unwrap() = None;
    }
}

impl Transport for Pci {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("0000:00:03.0", 9);
        info.pci = true;
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match index {
            0 => Ok(self.bar.clone()),
            CONFIG => Ok(RegionInfo::trapped(256)),
            _ => Err(Error::new(ErrorKind::NotFound, "find", format!("region {index}"))),
        }
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        assert_eq!(region, CONFIG);
        let at = offset as usize;
        match &*self.config.lock().unwrap() {
            Some(config) => data.copy_from_slice(&config[at..at + data.len()]),
            None => data.fill(0xff),
        }
        Ok(())
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        assert_eq!(region, CONFIG);
        self.written.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }

    fn backing(&self, _: u32) -> Result<RegionFile> {
        RegionFile::memory(self.file.clone(), 0)
    }
}

/// Every 4 KiB BAR that is there for MSI-X alone, as virtio devices have one.
#[test]
fn a_bar_that_msix_fills_is_mapped_with_its_table() {
    let device = Device::new(Pci::new(0x1000, 0, 0x1000));
    let bar = device.bar(0).unwrap();
    assert_eq!(bar.layout().spans()[0].trap, Some(Trap::MsixTable));
    assert_eq!(bar.map(.., Placement::Anywhere).unwrap_err().kind(), ErrorKind::NotMappable);
    let bar = bar.with_msix_table().unwrap();
    assert_eq!(bar.layout().mappable().collect::<Vec<_>>(), [0..0x1000]);
    assert!(bar.backing_kind().is_some());
    let window = bar.map(.., Placement::Anywhere).unwrap();
    window.register::<u32>(0xffc).unwrap().write(7);
    assert_eq!(window.register::<u32>(0xffc).unwrap().read(), 7);
}

#[test]
fn a_table_past_the_end_of_the_file_is_an_error_at_once() {
    let device = Device::new(Pci::new(0x4000, 0x3000, 0x3000));
    let bar = device.bar(0).unwrap();
    bar.map(.., Placement::Anywhere).unwrap_err();
    drop(bar.map(0..0x3000, Placement::Anywhere).unwrap());
    let error = bar.with_msix_table().map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    assert!(error.to_string().contains("its file has 0x3000"), "{error}");
}

#[test]
fn windows_with_and_without_the_table_show_the_same_bytes() {
    let device = Device::new(Pci::new(0x4000, 0x2000, 0x4000));
    let bar = device.bar(0).unwrap();
    let head = bar.map(0..0x2000, Placement::Anywhere).unwrap();
    let with_table = bar.with_msix_table().unwrap();
    let all = with_table.map(.., Placement::Anywhere).unwrap();
    all.register::<u32>(0x1000).unwrap().write(7);
    assert_eq!(head.register::<u32>(0x1000).unwrap().read(), 7);
    assert_eq!(bar.map(.., Placement::Anywhere).unwrap_err().kind(), ErrorKind::NotMappable);
}

#[test]
fn io_ports_are_not_mapped_with_a_table_either() {
    let pci = Pci::new(0x1000, 0, 0x1000);
    if let Some(config) = &mut *pci.config.lock().unwrap() {
        config[0x10] = 1;
    }
    let device = Device::new(pci);
    let bar = device.bar(0).unwrap().with_msix_table().unwrap();
    assert_eq!(bar.layout().spans()[0].trap, Some(Trap::IoPorts));
    assert_eq!(bar.map(.., Placement::Anywhere).unwrap_err().kind(), ErrorKind::NotMappable);
}

#[test]
fn the_register_of_a_bar_says_of_what_kind_it_is() {
    let pci = Pci::new(0x1000, 0, 0x1000);
    if let Some(config) = &mut *pci.config.lock().unwrap() {
        // 64-bit prefetchable, its upper half, which looks like ports; 32-bit prefetchable; ports; 32-bit; 64-bit,
        // of which the upper half would be past the last.
        let bars = [0xcu32, 1, 8, 1, 0xfe00_0000, 4];
        for (register, value) in config[0x10..0x28].chunks_exact_mut(4).zip(bars) {
            register.copy_from_slice(&value.to_le_bytes());
        }
    }
    let device = Device::new(pci.clone());
    let config = device.config().unwrap();
    let kinds: Vec<_> = (0..6)
        .map(|index| match config.bar_kind(index).unwrap() {
            Some(BarKind::Memory { is_64_bit, prefetchable, .. }) => {
                format!("{} {prefetchable}", if is_64_bit { 64 } else { 32 })
            }
            Some(BarKind::Io) => "ports".to_owned(),
            _ => "none".to_owned(),
        })
        .collect();
    assert_eq!(kinds, ["64 true", "none", "32 true", "ports", "32 false", "64 false"]);
    assert_eq!(config.bar_kind(6).unwrap_err().kind(), ErrorKind::NotFound);
    pci.pull();
    assert_eq!(config.bar_kind(3).unwrap_err().kind(), ErrorKind::Gone);
}

#[test]
fn the_places_of_msix_are_public() {
    let device = Device::new(Pci::new(0x4000, 0x2000, 0x4000));
    let msix = device.config().unwrap().msix().unwrap().unwrap();
    assert_eq!(msix.count, 64);
    assert_eq!((msix.table, msix.pending), ((0, 0x2000..0x2400), (0, 0x2400..0x2408)));
}

#[test]
fn bytes_are_read_and_written_by_slices() {
    let pci = Pci::new(0x4000, 0x2000, 0x4000);
    let device = Device::new(pci.clone());
    let mut bytes = [0; 6];
    device.config().unwrap().read(0x42, &mut bytes).unwrap();
    assert_eq!(bytes, [63, 0, 0, 0x20, 0, 0]);
    device.config().unwrap().write(0x43, &[1, 2, 3]).unwrap();
    let config = device.region(7).unwrap();
    config.read_at(0xfc, &mut bytes[..4]).unwrap();
    config.write_at(0xfe, &[4, 5]).unwrap();
    assert_eq!(*pci.written.lock().unwrap(), [(0x43, vec![1, 2, 3]), (0xfe, vec![4, 5])]);
    for (offset, len) in [(0xfd, 4), (u64::MAX, 1), (0x100, 1)] {
        let error = config.read_at(offset, &mut bytes[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        let error = config.write_at(offset, &bytes[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    }
    assert_eq!(pci.written.lock().unwrap().len(), 2, "nothing else is written");
}

#[test]
fn a_device_that_has_gone_is_not_one_with_io_ports() {
    let pci = Pci::new(0x4000, 0x2000, 0x4000);
    let device = Device::new(pci.clone());
    let config = device.config().unwrap();
    assert_eq!(config.capability(0x10).unwrap().unwrap().offset, 0x60);
    pci.pull();
    let gone = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert!(error.to_string().contains("reads all ones"), "{error}");
        assert!(!error.advice().is_empty(), "{error}");
    };
    gone(device.bar(0).map(drop).unwrap_err());
    gone(config.capability(0x10).map(drop).unwrap_err());
    gone(config.memory_decoding().map(drop).unwrap_err());
    gone(config.bus_mastering().map(drop).unwrap_err());
    gone(config.set_memory_decoding(true).unwrap_err());
    gone(config.set_bus_mastering(false).unwrap_err());
    gone(config.set_error_reporting(true).unwrap_err());
    assert_eq!(*pci.written.lock().unwrap(), [], "nothing is written to what has gone");
    // What programs ask for by its offset they get as it is.
    assert_eq!((config.vendor_id().unwrap(), config.read_u32(4).unwrap()), (u16::MAX, u32::MAX));
}

/// A register of all ones by itself: the device goes between one read and the next.
#[test]
fn a_device_that_goes_meanwhile_is_gone_wherever_it_is_seen() {
    const REGISTERS: [(u64, usize); 6] =
        [(0x06, 2), (0x10, 4), (0x40, 2), (0x42, 2), (0x44, 4), (0x48, 4)];
    for (at, len) in REGISTERS {
        let pci = Pci::new(0x4000, 0x2000, 0x4000);
        if let Some(config) = &mut *pci.config.lock().unwrap() {
            config[at as usize..][..len].fill(0xff);
        }
        let error = Device::new(pci).bar(0).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{at:#x}: {error}");
    }
    let pci = Pci::new(0x4000, 0x2000, 0x4000);
    if let Some(config) = &mut *pci.config.lock().unwrap() {
        config[0x68..0x6a].fill(0xff);
    }
    let device = Device::new(pci);
    let error = device.config().unwrap().set_error_reporting(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}
