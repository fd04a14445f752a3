//! Linux VFIO: devices found and bound through sysfs, opened by their IOMMU group
//! or by a file of their own.

mod address;
mod binding;
mod books;
mod cdev;
mod dma;
mod group;
mod hot_reset;
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

/// What keeps a device from memory that it was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confinement {
    /// An IOMMU.
    Iommu,
    /// Nothing but its driver.
    None,
}
