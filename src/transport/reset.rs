//! What a reset of more than one device concerns.

use std::fmt;

use super::PciAddress;

/// A device that a hot reset resets (`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AffectedDevice {
    /// Where it sits.
    pub address: PciAddress,
    /// The driver that holds it, if any. A hot reset wants a VFIO driver on each.
    pub driver: Option<String>,
    /// Whether this process may reset it: it has opened the device, or another one of its IOMMU group.
    pub owned: bool,
}

impl AffectedDevice {
    /// A device that no driver holds, and that this process may not reset: set what differs.
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
