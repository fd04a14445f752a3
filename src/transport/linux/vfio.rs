//! One device through Linux VFIO.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET};

use super::cdev::{self, Ioas};
use super::dma::{self, AddressSpace};
use super::group::Group;
use super::mapped::Mapped;
use super::{PciAddress, PciDevice, Sysfs, irq};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::vfio;
use crate::sys::vfio_irq::Action;
use crate::transport::{DeviceInfo, DmaLimits, IrqInfo, RegionFile, RegionInfo, Transport};

/// More regions than any device has; the kernel would have to be wrong.
const MAX_REGIONS: u32 = 1024;

/// A device that Linux VFIO has given to this process.
///
/// Dropping it closes the device, then its group.
pub struct Vfio {
    device: Arc<OwnedFd>,
    info: DeviceInfo,
    regions: Vec<Option<Region>>,
    /// Whether sysfs says that the driver is vfio-pci itself, whose mappings refault.
    by_vfio_pci: bool,
    space: AddressSpace,
    mapped: Mutex<Mapped>,
    /// How many mappings that can be, as far as was known when the limits were last asked for.
    most: AtomicUsize,
}

struct Region {
    info: RegionInfo,
    /// Where the region lies in the device's file.
    start: u64,
}

impl Vfio {
    /// Opens the device at `address`: by a file of its own and iommufd where the kernel offers that, else
    /// by its IOMMU group. Devices of one group that are open in this process share an address space for
    /// DMA; others have one each.
    ///
    /// # Errors
    /// `NotFound`; `NotBound` where a kernel driver has the device, or none; `NoIommu`;
    /// `GroupNotViable`, naming the devices in the way; `PermissionDenied`; `InUse` where the group is
    /// open already. Each says what to do.
    pub fn open(address: PciAddress) -> Result<Self> {
        Self::open_in(&Sysfs::default(), address)
    }

    fn open_in(sysfs: &Sysfs, address: PciAddress) -> Result<Self> {
        let device = bound(sysfs, address)?;
        if !cdev::is_offered(&device) || Group::is_open(&device) {
            return Self::by_group(&device);
        }
        match Self::by_cdev(&device, None) {
            // A user may have been given the group's file, and neither the device's nor iommufd's.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Self::by_group(&device).map_err(|_| error)
            }
            other => other,
        }
    }

    /// Opens the device by its IOMMU group (`/dev/vfio/N`), whatever else the kernel offers.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_by_group(address: PciAddress) -> Result<Self> {
        Self::by_group(&bound(&Sysfs::default(), address)?)
    }

    /// Opens the device by a file of its own (`/dev/vfio/devices/vfioN`) and iommufd.
    ///
    /// # Errors
    /// As [`open`](Self::open); `Unsupported` where the kernel offers none.
    pub fn open_by_cdev(address: PciAddress) -> Result<Self> {
        Self::by_cdev(&bound(&Sysfs::default(), address)?, None)
    }

    /// Opens another device in the same address space: what is mapped for one, the other reaches, too.
    ///
    /// # Errors
    /// As [`open_by_cdev`](Self::open_by_cdev); `Unsupported` where this device is not opened by iommufd.
    pub fn open_beside(&self, address: PciAddress) -> Result<Self> {
        let AddressSpace::Ioas(ioas) = &self.space else {
            return Err(Error::new(ErrorKind::Unsupported, "open", address)
                .because(format!("the address space of {} is not iommufd's", self.info.name)));
        };
        Self::by_cdev(&bound(&Sysfs::default(), address)?, Some(ioas.clone()))
    }

    fn by_group(device: &PciDevice) -> Result<Self> {
        let group = Group::of(device)?;
        let fd = group.device_fd(device)?;
        Self::new(fd, Some(device), AddressSpace::Group(group))
    }

    fn by_cdev(device: &PciDevice, beside: Option<Arc<Ioas>>) -> Result<Self> {
        let (fd, ioas) = cdev::open_device(device, beside)?;
        Self::new(fd, Some(device), AddressSpace::Ioas(ioas))
    }

    /// Takes over a device file that somebody else has opened, such as a parent that passed it on.
    /// `address` tells which device it is, if known: without it nothing is known of its driver, and
    /// its mappings are not trusted to refault.
    ///
    /// # Errors
    /// `Unsupported` where it is not a VFIO device file; it is closed then.
    ///
    /// # Safety
    /// The file is that of the device at `address`, and an IOMMU confines that device: a program in
    /// safe Rust may make it read and write any address that it can reach.
    pub unsafe fn from_fd(fd: OwnedFd, address: Option<PciAddress>) -> Result<Self> {
        let device = address.map(|address| Sysfs::default().device(address)).transpose()?;
        Self::new(fd, device.as_ref(), AddressSpace::Elsewhere)
    }

    fn new(fd: OwnedFd, device: Option<&PciDevice>, space: AddressSpace) -> Result<Self> {
        let name = match device {
            Some(device) => device.address().to_string(),
            None => format!("the device of file descriptor {}", fd.as_raw_fd()),
        };
        let answer = vfio::device_info(fd.as_fd()).map_err(|errno| {
            Error::os(errno, "query", &name).because("it is no VFIO device file")
        })?;
        if answer.num_regions > MAX_REGIONS {
            return Err(Error::new(ErrorKind::Malformed, "query", name)
                .because(format!("it claims {} regions", answer.num_regions)));
        }
        let regions = (0..answer.num_regions)
            .map(|index| read_region(&fd, index, &name))
            .collect::<Result<Vec<_>>>()?;
        let info = DeviceInfo {
            name,
            pci: answer.flags & VFIO_DEVICE_FLAGS_PCI != 0,
            resettable: answer.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            regions: answer.num_regions,
            irqs: answer.num_irqs,
        };
        let by_vfio_pci = device.and_then(PciDevice::driver).as_deref() == Some("vfio-pci");
        Ok(Self {
            device: Arc::new(fd),
            info,
            regions,
            by_vfio_pci,
            space,
            mapped: Mutex::default(),
            most: AtomicUsize::new(usize::MAX),
        })
    }

    fn find(&self, index: u32, operation: &'static str) -> Result<&Region> {
        self.regions.get(index as usize).and_then(Option::as_ref).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, operation, self.info.region_name(index))
                .because("the device has no such region")
        })
    }

    /// Where an access lies in the device's file.
    fn locate(&self, index: u32, offset: u64, len: usize, operation: &'static str) -> Result<i64> {
        let Region { info, start } = self.find(index, operation)?;
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= info.size);
        start
            .checked_add(offset)
            .and_then(|at| i64::try_from(at).ok())
            .filter(|_| inside)
            .ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, operation, self.info.region_name(index))
                    .because(format!("{len} bytes at {offset:#x} leave its {:#x} bytes", info.size))
            })
    }

    fn mapped(&self) -> MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
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
                .because(format!("{count} of {len} bytes were done"))),
            Err(errno) => {
                let error = Error::os(errno, operation, self.info.region_name(index));
                Err(match errno {
                    Errno::EIO => error.because(
                        "the device does not answer: memory decoding is off, it sleeps, or it has gone",
                    ),
                    _ => error,
                })
            }
        }
    }
}

/// The device at `address`, which a VFIO driver holds; variant drivers (`mlx5_vfio_pci`, `nvgrace_gpu_vfio_pci`) do, too.
fn bound(sysfs: &Sysfs, address: PciAddress) -> Result<PciDevice> {
    let device = sysfs.device(address)?;
    let driver = device.driver();
    if driver.as_deref().is_some_and(|name| name.contains("vfio")) {
        return Ok(device);
    }
    let reason = match driver {
        Some(driver) => format!("it is bound to {driver}"),
        None => "no driver is bound to it".to_owned(),
    };
    Err(Error::new(ErrorKind::NotBound, "open", address).because(reason).remedy(format!(
        "bind it to vfio-pci: PciDevice::bind_vfio_pci, or driverctl set-override {address} vfio-pci"
    )))
}

/// `None` where the index is vacant, which the kernel tells by EINVAL or a size of zero.
fn read_region(fd: &OwnedFd, index: u32, name: &str) -> Result<Option<Region>> {
    match vfio::region_info(fd.as_fd(), index) {
        Ok(answer) => {
            let (info, start) = RegionInfo::from_vfio(&answer)?;
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
                .because("the kernel does not let it be mapped"));
        }
        let file = self.device.clone();
        Ok(if self.by_vfio_pci {
            RegionFile::vfio_pci(file, *start)
        } else {
            // Another VFIO driver, or a file whose opener answers for it (`from_fd`).
            RegionFile::untrusted(file, *start)
        })
    }

    fn reset(&self) -> Result<()> {
        vfio::reset(self.device.as_fd()).map_err(|errno| {
            let error = Error::os(errno, "reset", &self.info.name);
            match errno {
                Errno::EINVAL | Errno::ENOTTY => error
                    .into_kind(ErrorKind::Unsupported)
                    .because("it offers no function-level reset that the kernel knows"),
                _ => error,
            }
        })
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
        let limits = self.space.limits(&self.info.name)?;
        if let Some(more) = limits.mappings {
            self.most.store(self.mapped().len().saturating_add(more as usize), Ordering::Relaxed);
        }
        Ok(limits)
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        let mapped = self.mapped().len();
        // Devices of one container share the limit: what another has unmapped meanwhile is asked for.
        if mapped >= self.most.load(Ordering::Relaxed) && self.dma_limits()?.mappings == Some(0) {
            return Err(dma::too_many(mapped, memory.size(), iova));
        }
        let locked = self.space.map(iova, memory, access, &self.info.name)?;
        self.mapped().insert(iova, (memory.clone(), locked));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.space.unmap(iova, size, &self.info.name)?;
        self.mapped().remove(&iova);
        Ok(())
    }
}

impl fmt::Debug for Vfio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vfio({})", self.info.name)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use super::*;

    /// A copy of what sysfs shows of one device.
    struct Tree(PathBuf);

    impl Tree {
        fn new(driver: Option<&str>) -> Self {
            let name = format!("vfio-remap-{}-{}", std::process::id(), driver.unwrap_or("none"));
            let root = std::env::temp_dir().join(name);
            let device = root.join("bus/pci/devices/0000:00:03.0");
            std::fs::create_dir_all(&device).unwrap();
            if let Some(driver) = driver {
                symlink(Path::new("../../drivers").join(driver), device.join("driver")).unwrap();
            }
            Self(root)
        }

        fn open(&self) -> Error {
            let address = "0000:00:03.0".parse().unwrap();
            Vfio::open_in(&Sysfs::at(&self.0), address).unwrap_err()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_device_without_an_iommu_is_refused_with_what_switches_one_on() {
        let error = Tree::new(Some("vfio-pci")).open();
        assert_eq!(error.kind(), ErrorKind::NoIommu);
        assert!(error.to_string().contains("intel_iommu=on"), "{error}");
    }

    #[test]
    fn a_device_of_another_driver_or_none_is_refused_by_name() {
        let error = Tree::new(Some("nvme")).open();
        assert_eq!(error.kind(), ErrorKind::NotBound);
        assert!(error.to_string().contains("bound to nvme"), "{error}");
        let error = Tree::new(None).open();
        assert!(error.to_string().contains("no driver"), "{error}");
    }
}
