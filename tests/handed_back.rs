//! What a failed call consumed comes back with the error, and `?` takes the error alone.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use vfio_remap::transport::{MemoryDevice, PciDevice, Sysfs};
use vfio_remap::{Device, Error, ErrorKind, Placement, Reservation, Result, Window};

#[test]
fn a_window_in_use_comes_back_as_it_was() {
    let device = Device::new(Arc::new(MemoryDevice::new(0x2000).unwrap()));
    let window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let addresses = window.addresses();
    let register = window.register::<u32>(0).unwrap();

    let still = window.into_reservation().unwrap_err();
    assert_eq!(still.error().kind(), ErrorKind::InUse, "{still}");
    assert_eq!(still.to_string(), still.error().to_string());
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
    let device = Sysfs::at(&tree.0).device(Tree::DEVICE.parse().unwrap()).unwrap();
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
