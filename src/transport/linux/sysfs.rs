//! PCI devices in sysfs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{IommuMode, PciAddress};
use crate::error::{Error, ErrorKind, Result};

/// The PCI devices of this machine, as `/sys/bus/pci` shows them.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Sysfs {
    /// The tree at `root`: another mount point of sysfs, or a copy of it.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// All PCI devices, in order of address.
    ///
    /// # Errors
    /// `NotFound` if there is no PCI bus or no sysfs.
    pub fn devices(&self) -> Result<Vec<PciDevice>> {
        let path = self.bus().join("devices");
        let entries =
            fs::read_dir(&path).map_err(|error| Error::io(&error, "list", path.display()))?;
        let mut addresses: Vec<PciAddress> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        addresses.sort();
        Ok(addresses.into_iter().map(|address| self.entry(address)).collect())
    }

    /// The device at `address`, a [`PciAddress`] or text such as `"0000:00:03.0"`.
    ///
    /// # Errors
    /// `NotFound` if there is none; `InvalidInput` if the text is not an address.
    pub fn device<A>(&self, address: A) -> Result<PciDevice>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        let address = address.try_into()?;
        let device = self.entry(address);
        if device.path().exists() {
            return Ok(device);
        }
        Err(Error::new(ErrorKind::NotFound, "find", format!("PCI device {address}"))
            .with_reason(format!("{} does not exist", device.path().display()))
            .with_advice("list the devices: ls /sys/bus/pci/devices, or lspci -D"))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn entry(&self, address: PciAddress) -> PciDevice {
        PciDevice { sysfs: self.clone(), address }
    }

    fn bus(&self) -> PathBuf {
        self.root.join("bus/pci")
    }

    /// The directory of a PCI driver.
    pub(super) fn driver(&self, name: &str) -> PathBuf {
        self.bus().join("drivers").join(name)
    }
}

/// A PCI device as sysfs shows it.
#[derive(Clone, Debug)]
pub struct PciDevice {
    sysfs: Sysfs,
    address: PciAddress,
}

impl PciDevice {
    /// Its PCI address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The vendor ID, such as 0x8086.
    ///
    /// # Errors
    /// `NotFound` if the device is gone; `Malformed` if the file in sysfs does not hold a number.
    pub fn vendor_id(&self) -> Result<u16> {
        Ok(self.number("vendor")? as u16)
    }

    /// The device ID.
    ///
    /// # Errors
    /// As [`vendor_id`](Self::vendor_id).
    pub fn device_id(&self) -> Result<u16> {
        Ok(self.number("device")? as u16)
    }

    /// The class code, 24 bits: 0x010802 is an NVMe controller.
    ///
    /// # Errors
    /// As [`vendor_id`](Self::vendor_id).
    pub fn class_code(&self) -> Result<u32> {
        self.number("class")
    }

    /// The driver that is bound to it, if any.
    pub fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// The number of its IOMMU group; `None` without an IOMMU.
    pub fn iommu_group(&self) -> Option<u32> {
        self.link("iommu_group")?.parse().ok()
    }

    /// The device's own VFIO file, if the kernel has made one: `/dev/vfio/devices/vfioN` or
    /// `noiommu-vfioN`. Kernels without such files have the entry in sysfs too, but without a device
    /// number (`dev`).
    pub(super) fn own_file(&self, mode: IommuMode) -> Option<PathBuf> {
        let prefix = match mode {
            IommuMode::Iommu => "vfio",
            IommuMode::NoIommu => "noiommu-vfio",
        };
        let entries = fs::read_dir(self.path().join("vfio-dev")).ok()?;
        let entry = entries.flatten().find(|entry| {
            let is_device = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
            is_device && entry.path().join("dev").exists()
        })?;
        Some(Path::new("/dev/vfio/devices").join(entry.file_name()))
    }

    /// All devices of its IOMMU group, including itself, in order of address.
    ///
    /// # Errors
    /// `NotFound` if it has no IOMMU group.
    pub fn group_members(&self) -> Result<Vec<PciDevice>> {
        let path = self.path().join("iommu_group/devices");
        let entries =
            fs::read_dir(&path).map_err(|error| Error::io(&error, "list", path.display()))?;
        let mut members: Vec<PciAddress> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        members.sort();
        Ok(members.into_iter().map(|address| self.sysfs.entry(address)).collect())
    }

    /// Its physical function, if it is a virtual function (SR-IOV).
    pub fn physical_function(&self) -> Option<PciDevice> {
        let address = self.link("physfn")?.parse().ok()?;
        Some(self.sysfs.entry(address))
    }

    pub(super) fn sysfs(&self) -> &Sysfs {
        &self.sysfs
    }

    pub(super) fn path(&self) -> PathBuf {
        self.sysfs.bus().join("devices").join(self.address.to_string())
    }

    /// The file name that a link points to.
    fn link(&self, name: &str) -> Option<String> {
        let target = fs::read_link(self.path().join(name)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn number(&self, name: &str) -> Result<u32> {
        let path = self.path().join(name);
        let text =
            fs::read_to_string(&path).map_err(|error| Error::io(&error, "read", path.display()))?;
        let digits = text.trim();
        u32::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).map_err(|_| {
            Error::new(ErrorKind::Malformed, "read", path.display())
                .with_reason(format!("{digits:?} is not a number"))
        })
    }
}

/// Writes a value to a file of sysfs in one `write(2)`, as sysfs requires.
pub(super) fn write(path: &Path, value: &str, operation: &'static str) -> Result<()> {
    let result: io::Result<()> = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    result.map_err(|error| {
        let error = Error::io(&error, operation, path.display());
        match error.kind() {
            ErrorKind::PermissionDenied => error.with_advice("run this as root"),
            _ => error,
        }
    })
}
