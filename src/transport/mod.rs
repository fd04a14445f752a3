//! The seam between a device and the way to it.
//!
//! A [`Transport`] is one device as something offers it: Linux VFIO ([`Vfio`]), a model in this
//! process ([`MemoryDevice`]), or whatever you write. [`Device`](crate::Device) is built on any.

mod linux;
mod memory;
mod region;

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::space::BackingKind;
use crate::sys::file;

pub use linux::{Binding, ParseAddressError, PciAddress, PciDevice, Sysfs, Vfio};
pub use memory::MemoryDevice;
pub use region::RegionInfo;

/// One device, as its transport offers it. Object-safe; implement it to bring a device of your own.
///
/// Regions are numbered as VFIO numbers them: for a PCI device 0 to 5 are BARs, 6 is the expansion
/// ROM and 7 configuration space.
///
/// Methods that a transport does not offer answer `Unsupported`; methods that later versions of this
/// crate add will do so by default.
pub trait Transport: Send + Sync + Debug {
    /// What the device is.
    fn info(&self) -> DeviceInfo;

    /// Size and abilities of a region.
    ///
    /// # Errors
    /// `NotFound` where the device has no such region.
    fn region(&self, index: u32) -> Result<RegionInfo>;

    /// Reads `data.len()` bytes of a region. One, two, four and eight naturally aligned bytes are one
    /// access to the device.
    ///
    /// # Errors
    /// Anything short of all the bytes is an error.
    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes `data` to a region, as [`read_at`](Self::read_at) reads.
    ///
    /// # Errors
    /// Anything short of all the bytes is an error.
    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// The file whose pages the mappable parts of a region are.
    ///
    /// # Errors
    /// `Unsupported` where nothing of the region can be mapped; that is the default.
    fn backing(&self, region: u32) -> Result<RegionFile> {
        Err(unsupported(self.info(), format!("map region {region} of")))
    }

    /// Resets the device.
    ///
    /// # Errors
    /// `Unsupported` where it cannot be reset; that is the default.
    fn reset(&self) -> Result<()> {
        Err(unsupported(self.info(), "reset".to_owned()))
    }
}

fn unsupported(info: DeviceInfo, operation: String) -> Error {
    Error::new(ErrorKind::Unsupported, operation, info.name)
        .because("its transport does not offer that")
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// How errors and logs name the device: its PCI address, or what a model calls itself.
    pub name: String,
    /// Whether regions are those of a PCI device, configuration space among them.
    pub pci: bool,
    /// Whether [`Transport::reset`] can work.
    pub resettable: bool,
    /// How many region indexes there are; some may be vacant.
    pub regions: u32,
    /// How many interrupt indexes there are; some may be vacant.
    pub irqs: u32,
}

impl DeviceInfo {
    /// A device of `regions` regions that is not PCI, has no interrupts and cannot be reset: set what
    /// differs.
    pub fn new(name: impl Into<String>, regions: u32) -> Self {
        Self { name: name.into(), pci: false, resettable: false, regions, irqs: 0 }
    }

    /// How errors and logs name a region: "bar 0 of 0000:00:03.0".
    pub(crate) fn region_name(&self, index: u32) -> String {
        let kind = if self.pci && index >= 6 { "region" } else { "bar" };
        format!("{kind} {index} of {}", self.name)
    }
}

/// The file behind a region: offset 0 of the region is offset [`start`](Self::start) of the file.
#[derive(Clone, Debug)]
pub struct RegionFile {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) start: u64,
    pub(crate) kind: BackingKind,
}

impl RegionFile {
    /// A file and the offset in it at which the region starts, in bytes.
    ///
    /// Its [`BackingKind`] is found out here: shared memory where `fstatfs(2)` says tmpfs, otherwise
    /// `Other`.
    pub fn new(fd: Arc<OwnedFd>, start: u64) -> Self {
        let kind =
            if file::is_tmpfs(&*fd) { BackingKind::SharedMemory } else { BackingKind::Other };
        Self { fd, start, kind }
    }

    /// A region of a device whose driver is vfio-pci, as sysfs says.
    pub(crate) fn vfio_pci(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self { fd, start, kind: BackingKind::VfioPci }
    }

    /// The file. Reading, writing or mapping it by other means than this crate's is up to you.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The offset of the region in the file, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// What the file is, as far as remapping is concerned.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }
}
