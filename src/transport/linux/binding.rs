//! Handing a device to vfio-pci, and giving it back.

use std::fs;

use super::PciDevice;
use super::noiommu::unconfined;
use super::sysfs::write;
use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::sys::fork;

const VFIO_PCI: &str = "vfio-pci";

/// A device bound to vfio-pci, and what was there before.
///
/// Dropping it restores that: the driver that held the device, and its `driver_override`.
/// [`keep`](Self::keep) leaves the device with vfio-pci. A child of `fork(2)` that drops it changes nothing.
///
/// The kernel waits with that until every program has closed the device, this one included: in a
/// structure that holds both, the [`Device`](crate::Device) comes first, so that it is dropped first.
#[derive(Debug)]
#[must_use = "dropping a binding restores the driver that was there before"]
pub struct Binding {
    device: PciDevice,
    /// What there is to restore; `None` once that is done, or where nothing was changed.
    before: Option<Before>,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

#[derive(Debug)]
struct Before {
    driver: Option<String>,
    driver_override: String,
}

impl PciDevice {
    /// Binds the device to vfio-pci, taking it from the driver that holds it. Needs root.
    ///
    /// The device is known to vfio-pci by its `driver_override` (Linux 3.16), so that no other device
    /// of its kind is taken.
    ///
    /// # Errors
    /// `NotFound` where vfio-pci is not loaded; `NoIommu` where no IOMMU confines the device, unless VFIO's
    /// no-IOMMU mode is on ([`Vfio::open_noiommu`](super::Vfio::open_noiommu)); `PermissionDenied`; and
    /// whatever vfio-pci answered. The device is then as it was.
    pub fn bind_vfio_pci(&self) -> Result<Binding> {
        let binding =
            |before| Binding { device: self.clone(), before, generation: fork::generation() };
        let driver = self.driver();
        if driver.as_deref() == Some(VFIO_PCI) {
            return Ok(binding(None));
        }
        let vfio_pci = self.sysfs().driver(VFIO_PCI);
        if !vfio_pci.exists() {
            return Err(Error::new(ErrorKind::NotFound, "bind", self.address())
                .because("the driver vfio-pci is not loaded")
                .remedy("load it: modprobe vfio-pci"));
        }
        let driver_override = fs::read_to_string(self.path().join("driver_override"))
            .map_err(|error| Error::io(&error, "bind", self.address()))?;
        let binding = binding(Some(Before { driver, driver_override }));
        // From here on, an error drops the binding, which restores what was there.
        self.set_override(VFIO_PCI)?;
        self.leave_driver()?;
        write(&vfio_pci.join("bind"), &self.address().to_string(), "bind").map_err(|error| {
            if self.iommu_group().is_none() { unconfined("bind", self.address()) } else { error }
        })?;
        Ok(binding)
    }

    fn set_override(&self, driver: &str) -> Result<()> {
        write(&self.path().join("driver_override"), driver, "bind")
    }

    /// Takes the device from the driver that holds it. Waits while a program has it open.
    fn leave_driver(&self) -> Result<()> {
        match self.driver() {
            Some(_) => {
                let unbind = self.path().join("driver/unbind");
                write(&unbind, &self.address().to_string(), "unbind")
            }
            None => Ok(()),
        }
    }
}

impl Binding {
    /// The device.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }

    /// Leaves the device with vfio-pci.
    pub fn keep(mut self) {
        self.before = None;
    }

    /// Restores the driver and `driver_override` that were there before.
    ///
    /// Waits until every program has closed the device: the kernel does.
    ///
    /// # Errors
    /// The binding, to try again, and what sysfs answered.
    pub fn restore(mut self) -> std::result::Result<(), StillBound> {
        self.put_back().map_err(|error| StillBound { error, binding: self })
    }

    fn put_back(&mut self) -> Result<()> {
        let Some(Before { driver, driver_override }) = &self.before else { return Ok(()) };
        let device = &self.device;
        // sysfs shows no override as "(null)", and takes an empty line for it.
        let value = match driver_override.trim() {
            "(null)" | "" => "\n",
            name => name,
        };
        device.set_override(value)?;
        if device.driver() != *driver {
            device.leave_driver()?;
            if let Some(driver) = driver {
                let bind = device.sysfs().driver(driver).join("bind");
                write(&bind, &device.address().to_string(), "bind")?;
            }
        }
        self.before = None;
        Ok(())
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        if let Err(error) = self.put_back() {
            log::error!("{} keeps another driver than it had: {error}", self.device.address());
        }
    }
}

/// A device that has not got back what was there before, and why.
///
/// Converts into its [`Error`] with `?`; the binding is then dropped, which tries once more.
#[derive(Debug)]
pub struct StillBound {
    error: Error,
    binding: Binding,
}

impl StillBound {
    /// What sysfs answered.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The binding, to try again.
    pub fn into_binding(self) -> Binding {
        self.binding
    }
}

gives_back!(StillBound);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::super::Sysfs;
    use super::*;
    use crate::sys::fork;

    /// A copy of what sysfs shows of one device that the driver `serial` holds. Files keep what is written
    /// to them; nothing happens.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let root =
                std::env::temp_dir().join(format!("vfio-remap-{name}-{}", std::process::id()));
            let device = root.join("bus/pci/devices/0000:00:03.0");
            fs::create_dir_all(&device).unwrap();
            for driver in ["serial", VFIO_PCI] {
                let driver = root.join("bus/pci/drivers").join(driver);
                fs::create_dir_all(&driver).unwrap();
                for file in ["bind", "unbind"] {
                    fs::write(driver.join(file), "").unwrap();
                }
            }
            symlink("../../drivers/serial", device.join("driver")).unwrap();
            fs::write(device.join("driver_override"), "(null)\n").unwrap();
            Self(root)
        }

        fn device(&self) -> PciDevice {
            Sysfs::at(&self.0).device("0000:00:03.0".parse().unwrap()).unwrap()
        }

        /// What was written to `driver_override` last, which is shorter than what was there before it by a
        /// line at most.
        fn overridden(&self) -> String {
            let path = self.0.join("bus/pci/devices/0000:00:03.0/driver_override");
            fs::read_to_string(path).unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    #[expect(unsafe_code, reason = "it forks")]
    fn a_child_leaves_the_binding_of_its_parent_alone() {
        let tree = Tree::new("binding-of-parent");
        let mut binding = Some(tree.device().bind_vfio_pci().unwrap());
        assert_eq!(tree.overridden(), "vfio-pci");
        let drops = || {
            drop(binding.take());
            true
        };
        // SAFETY: no other thread knows of this tree, and the child takes no lock.
        assert!(unsafe { fork::holds_in_child(drops) });
        assert_eq!(tree.overridden(), "vfio-pci", "the child wrote to it");
        drop(binding);
        assert_eq!(tree.overridden(), "\nfio-pci", "the parent restores it");
    }

    #[test]
    fn what_cannot_be_bound_gets_back_what_it_had() {
        let tree = Tree::new("not-bound");
        fs::remove_file(tree.0.join("bus/pci/drivers/vfio-pci/bind")).unwrap();
        let error = tree.device().bind_vfio_pci().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoIommu, "{error}");
        assert_eq!(tree.overridden(), "\nfio-pci");
    }
}
