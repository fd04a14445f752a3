//! A device by a file of its own, its addresses translated by iommufd (Linux 6.6).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;

use super::PciDevice;
use super::binding::no_iommu;
use super::group::in_the_way;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::iommufd;

const IOMMU: &str = "/dev/iommu";

/// An I/O address space, and the file that it lives in. Closing that takes all mappings away.
pub(super) struct Ioas {
    file: OwnedFd,
    id: u32,
}

impl Ioas {
    fn new() -> Result<Self> {
        let file = open(Path::new(IOMMU))?;
        let id = iommufd::ioas_alloc(file.as_fd())
            .map_err(|errno| Error::os(errno, "make an address space in", IOMMU))?;
        Ok(Self { file: file.into(), id })
    }

    pub(super) fn ranges(&self) -> std::result::Result<(Vec<RangeInclusive<u64>>, u64), Errno> {
        iommufd::iova_ranges(self.file.as_fd(), self.id)
    }

    pub(super) fn map(
        &self,
        iova: u64,
        memory: &DmaMemory,
        access: Access,
    ) -> std::result::Result<(), Errno> {
        memory.map_in_ioas(self.file.as_fd(), self.id, iova, access)
    }

    pub(super) fn unmap(&self, iova: u64, size: u64) -> std::result::Result<u64, Errno> {
        iommufd::unmap(self.file.as_fd(), self.id, iova, size)
    }
}

/// The device's own file, if the kernel has made one: `/dev/vfio/devices/vfioN`. Kernels that make none
/// name the device in sysfs all the same, without a device number.
pub(super) fn path(device: &PciDevice) -> Option<PathBuf> {
    let entries = fs::read_dir(device.path().join("vfio-dev")).ok()?;
    let entry = entries.flatten().find(|entry| {
        let is_device = entry.file_name().to_str().is_some_and(|name| name.starts_with("vfio"));
        is_device && entry.path().join("dev").exists()
    })?;
    Some(Path::new("/dev/vfio/devices").join(entry.file_name()))
}

/// Whether a device can be opened so.
pub(super) fn is_offered(device: &PciDevice) -> bool {
    path(device).is_some_and(|path| path.exists()) && Path::new(IOMMU).exists()
}

/// Opens the device in an address space: that of `beside`, or of its group's devices that this process
/// has open already, or one of its own.
pub(super) fn open_device(
    device: &PciDevice,
    beside: Option<Arc<Ioas>>,
) -> Result<(OwnedFd, Arc<Ioas>)> {
    static OPEN: Mutex<BTreeMap<u32, Weak<Ioas>>> = Mutex::new(BTreeMap::new());
    let address = device.address();
    let id = device.iommu_group().ok_or_else(|| no_iommu("open", address))?;
    let path = path(device).ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "open", address)
            .because(
                "the kernel makes no file for each device (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6)",
            )
            .remedy("open it by its group")
    })?;
    let file = open(&path)?;
    let mut spaces = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    spaces.retain(|_, space| space.strong_count() > 0);
    let ioas = match beside.or_else(|| spaces.get(&id)?.upgrade()) {
        Some(ioas) => ioas,
        None => Arc::new(Ioas::new()?),
    };
    iommufd::bind(file.as_fd(), ioas.file.as_fd())
        .and_then(|()| iommufd::attach(file.as_fd(), ioas.id))
        .map_err(|errno| refused(errno, device, &path))?;
    spaces.insert(id, Arc::downgrade(&ioas));
    Ok((file.into(), ioas))
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let error = Error::io(&error, "open", path.display());
        match error.kind() {
            ErrorKind::PermissionDenied => {
                error.remedy(format!("give it to your user: chown $USER {}", path.display()))
            }
            ErrorKind::NotFound => error
                .because("the kernel has no iommufd, or it is not loaded")
                .remedy("load it: modprobe iommufd; or open the device by its group"),
            _ => error,
        }
    })
}

fn refused(errno: Errno, device: &PciDevice, path: &Path) -> Error {
    let others = in_the_way(device);
    if !others.is_empty() {
        return Error::os(errno, "open", device.address())
            .into_kind(ErrorKind::GroupNotViable)
            .because(format!("its IOMMU group is not viable: {}", others.join(", ")))
            .remedy("bind those devices to vfio-pci, or unbind them");
    }
    let error = Error::os(errno, "open", path.display());
    match errno {
        Errno::EINVAL | Errno::EBUSY => error
            .into_kind(ErrorKind::InUse)
            .because("a device can be open once, and somebody has it open, or one of its group")
            .remedy(format!("find out who: fuser -v {}", path.display())),
        Errno::EPERM => error
            .because("the machine does not isolate interrupts")
            .remedy("switch on interrupt remapping, or, trusting the device, set allow_unsafe_interrupts=1 of iommufd"),
        _ => error,
    }
}
