//! Linux VFIO: devices found and bound through sysfs, opened by their IOMMU group
//! or by a file of their own.

mod address;
mod binding;
mod cdev;
mod dma;
mod group;
mod irq;
mod locked;
mod mapped;
mod sysfs;
mod vfio;

pub use address::{ParseAddressError, PciAddress};
pub use binding::Binding;
pub use sysfs::{PciDevice, Sysfs};
pub use vfio::Vfio;
