//! The seam between a device and the way to it.
//!
//! A [`Transport`] is one device as something offers it: Linux VFIO ([`Vfio`]), a model in this
//! process ([`MemoryDevice`]), or whatever you write. [`Device`](crate::Device) is built on any.

mod answer;
mod irq;
mod linux;
mod memory;
pub(crate) mod refusal;
mod region;
mod reset;
#[cfg(feature = "vfio-user")]
pub(crate) mod vfio_user;

use std::fmt::Debug;
use std::ops::{Range, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, BackingKind, DmaMemory};
use crate::sys::file;

pub use irq::{IrqInfo, irq_index};
pub use linux::{
    Binding, ParseAddressError, PciAddress, PciDevice, StillBound, Sysfs, VfToken, Vfio,
    VfioOptions,
};
pub use memory::MemoryDevice;
pub use region::RegionInfo;
pub use reset::AffectedDevice;
#[cfg(feature = "vfio-user")]
pub use vfio_user::VfioUser;

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

    /// Reads `data.len()` bytes of a region. One, two and four naturally aligned bytes are one access to
    /// the device; eight are where the transport can (vfio-pci from Linux 6.11 on), and else two.
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

    /// The devices that a hot reset of this one resets, itself among them: all on its bus, or in its slot.
    ///
    /// # Errors
    /// `Unsupported` where there is no such reset; that is the default.
    fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        Err(unsupported(self.info(), "hot reset".to_owned()))
    }

    /// Resets the bus or slot that the device sits on. `others` are affected devices that this process has
    /// open besides, by which it shows that it means them, too.
    ///
    /// # Errors
    /// `NotOwned`, naming the devices that stand in the way; `Unsupported`, by default.
    fn hot_reset(&self, others: &[&dyn Transport]) -> Result<()> {
        let _ = others;
        Err(unsupported(self.info(), "hot reset".to_owned()))
    }

    /// Lets the device sleep: until [`exit_low_power`](Self::exit_low_power), or with an eventfd until
    /// something wakes it, which signals that.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn enter_low_power(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let _ = wakeup;
        Err(unsupported(self.info(), "enter low power on".to_owned()))
    }

    /// Wakes the device. Does nothing to one that is awake.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn exit_low_power(&self) -> Result<()> {
        Err(unsupported(self.info(), "wake".to_owned()))
    }

    /// What an interrupt index ([`irq_index`]) offers.
    ///
    /// # Errors
    /// `Unsupported` where the device has no interrupts; that is the default.
    fn irq(&self, index: u32) -> Result<IrqInfo> {
        Err(unsupported(self.info(), format!("query interrupt {index} of")))
    }

    /// Connects the vectors from `start` on to eventfds, each signalled by its vector. `None` leaves a
    /// vector without one. No eventfds at all take the whole index out of use.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let _ = (start, fds);
        Err(unsupported(self.info(), format!("connect interrupt {index} of")))
    }

    /// Masks vectors, or unmasks them.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        let _ = (vectors, masked);
        Err(unsupported(self.info(), format!("mask interrupt {index} of")))
    }

    /// Has a vector unmasked whenever the eventfd `fd` is written, or with `None` no longer. A hypervisor
    /// has its guest's end of interrupt written there by the kernel (`resamplefd` of `KVM_IRQFD`).
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn unmask_irq_by(&self, index: u32, vector: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let _ = (vector, fd);
        Err(unsupported(self.info(), format!("unmask by an eventfd interrupt {index} of"))
            .remedy("unmask it by mask_irqs (Vectors::set_masked)"))
    }

    /// Fires vectors as the device would: for tests.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn trigger_irqs(&self, index: u32, vectors: Range<u32>) -> Result<()> {
        let _ = vectors;
        Err(unsupported(self.info(), format!("trigger interrupt {index} of")))
    }

    /// Which addresses the device can be given for DMA, and how many mappings.
    ///
    /// # Errors
    /// `Unsupported` where the device does no DMA; that is the default.
    fn dma_limits(&self) -> Result<DmaLimits> {
        Err(unsupported(self.info(), "do DMA with".to_owned()))
    }

    /// Which address space for DMA the device is in, where others may be in it, too: all of them are given
    /// addresses from one stock, so that none is given what another has. `None`, the default, where the
    /// device has one of its own.
    fn address_space(&self) -> Option<AddressSpaceId> {
        None
    }

    /// Lets the device reach `memory` at the I/O virtual address `iova`. The pages stay where they are
    /// until they are unmapped, whatever becomes of the mapping in this process.
    ///
    /// # Errors
    /// `Unsupported`, by default.
    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        let _ = (iova, memory, access);
        Err(unsupported(self.info(), "map memory for DMA by".to_owned()))
    }

    /// The address by which the device reaches the `size` bytes that were mapped at `iova`: that same
    /// address, which is the default, unless nothing translates the device's addresses
    /// ([`DmaLimits::translated`]). It is then that of the memory, wherever that happens to be.
    ///
    /// # Errors
    /// `Unsupported` where nothing translates them, and the memory is not contiguous.
    fn dma_address(&self, iova: u64, size: u64) -> Result<u64> {
        let _ = size;
        Ok(iova)
    }

    /// Takes a mapping away again; `iova` and `size` are those of one that was made.
    ///
    /// # Errors
    /// `Unsupported`, by default. An answer for fewer bytes is an error.
    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        let _ = (iova, size);
        Err(unsupported(self.info(), "unmap memory for DMA by".to_owned()))
    }
}

/// An address space for DMA: see [`Transport::address_space`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpaceId(u64);

impl AddressSpaceId {
    /// One that is like no other in this process.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Where a device can be given memory for DMA.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DmaLimits {
    /// The I/O virtual addresses that can be mapped, in order.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// The smallest page that can be mapped, in bytes: a power of two.
    pub page_size: u64,
    /// How many more mappings can be made, where that is limited.
    pub mappings: Option<u32>,
    /// Whether the device's addresses are translated, by an IOMMU or whatever stands for one. Where they
    /// are not, mapped memory is reached where it is: see [`Transport::dma_address`].
    pub translated: bool,
    /// Whether memory is handed on by its file ([`DmaMemory::file`]), where it has one, as a server in
    /// another process wants it. A buffer then keeps its file open: a descriptor each.
    pub by_file: bool,
}

impl DmaLimits {
    /// Mappings of `page_size` in `ranges`, as many as one likes, translated, by file.
    pub fn new(ranges: Vec<RangeInclusive<u64>>, page_size: u64) -> Self {
        Self { ranges, page_size, mappings: None, translated: true, by_file: true }
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
    /// A file of shared memory, a memfd or one on a tmpfs, and the offset in it at which the region
    /// starts, in bytes.
    ///
    /// # Errors
    /// `Unsupported` for any other file: see [`device`](Self::device).
    pub fn memory(fd: Arc<OwnedFd>, start: u64) -> Result<Self> {
        if file::is_tmpfs(&*fd) {
            return Ok(Self { fd, start, kind: BackingKind::SharedMemory });
        }
        Err(Error::new(ErrorKind::Unsupported, "map", "a file")
            .because("it is not shared memory: not a regular file of a tmpfs"))
    }

    /// A file of any other sort, such as a device's. Its mappings are never trusted to refault.
    ///
    /// # Safety
    /// Programs in safe Rust will read and write any of its bytes: whatever they may do by that, to the
    /// machine's memory through a device that no IOMMU confines, or to structures that the kernel or
    /// this process shares by that file, is answered for by the caller.
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn device(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self::untrusted(fd, start)
    }

    /// As [`device`](Self::device), where the transport was opened under the same contract.
    pub(crate) fn untrusted(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self { fd, start, kind: BackingKind::Other }
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
