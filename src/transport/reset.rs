//! The devices that a hot reset affects.

use std::fmt;

use super::PciAddress;

/// A device that a hot reset resets (`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AffectedDevice {
    /// Its PCI address.
    pub address: PciAddress,
    /// The driver that is bound to it, if any. A hot reset requires a VFIO driver on every affected device.
    pub driver: Option<String>,
    /// Whether this process may reset it: it has opened the device, or another device of its IOMMU group.
    pub owned: bool,
}

impl AffectedDevice {
    /// A device without a driver that this process may not reset. Set the fields that differ.
    pub fn new(address: PciAddress) -> Self {
        Self { address, driver: None, owned: false }
    }
}

/// "0000:02:00.1 (e1000e)"
impl fmt::Display for AffectedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.address, self.driver.as_deref().unwrap_or("no driver"))
    }
}
