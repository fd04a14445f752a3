//! Linux VFIO: finds and binds devices through sysfs, and opens them by their IOMMU group or by their own
//! file.

mod accounting;
mod address;
mod binding;
mod cdev;
mod dma;
mod dma_buf;
mod group;
mod hot_reset;
mod ioas_map;
mod irq;
mod locked;
mod noiommu;
mod options;
mod sysfs;
mod token;
mod vfio;

pub use address::{ParseAddressError, PciAddress};
pub use binding::{Binding, StillBound};
pub use options::VfioOptions;
pub use sysfs::{PciDevice, Sysfs};
pub use token::VfToken;
pub use vfio::Vfio;

/// Whether an IOMMU confines a device to the memory that is mapped for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IommuMode {
    /// An IOMMU does.
    Iommu,
    /// Nothing does: the device is in VFIO's no-IOMMU mode.
    NoIommu,
}
