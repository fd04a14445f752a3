//! How a device is reached.
//!
//! A [`Transport`] gives access to one device: through Linux VFIO ([`Vfio`]), through a vfio-user server,
//! as a model in this process ([`MemoryDevice`]), or in a way of your own. [`Device`](crate::Device)
//! works with any of them.

pub(crate) mod dma_error;
mod info_reply;
mod irq;
mod linux;
mod memory;
mod region;
mod reset;
#[cfg(feature = "vfio-user")]
pub(crate) mod vfio_user;

use std::any::Any;
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
pub use region::{RegionInfo, region_index};
pub use reset::AffectedDevice;
#[cfg(feature = "vfio-user")]
pub use vfio_user::{TimeLimits, VfioUser};

/// Access to one device. The trait is object-safe; implement it for devices of your own.
///
/// Regions have VFIO's numbers: for a PCI device 0 to 5 are BARs; [`region_index`] has the others.
///
/// A method that a transport does not offer returns `Unsupported`. Methods that later versions of this
/// crate add will return it by default.
///
/// [`Device::transport_as`](crate::Device::transport_as) gives back the type of a device's transport.
pub trait Transport: Any + Send + Sync + Debug {
    /// The name and the features of the device.
    fn info(&self) -> DeviceInfo;

    /// The size of a region, and what accesses it allows.
    ///
    /// # Errors
    /// `NotFound` if the device has no such region.
    fn region(&self, index: u32) -> Result<RegionInfo>;

    /// Reads `data.len()` bytes of a region. One, two or four naturally aligned bytes are one access to
    /// the device. Eight are one access if the transport supports it (vfio-pci from Linux 6.11 on), and
    /// otherwise two.
    ///
    /// # Errors
    /// Reading fewer bytes is an error.
    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes `data` to a region, with accesses as of [`read_at`](Self::read_at).
    ///
    /// # Errors
    /// Writing fewer bytes is an error.
    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// The file to map for the mappable parts of a region.
    ///
    /// # Errors
    /// `Unsupported` if no part of the region can be mapped, which is the default.
    fn backing(&self, region: u32) -> Result<RegionFile> {
        Err(unsupported(self.info(), format!("map region {region} of")))
    }

    /// A dma-buf of whole pages of a region, for the DMA of another device (Linux 6.19): see
    /// [`Window::dma_buf`](crate::Window::dma_buf).
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn dma_buf(&self, region: u32, range: Range<u64>, access: Access) -> Result<OwnedFd> {
        let _ = (range, access);
        Err(unsupported(self.info(), format!("make a dma-buf of region {region} of")))
    }

    /// Whether the transport knows, without asking the device, that it is gone for good. False by default. See
    /// [`Device::gone`](crate::Device::gone).
    fn is_gone(&self) -> bool {
        false
    }

    /// Gives addresses to the BARs of a PCI device that have none. [`Config`](crate::device::Config) calls it
    /// before it enables the BARs. Does nothing by default: firmware and the kernel assign the addresses of a
    /// real device.
    ///
    /// # Errors
    /// The transport's error.
    fn assign_addresses(&self) -> Result<()> {
        Ok(())
    }

    /// Resets the device.
    ///
    /// # Errors
    /// `Unsupported` if it cannot be reset, which is the default.
    fn reset(&self) -> Result<()> {
        Err(unsupported(self.info(), "reset".to_owned()))
    }

    /// The devices that a hot reset of this one resets, including itself: all on its bus, or in its slot.
    ///
    /// # Errors
    /// `Unsupported` if hot reset is not possible, which is the default.
    fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        Err(unsupported(self.info(), "hot reset".to_owned()))
    }

    /// Resets the bus or slot of the device. `others` names the other affected devices that this process
    /// has open: they are reset too, and a device that is open must be named.
    ///
    /// # Errors
    /// `NotOwned`, naming the devices that prevent the reset; `Unsupported` by default.
    fn hot_reset(&self, others: &[&dyn Transport]) -> Result<()> {
        let _ = others;
        Err(unsupported(self.info(), "hot reset".to_owned()))
    }

    /// Lets the device enter a low-power state, until [`exit_low_power`](Self::exit_low_power). With an
    /// eventfd, anything that wakes the device also ends the state, and signals the eventfd.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn enter_low_power(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let _ = wakeup;
        Err(unsupported(self.info(), "enter low power on".to_owned()))
    }

    /// Wakes the device from low power. Does nothing if it is not in low power.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn exit_low_power(&self) -> Result<()> {
        Err(unsupported(self.info(), "wake".to_owned()))
    }

    /// The vectors of an interrupt index ([`irq_index`]).
    ///
    /// # Errors
    /// `Unsupported` if the device has no interrupts, which is the default.
    fn irq(&self, index: u32) -> Result<IrqInfo> {
        Err(unsupported(self.info(), format!("query interrupt {index} of")))
    }

    /// Connects the vectors from `start` on to eventfds. A vector that fires signals its eventfd. `None`
    /// leaves a vector without one. An empty slice disables the whole index.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let _ = (start, fds);
        Err(unsupported(self.info(), format!("connect interrupt {index} of")))
    }

    /// Masks vectors, or unmasks them.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        let _ = (vectors, masked);
        Err(unsupported(self.info(), format!("mask interrupt {index} of")))
    }

    /// Unmasks a vector whenever the eventfd `fd` is written. `None` ends that. In a hypervisor, KVM
    /// writes to the eventfd when the guest signals the end of the interrupt (`resamplefd` of
    /// `KVM_IRQFD`).
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn unmask_irq_by(&self, index: u32, vector: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let _ = (vector, fd);
        Err(unsupported(self.info(), format!("use an eventfd to unmask interrupt {index} of"))
            .with_advice("unmask it by mask_irqs (Vectors::set_masked)"))
    }

    /// Fires vectors as the device would, for tests.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn trigger_irqs(&self, index: u32, vectors: Range<u32>) -> Result<()> {
        let _ = vectors;
        Err(unsupported(self.info(), format!("trigger interrupt {index} of")))
    }

    /// Which IOVAs can be mapped for the device, and how many mappings it may have.
    ///
    /// # Errors
    /// `Unsupported` if the device does no DMA, which is the default.
    fn dma_limits(&self) -> Result<DmaLimits> {
        Err(unsupported(self.info(), "do DMA with".to_owned()))
    }

    /// The address space for DMA, if other devices may share it. The IOVAs of all devices in it come from
    /// one allocator, so that no two mappings overlap. `None`, the default, if the device has its own.
    fn address_space(&self) -> Option<AddressSpaceId> {
        None
    }

    /// Maps `memory` for DMA at `iova`. The device reaches the same pages until
    /// [`dma_unmap`](Self::dma_unmap), even if this process unmaps the memory earlier.
    ///
    /// # Errors
    /// `Unsupported` by default.
    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        let _ = (iova, memory, access);
        Err(unsupported(self.info(), "map memory for DMA by".to_owned()))
    }

    /// As [`dma_map`](Self::dma_map). Returns how the memory was named to the kernel, if the transport knows.
    ///
    /// # Errors
    /// As [`dma_map`](Self::dma_map), which it calls by default.
    fn dma_map_named(
        &self,
        iova: u64,
        memory: &DmaMemory,
        access: Access,
    ) -> Result<Option<MappedBy>> {
        self.dma_map(iova, memory, access).map(|()| None)
    }

    /// The address that the device uses for the `size` bytes that were mapped at `iova`. By default this
    /// is `iova`. If nothing translates the device's addresses ([`DmaLimits::translated`]), it is the
    /// physical address of the memory.
    ///
    /// # Errors
    /// `Unsupported` if nothing translates the addresses and the memory is not contiguous.
    fn dma_address(&self, iova: u64, size: u64) -> Result<u64> {
        let _ = size;
        Ok(iova)
    }

    /// Unmaps a mapping that was made with this `iova` and `size`.
    ///
    /// # Errors
    /// `Unsupported` by default. Unmapping fewer bytes is an error.
    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        let _ = (iova, size);
        Err(unsupported(self.info(), "unmap memory for DMA by".to_owned()))
    }
}

/// An address space for DMA: see [`Transport::address_space`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpaceId(u64);

impl AddressSpaceId {
    /// An ID that no other address space of this process has.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// How memory that is mapped for DMA was named to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MappedBy {
    /// By its address in this process (`VFIO_IOMMU_MAP_DMA`, `IOMMU_IOAS_MAP`).
    Address,
    /// By its file (`IOMMU_IOAS_MAP_FILE`, Linux 6.13; 6.18 for files on hugetlbfs). The mapping does not depend on this process: it outlives it
    /// if another process has the iommufd open, which can take it over (`IOMMU_IOAS_CHANGE_PROCESS`).
    File,
    /// By a dma-buf of a BAR (Linux 6.19): see [`Window::dma_memory`](crate::Window::dma_memory).
    DmaBuf,
}

/// What can be mapped for DMA.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DmaLimits {
    /// The I/O virtual addresses that can be mapped, in order.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// The smallest page that can be mapped, in bytes: a power of two.
    pub page_size: u64,
    /// How many more mappings could be made when the limits were read, if that is limited.
    pub available_mappings: Option<u32>,
    /// How many more bytes can be mapped before the limit on locked memory is met (RLIMIT_MEMLOCK). `None` if
    /// there is no limit, or if the transport locks nothing.
    pub lockable_bytes: Option<u64>,
    /// Whether an IOMMU, or a substitute for one, translates the device's addresses. If not, the device
    /// uses physical addresses: see [`Transport::dma_address`].
    pub translated: bool,
    /// Whether the transport needs the file of the memory ([`DmaMemory::file`]), if it has one, for a
    /// server in another process. Each buffer then keeps a file descriptor open.
    pub by_file: bool,
    /// Whether the transport uses the file of the memory, if it has one, when it maps it, and not afterwards, so that
    /// neither a buffer nor a guest's memory keeps a descriptor open. iommufd does since Linux 6.13: see
    /// [`MappedBy::File`].
    pub maps_files: bool,
}

impl DmaLimits {
    /// Mappings of `page_size` in `ranges`, without a limit on their count, translated, by file.
    pub fn new(ranges: Vec<RangeInclusive<u64>>, page_size: u64) -> Self {
        let (available_mappings, lockable_bytes) = (None, None);
        Self {
            ranges,
            page_size,
            available_mappings,
            lockable_bytes,
            translated: true,
            by_file: true,
            maps_files: false,
        }
    }
}

fn unsupported(info: DeviceInfo, operation: String) -> Error {
    Error::new(ErrorKind::Unsupported, operation, info.name)
        .with_reason("its transport does not support that")
}

/// The name and the features of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The name of the device in errors and logs: its PCI address, or the name of a model.
    pub name: String,
    /// Whether it is a PCI device: its regions have the numbers of PCI, and include configuration space.
    pub pci: bool,
    /// Whether [`Transport::reset`] is supported.
    pub resettable: bool,
    /// Whether opening the device has reset it, so that another reset, which takes 100 ms for most devices, gains
    /// nothing. vfio-pci resets a device when it is opened, if it can.
    pub reset_at_open: bool,
    /// The number of region indexes. Some may not be implemented.
    pub region_count: u32,
    /// The number of interrupt indexes. Some may not be implemented.
    pub irq_count: u32,
}

impl DeviceInfo {
    /// A device with `region_count` regions that is not PCI, has no interrupts and cannot be reset. Set
    /// the fields that differ.
    pub fn new(name: impl Into<String>, region_count: u32) -> Self {
        Self {
            name: name.into(),
            pci: false,
            resettable: false,
            reset_at_open: false,
            region_count,
            irq_count: 0,
        }
    }

    /// The name of a region in errors and logs: "bar 0 of 0000:00:03.0".
    pub(crate) fn region_name(&self, index: u32) -> String {
        let kind = if index >= 6 { "region" } else { "bar" };
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
    /// A file of shared memory (a memfd, or a file on tmpfs), and the offset in it at which the region
    /// starts, in bytes.
    ///
    /// # Errors
    /// `Unsupported` for any other file: see [`device`](Self::device).
    pub fn memory(fd: Arc<OwnedFd>, start: u64) -> Result<Self> {
        if file::is_tmpfs(&*fd) {
            return Ok(Self { fd, start, kind: BackingKind::SharedMemory });
        }
        Err(Error::new(ErrorKind::Unsupported, "map", "a file")
            .with_reason("it is not shared memory: it is not a regular file on tmpfs"))
    }

    /// Any other file, such as a device's. The crate does not rely on faults to fill its mappings again.
    ///
    /// # Safety
    /// Safe code will read and write any byte of the file. The caller guarantees that this is not
    /// undefined behaviour. In particular, an IOMMU confines a device behind the file, or nothing makes
    /// the device write to memory that Rust uses; and neither the kernel nor this process relies on data
    /// structures in the file.
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn device(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self::untrusted(fd, start)
    }

    /// As [`device`](Self::device), for transports that were opened under the same contract.
    pub(crate) fn untrusted(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self { fd, start, kind: BackingKind::Other }
    }

    /// A region of a device that is bound to vfio-pci, according to sysfs.
    pub(crate) fn vfio_pci(fd: Arc<OwnedFd>, start: u64) -> Self {
        Self { fd, start, kind: BackingKind::VfioPci }
    }

    /// The file. The crate does not prevent you from reading, writing or mapping it by other means.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The offset of the region in the file, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// What kind of file it is, as far as remapping is concerned.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }
}
