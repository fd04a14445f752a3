//! Handing a device to vfio-pci, and giving it back.

use std::fmt;
use std::fs;

use super::PciDevice;
use super::noiommu::unconfined;
use super::sysfs::write;
use crate::error::{Error, ErrorKind, Result};

const VFIO_PCI: &str = "vfio-pci";

/// A device bound to vfio-pci, and what was there before.
///
/// Dropping it restores that: the driver that held the device, and its `driver_override`.
/// [`keep`](Self::keep) leaves the device with vfio-pci.
///
/// The kernel waits with that until every program has closed the device, this one included: in a
/// structure that holds both, the [`Device`](crate::Device) comes first, so that it is dropped first.
#[derive(Debug)]
#[must_use = "dropping a binding restores the driver that was there before"]
pub struct Binding {
    device: PciDevice,
    /// What there is to restore; `None` once that is done, or where nothing was changed.
    before: Option<Before>,
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
        let driver = self.driver();
        if driver.as_deref() == Some(VFIO_PCI) {
            return Ok(Binding { device: self.clone(), before: None });
        }
        let vfio_pci = self.sysfs().driver(VFIO_PCI);
        if !vfio_pci.exists() {
            return Err(Error::new(ErrorKind::NotFound, "bind", self.address())
                .because("the driver vfio-pci is not loaded")
                .remedy("load it: modprobe vfio-pci"));
        }
        let driver_override = fs::read_to_string(self.path().join("driver_override"))
            .map_err(|error| Error::io(&error, "bind", self.address()))?;
        let binding =
            Binding { device: self.clone(), before: Some(Before { driver, driver_override }) };
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

impl From<StillBound> for Error {
    fn from(still: StillBound) -> Self {
        still.error
    }
}

impl fmt::Display for StillBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for StillBound {}
