//! Linux VFIO: devices found and bound through sysfs, opened through their IOMMU group.

mod address;
mod binding;
mod dma;
mod group;
mod irq;
mod sysfs;
mod vfio;

pub use address::{ParseAddressError, PciAddress};
pub use binding::Binding;
pub use sysfs::{PciDevice, Sysfs};
pub use vfio::Vfio;
