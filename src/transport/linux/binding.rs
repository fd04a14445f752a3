//! Binding a device to vfio-pci, and restoring its former driver.

use std::fs;
use std::time::{Duration, Instant};

use super::PciDevice;
use super::noiommu::iommu_missing;
use super::sysfs::write;
use crate::error::{Error, ErrorKind, Result, gives_back};
use crate::sys::fork;

const VFIO_PCI: &str = "vfio-pci";
const NVME: &str = "nvme";
/// How long a driver that is busy with its device is waited for. A controller may say that it takes longer, up to 127 s
/// (CAP.TO, NVMe Base 2.0 §3.1.3.1).
const READY_WITHIN: Duration = Duration::from_secs(20);

/// A device bound to vfio-pci, and its former driver.
///
/// Dropping it restores the former driver and `driver_override`. [`keep`](Self::keep) leaves the device
/// bound to vfio-pci. A child of `fork(2)` that drops it changes nothing.
///
/// To restore the driver, the kernel waits until every program has closed the device, including this one. A
/// structure that holds both must declare the [`Device`](crate::Device) first, so that it is dropped first.
#[derive(Debug)]
#[must_use = "dropping a binding restores the driver that was there before"]
pub struct Binding {
    device: PciDevice,
    /// What to restore. `None` after that, or if nothing was changed.
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
    /// Binds the device to vfio-pci, after unbinding it from its driver. Requires root.
    ///
    /// This uses the device's `driver_override` (Linux 3.16), so that vfio-pci does not bind to other
    /// devices of the same kind. While the kernel's NVMe driver starts or resets the device, this waits for at
    /// most 20 s, and then unbinds it anyway (docs/kernel-notes.md says why).
    ///
    /// # Errors
    /// `NotFound` if vfio-pci is not loaded; `NoIommu` if no IOMMU confines the device, unless VFIO's
    /// no-IOMMU mode is on ([`Vfio::open_noiommu`](super::Vfio::open_noiommu)); `PermissionDenied`; and
    /// errors of vfio-pci. The former driver is then restored.
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
                .with_reason("the driver vfio-pci is not loaded")
                .with_advice("load it: modprobe vfio-pci"));
        }
        let driver_override = fs::read_to_string(self.path().join("driver_override"))
            .map_err(|error| Error::io(&error, "bind", self.address()))?;
        let binding = binding(Some(Before { driver, driver_override }));
        // From here on, an error drops the binding, which restores the former driver.
        self.set_override(VFIO_PCI)?;
        self.unbind()?;
        write(&vfio_pci.join("bind"), &self.address().to_string(), "bind").map_err(|error| {
            if self.iommu_group().is_none() { iommu_missing("bind", self.address()) } else { error }
        })?;
        Ok(binding)
    }

    fn set_override(&self, driver: &str) -> Result<()> {
        write(&self.path().join("driver_override"), driver, "bind")
    }

    /// Whether the kernel's NVMe driver has the device and starts or resets it, or has failed to. Unbound then, that
    /// of Linux 6.1 and older may unbind the device once more, from whatever driver has it by then.
    fn nvme_is_busy(&self) -> bool {
        if self.driver().as_deref() != Some(NVME) {
            return false;
        }
        let controllers = fs::read_dir(self.path().join(NVME)).into_iter().flatten().flatten();
        let mut states =
            controllers.filter_map(|it| fs::read_to_string(it.path().join("state")).ok());
        // Without a state, the probe has not come that far.
        !states.next().is_some_and(|state| matches!(state.trim(), "live" | "dead"))
    }

    fn wait_while_nvme_is_busy(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while self.nvme_is_busy() {
            if Instant::now() > end {
                log::warn!("{}: {NVME} has been busy with it for {limit:?}", self.address());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Unbinds the device from its driver. Waits while a program has it open.
    fn unbind(&self) -> Result<()> {
        if self.driver().is_none() {
            return Ok(());
        }
        self.wait_while_nvme_is_busy(READY_WITHIN);
        let unbind = self.path().join("driver/unbind");
        match write(&unbind, &self.address().to_string(), "unbind") {
            // The driver has let go of it meanwhile.
            Err(_) if self.driver().is_none() => Ok(()),
            result => result,
        }
    }
}

impl Binding {
    /// The device.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }

    /// Leaves the device bound to vfio-pci.
    pub fn keep(mut self) {
        self.before = None;
    }

    /// Restores the former driver and `driver_override`.
    ///
    /// The kernel makes this wait until every program has closed the device.
    ///
    /// # Errors
    /// The error of sysfs, with the binding, to try again.
    pub fn restore(mut self) -> std::result::Result<(), StillBound> {
        self.put_back().map_err(|error| StillBound { error, binding: self })
    }

    fn put_back(&mut self) -> Result<()> {
        let Some(Before { driver, driver_override }) = &self.before else { return Ok(()) };
        let device = &self.device;
        // Without an override, sysfs shows "(null)". Writing an empty line removes it.
        let value = match driver_override.trim() {
            "(null)" | "" => "\n",
            name => name,
        };
        device.set_override(value)?;
        if device.driver() != *driver {
            device.unbind()?;
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
            log::error!("{}: its former driver was not restored: {error}", self.device.address());
        }
    }
}

/// The error of a device whose former driver could not be restored.
///
/// `?` converts it into its [`Error`] and drops the binding, which tries once more.
#[derive(Debug)]
pub struct StillBound {
    error: Error,
    binding: Binding,
}

impl StillBound {
    /// The binding, to try again.
    pub fn into_binding(self) -> Binding {
        self.binding
    }
}

gives_back!(StillBound { binding: Binding }, "The error, and the binding, to try again.");

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::super::Sysfs;
    use super::*;
    use crate::sys::fork;

    /// A copy of sysfs with one device, bound to a driver. Writes to its files have no other effect.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, driver: &str) -> Self {
            let root =
                std::env::temp_dir().join(format!("vfio-remap-{name}-{}", std::process::id()));
            let device = root.join("bus/pci/devices/0000:00:03.0");
            fs::create_dir_all(&device).unwrap();
            for name in [driver, VFIO_PCI] {
                let driver = root.join("bus/pci/drivers").join(name);
                fs::create_dir_all(&driver).unwrap();
                for file in ["bind", "unbind"] {
                    fs::write(driver.join(file), "").unwrap();
                }
            }
            symlink(format!("../../drivers/{driver}"), device.join("driver")).unwrap();
            fs::write(device.join("driver_override"), "(null)\n").unwrap();
            Self(root)
        }

        fn device(&self) -> PciDevice {
            Sysfs::at(&self.0).device("0000:00:03.0").unwrap()
        }

        /// The contents of `driver_override`. A shorter value overwrites only the beginning of a longer
        /// one.
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
        let tree = Tree::new("binding-of-parent", "serial");
        let mut binding = Some(tree.device().bind_vfio_pci().unwrap());
        assert_eq!(tree.overridden(), "vfio-pci");
        let drops = || {
            drop(binding.take());
            true
        };
        // SAFETY: the child takes no lock that another thread holds: only this test uses the tree.
        assert!(unsafe { fork::holds_in_child(drops) });
        assert_eq!(tree.overridden(), "vfio-pci", "the child wrote to it");
        drop(binding);
        assert_eq!(tree.overridden(), "\nfio-pci", "the parent restores it");
    }

    #[test]
    fn a_device_that_cannot_be_bound_keeps_its_driver() {
        let tree = Tree::new("not-bound", "serial");
        fs::remove_file(tree.0.join("bus/pci/drivers/vfio-pci/bind")).unwrap();
        let error = tree.device().bind_vfio_pci().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoIommu, "{error}");
        assert_eq!(tree.overridden(), "\nfio-pci");
    }

    #[test]
    fn a_busy_nvme_driver_is_waited_for() {
        let tree = Tree::new("nvme-is-busy", NVME);
        let device = tree.device();
        assert!(device.nvme_is_busy(), "the probe has not made the controller's directory");
        device.wait_while_nvme_is_busy(Duration::ZERO);

        let controller = device.path().join("nvme/nvme3");
        fs::create_dir_all(&controller).unwrap();
        assert!(device.nvme_is_busy(), "nor the state");
        for (state, busy) in [
            ("new", true),
            ("resetting", true),
            ("connecting", true),
            ("live", false),
            ("deleting", true),
            ("deleting (no IO)", true),
            ("dead", false),
        ] {
            fs::write(controller.join("state"), format!("{state}\n")).unwrap();
            assert_eq!(device.nvme_is_busy(), busy, "{state}");
        }

        fs::write(controller.join("state"), "resetting\n").unwrap();
        std::thread::scope(|scope| {
            let binding = scope.spawn(|| device.bind_vfio_pci().map(Binding::keep));
            let unbind = tree.0.join("bus/pci/drivers/nvme/unbind");
            while tree.overridden() != "vfio-pci" && !binding.is_finished() {
                std::thread::yield_now();
            }
            // It would be unbound right after that.
            std::thread::sleep(Duration::from_millis(50));
            assert!(!binding.is_finished());
            assert_eq!(fs::read_to_string(&unbind).unwrap(), "", "unbound while it was reset");
            fs::write(controller.join("state"), "live\n").unwrap();
            binding.join().unwrap().unwrap();
            assert_eq!(fs::read_to_string(&unbind).unwrap(), "0000:00:03.0");
        });
    }

    #[test]
    fn another_driver_is_not_waited_for() {
        let tree = Tree::new("serial-is-busy", "serial");
        assert!(!tree.device().nvme_is_busy());
    }
}
