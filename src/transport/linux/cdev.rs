//! Opening a device by its own file, with iommufd for DMA (Linux 6.6).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;

use super::group::in_the_way;
use super::noiommu;
use super::token::{self, VfToken};
use super::{IommuMode, PciDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::space::Access;
use crate::sys::iommufd;
use crate::sys::mm::{Shareable, ShareableFile};
use crate::transport::AddressSpaceId;

const IOMMU: &str = "/dev/iommu";

/// An I/O address space and its iommufd. Closing the iommufd removes all mappings.
pub(super) struct Ioas {
    file: OwnedFd,
    id: u32,
    mode: IommuMode,
    address_space: AddressSpaceId,
}

impl Ioas {
    fn new(mode: IommuMode) -> Result<Self> {
        let file = open(Path::new(IOMMU))?;
        let id = iommufd::ioas_alloc(file.as_fd())
            .map_err(|errno| Error::os(errno, "allocate an address space in", IOMMU))?;
        let address_space = AddressSpaceId::unique();
        Ok(Self { file: file.into(), id, mode, address_space })
    }

    pub(super) fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// Whether an IOMMU confines its devices. Without one, iommufd pins memory and reports its physical
    /// address, which the device uses.
    pub(super) fn iommu_mode(&self) -> IommuMode {
        self.mode
    }

    pub(super) fn ranges(&self) -> std::result::Result<(Vec<RangeInclusive<u64>>, u64), Errno> {
        iommufd::iova_ranges(self.file.as_fd(), self.id)
    }

    /// Maps memory by its address.
    pub(super) fn map_address(
        &self,
        iova: u64,
        memory: Shareable,
        access: Access,
    ) -> std::result::Result<(), Errno> {
        iommufd::map(self.file.as_fd(), self.id, iova, memory, access)
    }

    /// Maps memory by its file.
    pub(super) fn map_file(
        &self,
        iova: u64,
        memory: ShareableFile<'_>,
        access: Access,
    ) -> std::result::Result<(), Errno> {
        iommufd::map_file(self.file.as_fd(), self.id, iova, memory, access)
    }

    pub(super) fn unmap(&self, iova: u64, size: u64) -> std::result::Result<u64, Errno> {
        iommufd::unmap(self.file.as_fd(), self.id, iova, size)
    }

    /// The physical address of the memory mapped at `iova`, and how many bytes are contiguous from there.
    pub(super) fn physical(&self, iova: u64, size: u64) -> std::result::Result<(u64, u64), Errno> {
        iommufd::physical_address(self.file.as_fd(), self.id, iova, size)
    }
}

/// Whether the device can be opened by its own file.
pub(super) fn is_offered(device: &PciDevice, mode: IommuMode) -> bool {
    device.own_file(mode).is_some_and(|path| path.exists()) && Path::new(IOMMU).exists()
}

/// Opens the device in the address space `beside`. Without it, uses the address space of devices of its
/// group that this process has open, or a new one.
pub(super) fn open_device(
    device: &PciDevice,
    mode: IommuMode,
    beside: Option<Arc<Ioas>>,
    token: Option<VfToken>,
) -> Result<(OwnedFd, Arc<Ioas>)> {
    static OPEN: Mutex<BTreeMap<u32, Weak<Ioas>>> = Mutex::new(BTreeMap::new());
    let path = device.own_file(mode).ok_or_else(|| not_made(device, mode))?;
    let file = open(&path)?;
    let mut spaces = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    spaces.retain(|_, space| space.strong_count() > 0);
    // The kernel lets the devices of a group have one address space only.
    let group = device.iommu_group().filter(|_| mode == IommuMode::Iommu);
    let ioas = match beside.or_else(|| spaces.get(&group?)?.upgrade()) {
        Some(ioas) => ioas,
        None => Arc::new(Ioas::new(mode)?),
    };
    iommufd::bind(file.as_fd(), ioas.file.as_fd(), token.as_ref().map(|VfToken(uuid)| uuid))
        .map_err(|errno| {
            token_refused(errno, device, token, &path)
                .unwrap_or_else(|| refused(errno, device, &path))
        })?;
    iommufd::attach(file.as_fd(), ioas.id).map_err(|errno| refused(errno, device, &path))?;
    if let Some(group) = group {
        spaces.insert(group, Arc::downgrade(&ioas));
    }
    Ok((file.into(), ioas))
}

/// The error if the kernel made no file for this device.
fn not_made(device: &PciDevice, mode: IommuMode) -> Error {
    let error = Error::new(ErrorKind::Unsupported, "open", device.address());
    match mode {
        IommuMode::Iommu => error
            .with_reason(
                "the kernel has no files for single devices (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6)",
            )
            .with_advice("open it by its group: Vfio::options().by_group(), or Vfio::open, which tries both"),
        IommuMode::NoIommu => error
            .with_reason(
                "the kernel has no files for single devices without an IOMMU (CONFIG_VFIO_DEVICE_CDEV and \
                 CONFIG_VFIO_NOIOMMU, Linux 7.3)",
            )
            .with_advice("open it by its group: VfioOptions::by_group"),
    }
}

/// EINVAL also means that the device is bound already, or that the kernel does not accept tokens here.
fn token_refused(
    errno: Errno,
    device: &PciDevice,
    token: Option<VfToken>,
    path: &Path,
) -> Option<Error> {
    if errno == Errno::EINVAL && token.is_some() && token::is_taken(device) {
        let path = path.display();
        return Some(
            Error::os(errno, "open", &path)
                .into_kind(ErrorKind::InUse)
                .with_reason(
                    "it is open already, or the kernel accepts VF tokens only by group (before Linux 6.17)",
                )
                .with_advice(format!("find who has it open: fuser -v {path}; or open it by its group")),
        );
    }
    token::refused(errno, device, token)
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let error = Error::io(&error, "open", path.display());
        match error.kind() {
            ErrorKind::PermissionDenied if error.errno() == Some(Errno::EPERM as i32) => {
                noiommu::not_capable(error)
            }
            ErrorKind::PermissionDenied => {
                error.with_advice(format!("give it to your user: chown $USER {}", path.display()))
            }
            ErrorKind::NotFound => error
                .with_reason("the kernel has no iommufd, or it is not loaded")
                .with_advice("load it: modprobe iommufd; or open the device by its group"),
            _ => error,
        }
    })
}

fn refused(errno: Errno, device: &PciDevice, path: &Path) -> Error {
    let others = in_the_way(device);
    if !others.is_empty() {
        return Error::os(errno, "open", device.address())
            .into_kind(ErrorKind::GroupNotViable)
            .with_reason(format!("its IOMMU group is not viable: {}", others.join(", ")))
            .with_advice("bind those devices to vfio-pci, or unbind them");
    }
    let error = Error::os(errno, "open", path.display());
    match errno {
        Errno::EINVAL | Errno::EBUSY => error
            .into_kind(ErrorKind::InUse)
            .with_reason(
                "it, or another device of its group, is open already, and can be opened only once",
            )
            .with_advice(format!("find who has it open: fuser -v {}", path.display())),
        Errno::EPERM => error.with_reason("the machine does not isolate interrupts").with_advice(
            "enable interrupt remapping, or, if you trust the device, set iommufd's parameter \
                 allow_unsafe_interrupts=1",
        ),
        _ => error,
    }
}
