//! The transport for a device of Linux VFIO.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET};

use super::accounting::Accounting;
use super::dma::{self, AddressSpace};
use super::hot_reset::{self, OpenHere};
use super::{PciAddress, PciDevice, Sysfs, VfToken, VfioOptions, dma_buf, irq};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::vfio_irq::Action;
use crate::sys::{fork, vfio, vfio_feature, vfio_reset};
use crate::transport::{
    AddressSpaceId, AffectedDevice, DeviceInfo, DmaLimits, IrqInfo, MappedBy, RegionFile,
    RegionInfo, Transport,
};

/// More regions than any device has. A larger number is an error of the kernel.
const MAX_REGIONS: u32 = 1024;

/// A device that this process has opened through Linux VFIO.
///
/// Dropping it closes the device, then its group.
pub struct Vfio {
    device: Arc<OwnedFd>,
    info: DeviceInfo,
    regions: Vec<Option<Region>>,
    /// Whether the driver is vfio-pci itself, according to sysfs, and not a variant.
    by_vfio_pci: bool,
    space: AddressSpace,
    accounting: Accounting,
    /// The process that opened it: see [`fork::generation`].
    generation: u32,
    /// The largest number of mappings, as of the last query of the limits.
    max_mappings: AtomicUsize,
    _open: Option<OpenHere>,
}

struct Region {
    info: RegionInfo,
    /// The offset of the region in the device's file.
    start: u64,
}

impl Vfio {
    /// Opens the device at `address`, a [`PciAddress`] or text such as `"0000:00:03.0"`: by its own file and
    /// iommufd if the kernel offers that, and
    /// otherwise by its IOMMU group. Devices of one group that are open in this process share an address
    /// space for DMA; other devices each have their own. [`options`](Self::options) has other ways.
    ///
    /// # Errors
    /// `InvalidInput` if the text is not an address; `NotFound`; `NotBound` if the device is bound to a kernel
    /// driver or to none; `NoIommu`;
    /// `GroupNotViable`, naming the devices in the way; `PermissionDenied`; `InUse` if the group is
    /// open already; `VfToken` for an SR-IOV function that requires a token. Each error says what to do.
    pub fn open<A>(address: A) -> Result<Self>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        Self::options().open(address)
    }

    /// Other ways to open a device: only by its group or only by its own file, in the address space of
    /// another device, with a VF token, without an IOMMU.
    pub fn options<'a>() -> VfioOptions<'a> {
        VfioOptions::default()
    }

    /// Opens the device at `address`, which no IOMMU confines (Linux 4.5, a kernel with
    /// CONFIG_VFIO_NOIOMMU): by its own file if the kernel makes one for such devices (Linux 7.3), and
    /// otherwise by its group (`/dev/vfio/noiommu-N`).
    ///
    /// Registers, interrupts and resets work as for other devices. For DMA the device uses physical
    /// addresses. If it is opened by its own file, memory that is mapped for DMA is pinned, and
    /// [`DmaMapping::iova`](crate::device::DmaMapping::iova) is its physical address. The memory must be
    /// contiguous: a buffer of one page is, and so is one of huge pages. If it is opened by its group,
    /// VFIO neither pins memory nor reports its physical address, and `Device::dma` returns
    /// `Unsupported`.
    ///
    /// # Errors
    /// `Unsupported` if an IOMMU does confine the device, or the kernel has no such mode;
    /// `NotBound` if the mode was off when the device was bound; `PermissionDenied` without
    /// CAP_SYS_RAWIO; the errors of [`open`](Self::open).
    ///
    /// # Safety
    /// The device can read and write all of the machine's memory, and can raise interrupts that way. The
    /// caller is responsible for everything that this process makes it do, including safe code. In
    /// particular, no code gives the device addresses other than those of live DMA mappings. And before
    /// such a mapping is dropped, the device is stopped, by a reset or by disabling bus mastering.
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn open_noiommu<A>(address: A) -> Result<Self>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        Self::options().open_without_iommu(address.try_into()?)
    }

    /// Sets the VF token (Linux 5.7). Opening a virtual function of this device requires it, and so does
    /// opening this device again while a virtual function is open. It is valid until another one is set,
    /// and cannot be read.
    ///
    /// # Errors
    /// `Unsupported` if this is not a physical function of an SR-IOV device.
    pub fn set_vf_token(&self, token: VfToken) -> Result<()> {
        vfio_feature::set_vf_token(self.device.as_fd(), token.0).map_err(|errno| {
            let error = Error::os(errno, "set the VF token of", &self.info.name);
            match errno {
                Errno::ENOTTY => error.with_reason(
                    "it is not a physical function of an SR-IOV device, or its driver does not support VF tokens",
                ),
                _ => error,
            }
        })
    }

    /// Takes over a device file that other code has opened, for example a parent process. `address` is
    /// that of the device, if known. Without it the driver is not known, and the crate does not rely on
    /// faults to fill mappings again.
    ///
    /// # Errors
    /// `Unsupported` if it is not a VFIO device file; it is then closed.
    ///
    /// # Safety
    /// The file is that of the device at `address`, and an IOMMU confines that device: safe code may make
    /// the device read and write any address that it can reach.
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn from_fd(fd: OwnedFd, address: Option<PciAddress>) -> Result<Self> {
        let device = address.map(|address| Sysfs::default().device(address)).transpose()?;
        Self::new(fd, device.as_ref(), AddressSpace::Elsewhere)
    }

    pub(super) fn new(
        fd: OwnedFd,
        device: Option<&PciDevice>,
        space: AddressSpace,
    ) -> Result<Self> {
        let name = match device {
            Some(device) => device.address().to_string(),
            None => format!("the device of file descriptor {}", fd.as_raw_fd()),
        };
        let reply = vfio::device_info(fd.as_fd()).map_err(|errno| {
            let error = Error::os(errno, "query", &name);
            match errno {
                // EINVAL: a container that is not set up, or a device's own file that is not bound.
                Errno::ENOTTY | Errno::EINVAL => error
                    .into_kind(ErrorKind::Unsupported)
                    .with_reason("it is not a VFIO device file, or is not ready")
                    .with_advice(
                        "pass the file that VFIO_GROUP_GET_DEVICE_FD returns, or one that is bound to an \
                         iommufd",
                    ),
                _ => error,
            }
        })?;
        if reply.num_regions > MAX_REGIONS {
            return Err(Error::new(ErrorKind::Malformed, "query", name)
                .with_reason(format!("it claims {} regions", reply.num_regions)));
        }
        let regions = (0..reply.num_regions)
            .map(|index| read_region(&fd, index, &name))
            .collect::<Result<Vec<_>>>()?;
        let by_vfio_pci = device.and_then(PciDevice::driver).as_deref() == Some("vfio-pci");
        let open = device.map(|device| OpenHere::register(device.address()));
        // vfio-pci resets a device when it is opened, and supports VFIO_DEVICE_RESET if that worked
        // (vfio_pci_core_enable). Only the first open of a device does it. Who has opened a file that was taken
        // over, and when, is not known.
        let resettable = reply.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        let is_taken_over = matches!(space, AddressSpace::Elsewhere);
        let is_first = !is_taken_over && open.as_ref().is_some_and(OpenHere::is_only_one);
        let info = DeviceInfo {
            name,
            pci: reply.flags & VFIO_DEVICE_FLAGS_PCI != 0,
            resettable,
            reset_at_open: is_first && by_vfio_pci && resettable,
            region_count: reply.num_regions,
            irq_count: reply.num_irqs,
        };
        let accounting = Accounting::new(space.counter());
        Ok(Self {
            device: Arc::new(fd),
            info,
            regions,
            by_vfio_pci,
            space,
            accounting,
            generation: fork::generation(),
            max_mappings: AtomicUsize::new(usize::MAX),
            _open: open,
        })
    }

    /// The file by which KVM knows the device's address space: that of its group, or the device's own
    /// (`KVM_DEV_VFIO_FILE_ADD` of a `KVM_DEV_TYPE_VFIO` device; up to Linux 6.5 `KVM_DEV_VFIO_GROUP_ADD`). `None`
    /// if other code opened the device.
    ///
    /// A hypervisor adds it before the guest runs, so that KVM knows of non-coherent DMA.
    pub fn kvm_file(&self) -> Option<BorrowedFd<'_>> {
        match &self.space {
            AddressSpace::Group(group) => Some(group.as_fd()),
            AddressSpace::Ioas(_) => Some(self.device.as_fd()),
            AddressSpace::Elsewhere => None,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.info.name
    }

    pub(super) fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn find(&self, index: u32, operation: &'static str) -> Result<&Region> {
        self.regions.get(index as usize).and_then(Option::as_ref).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, operation, self.info.region_name(index))
                .with_reason("the device has no such region")
        })
    }

    /// The offset of an access in the device's file.
    fn locate(&self, index: u32, offset: u64, len: usize, operation: &'static str) -> Result<i64> {
        let Region { info, start } = self.find(index, operation)?;
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= info.size);
        start
            .checked_add(offset)
            .and_then(|at| i64::try_from(at).ok())
            .filter(|_| inside)
            .ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, operation, self.info.region_name(index))
                    .with_reason(format!(
                        "{len} bytes at {offset:#x} leave its {:#x} bytes",
                        info.size
                    ))
            })
    }

    /// Removes `memory`, which could not be mapped, from the accounting, and adds the reason to the error.
    #[cold]
    fn not_mapped(&self, error: Error, iova: u64, memory: &DmaMemory) -> Error {
        let no_memory = error.errno() == Some(libc::ENOMEM);
        match self.accounting.remove_refused(memory, no_memory) {
            Some(Ok(exceeded)) => exceeded.error(dma::object(iova, memory.size() as u64)),
            Some(Err(shortage)) => error.with_reason(shortage),
            None => error,
        }
    }

    fn finish(
        &self,
        done: std::result::Result<usize, Errno>,
        len: usize,
        index: u32,
        operation: &'static str,
    ) -> Result<()> {
        match done {
            Ok(count) if count == len => Ok(()),
            Ok(count) => Err(Error::new(ErrorKind::Os, operation, self.info.region_name(index))
                .with_reason(format!("the kernel transferred {count} of {len} bytes"))),
            Err(errno) => {
                let error = Error::os(errno, operation, self.info.region_name(index));
                Err(match errno {
                    Errno::EIO => error.with_reason(
                        "the device does not respond: memory decoding is off, or it is in low power or \
                         gone",
                    ),
                    _ => error,
                })
            }
        }
    }
}

/// `None` if the region is not implemented: the kernel returns EINVAL or a size of zero.
fn read_region(fd: &OwnedFd, index: u32, name: &str) -> Result<Option<Region>> {
    match vfio::region_info(fd.as_fd(), index) {
        Ok(reply) => {
            let (info, start) = RegionInfo::from_vfio(&reply)?;
            Ok((info.size != 0).then_some(Region { info, start }))
        }
        Err(Errno::EINVAL) => Ok(None),
        Err(errno) => Err(Error::os(errno, "query", format!("region {index} of {name}"))),
    }
}

impl Transport for Vfio {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        Ok(self.find(index, "find")?.info.clone())
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let at = self.locate(region, offset, data.len(), "read")?;
        let done = pread(self.device.as_fd(), data, at);
        self.finish(done, data.len(), region, "read")
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let at = self.locate(region, offset, data.len(), "write")?;
        let done = pwrite(self.device.as_fd(), data, at);
        self.finish(done, data.len(), region, "write")
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        let Region { info, start } = self.find(region, "map")?;
        if !info.mappable {
            return Err(Error::new(ErrorKind::NotMappable, "map", self.info.region_name(region))
                .with_reason("the kernel does not allow mapping it"));
        }
        let file = self.device.clone();
        Ok(if self.by_vfio_pci {
            RegionFile::vfio_pci(file, *start)
        } else {
            // Another VFIO driver, or a file that other code opened (`from_fd`).
            RegionFile::untrusted(file, *start)
        })
    }

    fn reset(&self) -> Result<()> {
        vfio_reset::reset(self.device.as_fd()).map_err(|errno| {
            let error = Error::os(errno, "reset", &self.info.name);
            match errno {
                Errno::EINVAL | Errno::ENOTTY => error
                    .into_kind(ErrorKind::Unsupported)
                    .with_reason("the kernel knows no function-level reset for it"),
                _ => error,
            }
        })
    }

    fn affected_by_hot_reset(&self) -> Result<Vec<AffectedDevice>> {
        hot_reset::affected(self.device.as_fd(), &self.info.name)
    }

    fn hot_reset(&self, others: &[&dyn Transport]) -> Result<()> {
        let others: Vec<_> = others.iter().map(|other| other.info().name).collect();
        let by_group = match self.space {
            AddressSpace::Group(_) => true,
            AddressSpace::Ioas(_) => false,
            AddressSpace::Elsewhere => {
                return Err(Error::new(ErrorKind::Unsupported, "hot reset", &self.info.name)
                    .with_reason("other code opened its device file and may have its group")
                    .with_advice("reset it in the program that opened it"));
            }
        };
        hot_reset::perform(self.device.as_fd(), &self.info.name, &others, by_group)
    }

    fn enter_low_power(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        let device = self.device.as_fd();
        match wakeup {
            None => vfio_feature::enter_low_power(device),
            Some(eventfd) => vfio_feature::enter_low_power_until_woken(device, eventfd),
        }
        .map_err(|errno| {
            let error = Error::os(errno, "enter low power on", &self.info.name);
            match errno {
                Errno::ENOTTY => error.with_reason(
                    "its driver does not support that (vfio-pci does since Linux 6.1)",
                ),
                Errno::EINVAL => {
                    error.into_kind(ErrorKind::InUse).with_reason("it is in low power already")
                }
                _ => error,
            }
        })
    }

    fn exit_low_power(&self) -> Result<()> {
        vfio_feature::exit_low_power(self.device.as_fd())
            .map_err(|errno| Error::os(errno, "wake", &self.info.name))
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        irq::info(self.device.as_fd(), index, &self.info.name)
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        irq::set(self.device.as_fd(), index, start, fds, &self.info.name)
    }

    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        let action = if masked { Action::Mask } else { Action::Unmask };
        irq::act(self.device.as_fd(), index, vectors, action, &self.info.name)
    }

    fn unmask_irq_by(&self, index: u32, vector: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        irq::unmask_by(self.device.as_fd(), index, vector, fd, &self.info.name)
    }

    fn trigger_irqs(&self, index: u32, vectors: Range<u32>) -> Result<()> {
        irq::act(self.device.as_fd(), index, vectors, Action::Trigger, &self.info.name)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        let mut limits = self.space.limits(&self.info.name)?;
        limits.lockable_bytes = self.accounting.lockable_bytes();
        if let Some(available) = limits.available_mappings {
            let max = self.accounting.count().saturating_add(available as usize);
            self.max_mappings.store(max, Ordering::Relaxed);
        }
        Ok(limits)
    }

    fn address_space(&self) -> Option<AddressSpaceId> {
        self.space.id()
    }

    fn dma_buf(&self, region: u32, range: Range<u64>, access: Access) -> Result<OwnedFd> {
        let info = &self.find(region, "make a dma-buf of")?.info;
        let name = self.info.region_name(region);
        dma_buf::export(self.device.as_fd(), region, info, range, access, &name)
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        self.dma_map_named(iova, memory, access).map(drop)
    }

    fn dma_map_named(
        &self,
        iova: u64,
        memory: &DmaMemory,
        access: Access,
    ) -> Result<Option<MappedBy>> {
        let count = self.accounting.count();
        // Devices of one container share the limit, and another may have unmapped some: query it again.
        if count >= self.max_mappings.load(Ordering::Relaxed)
            && self.dma_limits()?.available_mappings == Some(0)
        {
            return Err(dma::too_many(count, memory.size(), iova));
        }
        let done = match self.accounting.add(memory) {
            Ok(()) => self
                .accounting
                .map(iova, memory, || self.space.map(iova, memory, access, &self.info.name)),
            Err(exceeded) => Err(exceeded.error(dma::object(iova, memory.size() as u64))),
        };
        done.map(Some).map_err(|error| self.not_mapped(error, iova, memory))
    }

    fn dma_address(&self, iova: u64, size: u64) -> Result<u64> {
        self.space.device_address(iova, size)
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        let kept = self.accounting.unmap(iova, || self.space.unmap(iova, size, &self.info.name))?;
        self.accounting.remove(kept.as_ref().map_or(size, DmaMemory::lockable));
        Ok(())
    }
}

impl Drop for Vfio {
    fn drop(&mut self) {
        let forked = self.generation != fork::generation();
        // Unmaps the memory that is kept here, if its users have not. Other devices in the same address
        // space could still reach it after it is dropped.
        for (iova, memory) in self.accounting.take_kept() {
            if forked {
                // The mapping is the parent's.
                continue;
            }
            if let Err(error) = self.space.unmap(iova, memory.size() as u64, &self.info.name) {
                log::error!("leaked what a device may still reach: {error}");
                std::mem::forget(memory);
            }
        }
    }
}

/// The device's file, for ioctls that this crate does not have. The crate does not prevent you from changing
/// the device's state behind its back.
impl AsFd for Vfio {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl fmt::Debug for Vfio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vfio({})", self.info.name)
    }
}
