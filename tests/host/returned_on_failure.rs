//! What a failed call consumed comes back with the error, and `?` takes the error alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::{fs, io};

use vfio_remap::device::{BufferFailed, DmaArray, StillInUse, StillMapped};
use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::space::Failed;
use vfio_remap::transport::{MemoryDevice, PciDevice, StillBound, Sysfs};
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Placement, Reservation, Result, Window};

#[test]
fn a_window_in_use_comes_back_as_it_was() {
    let device = Device::new(Arc::new(MemoryDevice::new(0x2000).unwrap()));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let addresses = window.addresses();
    let register = window.register::<u32>(0).unwrap();

    let still = window.into_reservation().unwrap_err();
    assert_eq!(still.error().kind(), ErrorKind::InUse, "{still}");
    assert_eq!(still.to_string(), still.error().to_string());
    let (error, window) = still.into_parts();
    assert_eq!(error.kind(), ErrorKind::InUse);
    let still = window.expect("it is mapped").into_reservation().unwrap_err();
    let window = still.into_window().expect("it is mapped");
    assert_eq!(window.addresses(), addresses);
    register.write(7);
    assert_eq!(window.register::<u32>(0).unwrap().read(), 7);

    fn unmap(window: Window) -> Result<Reservation> {
        Ok(window.into_reservation()?)
    }
    assert_eq!(unmap(window.clone()).unwrap_err().kind(), ErrorKind::InUse);
    drop(register);
    assert_eq!(unmap(window).unwrap().range(), addresses);
}

/// What sysfs shows of one device without a driver, and of vfio-pci: files that take what is written.
struct Tree(PathBuf);

impl Tree {
    const DEVICE: &str = "0000:00:03.0";

    fn new() -> Self {
        let root = std::env::temp_dir().join(format!("vfio-remap-bind-{}", std::process::id()));
        let tree = Self(root);
        for directory in [tree.device(), tree.0.join("bus/pci/drivers/vfio-pci")] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(tree.0.join("bus/pci/drivers/vfio-pci/bind"), "").unwrap();
        tree.set_override("(null)\n");
        tree
    }

    fn device(&self) -> PathBuf {
        self.0.join("bus/pci/devices").join(Self::DEVICE)
    }

    fn set_override(&self, driver: &str) {
        fs::write(self.device().join("driver_override"), driver).unwrap();
    }

    fn lose_override(&self) {
        fs::remove_file(self.device().join("driver_override")).unwrap();
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_binding_that_cannot_be_undone_comes_back_to_try_again() {
    let tree = Tree::new();
    let device = Sysfs::at(&tree.0).device(Tree::DEVICE).unwrap();
    let binding = device.bind_vfio_pci().unwrap();
    tree.lose_override();
    let still = binding.restore().unwrap_err();
    assert_eq!(still.error().kind(), ErrorKind::NotFound, "{still}");
    assert_eq!(still.to_string(), still.error().to_string());
    tree.set_override("vfio-pci");
    still.into_binding().restore().unwrap();
    assert!(fs::read(tree.device().join("driver_override")).unwrap().starts_with(b"\n"));

    fn borrow(tree: &Tree, device: &PciDevice) -> Result<()> {
        let binding = device.bind_vfio_pci()?;
        tree.lose_override();
        binding.restore()?;
        Ok(())
    }
    let error: Error = borrow(&tree, &device).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

/// All errors that return a value have the same methods.
#[test]
fn every_failure_has_an_error_a_kind_and_parts() {
    macro_rules! parts {
        ($failed:expr, $kind:ident) => {{
            let failed = $failed;
            assert_eq!((failed.kind(), failed.error().kind()), (ErrorKind::$kind, failed.kind()));
            let text = failed.to_string();
            let (error, value) = failed.into_parts();
            assert_eq!(error.to_string(), text);
            value
        }};
    }
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let place = Reservation::new(4096).unwrap();
    let range = place.range();
    let bar = device.bar(0).unwrap();
    let place = parts!(bar.map(0..1, Placement::In(place)).unwrap_err(), NotMappable);
    assert_eq!(place.unwrap().range(), range);
    let buffer = device.dma().unwrap().buffer(4096).unwrap();
    let buffer = parts!(buffer.split_at(0).unwrap_err(), OutOfRange);
    let device = parts!(device.close().unwrap_err(), InUse);
    drop(buffer);
    device.close().unwrap();
}

/// `?` in a function that returns `E`.
fn question_mark<E>(device: &Device, verb: &str) -> std::result::Result<(), E>
where
    E: From<StillInUse> + From<StillMapped> + From<BufferFailed> + From<Failed> + From<Error>,
{
    let bar = device.bar(0)?;
    match verb {
        "map" => drop(bar.map(0..1 << 20, Placement::Anywhere)?),
        "unmap" => {
            let window = bar.map(0x4_0000..0x4_1000, Placement::Anywhere)?;
            let _register = window.register::<u32>(0)?;
            drop(window.into_reservation()?);
        }
        "split" => drop(device.dma()?.buffer(4096)?.split_at(0)?),
        "array" => {
            let (odd, _) = device.dma()?.buffer(4096)?.split_at(1)?;
            drop(DmaArray::<u8, 2>::new(odd)?);
        }
        "close" => {
            let other = Device::new(Arc::new(Emulated::new(Edu::new())?));
            let _window = other.bar(0)?.map(0x4_0000..0x4_1000, Placement::Anywhere)?;
            other.close()?;
        }
        other => panic!("no such verb: {other}"),
    }
    Ok(())
}

#[test]
fn every_failure_converts_by_question_mark() {
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    fn converts<T: std::error::Error + Into<Error> + Into<io::Error>>() {}
    converts::<StillBound>();
    for (verb, kind) in [
        ("map", ErrorKind::NotMappable),
        ("unmap", ErrorKind::InUse),
        ("split", ErrorKind::OutOfRange),
        ("array", ErrorKind::OutOfRange),
        ("close", ErrorKind::InUse),
    ] {
        let error = question_mark::<Error>(&device, verb).unwrap_err();
        assert_eq!(error.kind(), kind, "{verb}: {error}");
        let io = question_mark::<io::Error>(&device, verb).unwrap_err();
        let text = io.to_string();
        let error = Error::from(io);
        assert_eq!((error.kind(), error.to_string()), (kind, text), "{verb}");
    }
}

#[test]
fn a_clone_holds_the_device() {
    let device = Device::new(Arc::new(MemoryDevice::new(0x2000).unwrap()));
    let clone = device.clone();
    let register = clone.bar(0).unwrap().read_only_trapped_register::<u32>(0).unwrap();
    drop(clone.bar(0).unwrap().trapped_register::<u32>(0).unwrap());
    let still = device.close().unwrap_err();
    let text = still.to_string();
    assert!(
        text.contains("it is held by 2 trapped registers, clones or DMA mappings of the device"),
        "{text}"
    );
    drop((clone, register));
    still.into_device().close().unwrap();
}

#[test]
fn a_device_is_opened_by_text_or_address() {
    let error = Device::open("no address").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let nowhere = PciAddress { domain: 0xffff_0000, bus: 0xff, device: 0x1f, function: 7 };
    let error = Device::open(nowhere).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(Device::open("ffff0000:ff:1f.7").unwrap_err().to_string(), error.to_string());
}
