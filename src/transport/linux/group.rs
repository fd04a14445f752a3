//! IOMMU groups, and the containers that give them an address space.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;
use vfio_ioctls::{VfioContainer, VfioError};

use super::noiommu;
use super::token::{self, VfToken};
use super::{IommuMode, PciDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::vfio;
use crate::transport::AddressSpaceId;

const CONTAINER: &str = "/dev/vfio/vfio";

/// The groups that this process has open.
static OPEN: Mutex<BTreeMap<u32, Weak<Group>>> = Mutex::new(BTreeMap::new());

/// An open IOMMU group, in a container that provides its address space for DMA.
pub(super) struct Group {
    fd: OwnedFd,
    /// Closed after the group. Groups in one address space share it.
    container: Container,
    address_space: AddressSpaceId,
}

#[derive(Clone)]
enum Container {
    /// An IOMMU translates addresses.
    Type1(Arc<VfioContainer>),
    /// No IOMMU translates addresses. The kernel requires a container all the same.
    NoIommu(Arc<OwnedFd>),
}

impl Group {
    /// Opens the group of `device` and attaches it to the container of `beside`, or to a new one. A group
    /// can be open only once, so all its devices that this process opens share the returned value.
    pub(super) fn of(
        device: &PciDevice,
        mode: IommuMode,
        beside: Option<&Self>,
    ) -> Result<Arc<Self>> {
        let address = device.address();
        let id = device.iommu_group().ok_or_else(|| noiommu::iommu_missing("open", address))?;
        let mut open = open_groups();
        let known = open.get(&id);
        if let Some(group) = known.and_then(Weak::upgrade) {
            let wanted = beside.is_none_or(|beside| beside.container.is(&group.container));
            if wanted && group.iommu_mode() == mode {
                return Ok(group);
            }
            return Err(Error::new(ErrorKind::InUse, "open", address)
                .with_reason(format!(
                    "its IOMMU group {id} is open in this process already, in an address space of its own"
                ))
                .with_advice(
                    "close the group's devices first, or open this device first and the others \
                     beside it",
                ));
        }
        // Another thread may be closing the group: its last `Arc` is dropped, but its file is still open.
        let mut retries = if known.is_some() { 100 } else { 0 };
        let group = loop {
            let made = match mode {
                IommuMode::Iommu => Self::with_iommu(device, id, beside),
                IommuMode::NoIommu => Self::without_iommu(id, beside),
            };
            match made {
                Err(error) if error.kind() == ErrorKind::InUse && retries > 0 => {
                    retries -= 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break Arc::new(other?),
            }
        };
        open.retain(|_, group| group.strong_count() > 0);
        open.insert(id, Arc::downgrade(&group));
        Ok(group)
    }

    /// The group with this number, if this process has it open.
    pub(super) fn open_here(id: u32) -> Option<Arc<Self>> {
        open_groups().get(&id)?.upgrade()
    }

    fn with_iommu(device: &PciDevice, id: u32, beside: Option<&Self>) -> Result<Self> {
        let known = beside.and_then(|group| match &group.container {
            Container::Type1(container) => Some(container.clone()),
            Container::NoIommu(_) => None,
        });
        let container = match &known {
            Some(container) => container.clone(),
            None => Arc::new(VfioContainer::new(None).map_err(|error| container_error(&error))?),
        };
        let fd = open(&PathBuf::from(format!("/dev/vfio/{id}")))?;
        check_viable(fd.as_fd(), id, device)?;
        let object = format!("IOMMU group {id}");
        vfio::set_container(fd.as_fd(), &*container)
            .map_err(|errno| set_container_error(errno, &object, known.is_some()))?;
        // A container that already has a group also has an address space.
        if known.is_none() {
            vfio::set_iommu_type1v2(&container).map_err(|errno| set_iommu_error(errno, &object))?;
        }
        Ok(Self {
            fd,
            container: Container::Type1(container),
            address_space: space_of(beside.filter(|_| known.is_some())),
        })
    }

    fn without_iommu(id: u32, beside: Option<&Self>) -> Result<Self> {
        let known = beside.and_then(|group| match &group.container {
            Container::NoIommu(container) => Some(container.clone()),
            Container::Type1(_) => None,
        });
        let object = format!("IOMMU group noiommu-{id}");
        let container = match &known {
            Some(container) => container.clone(),
            None => Arc::new(open_container()?),
        };
        let fd = open(&PathBuf::from(format!("/dev/vfio/noiommu-{id}")))?;
        vfio::set_container(fd.as_fd(), &*container)
            .map_err(|errno| set_container_error(errno, &object, known.is_some()))?;
        if known.is_none() {
            vfio::set_no_iommu(container.as_fd())
                .map_err(|errno| Error::os(errno, "open without an IOMMU", &object))?;
        }
        Ok(Self {
            fd,
            container: Container::NoIommu(container),
            address_space: space_of(beside.filter(|_| known.is_some())),
        })
    }

    /// The container that maps memory for DMA; `None` without an IOMMU.
    pub(super) fn container(&self) -> Option<&VfioContainer> {
        match &self.container {
            Container::Type1(container) => Some(container),
            Container::NoIommu(_) => None,
        }
    }

    /// The address space of its container.
    pub(super) fn address_space(&self) -> AddressSpaceId {
        self.address_space
    }

    /// Whether an IOMMU confines its devices.
    pub(super) fn iommu_mode(&self) -> IommuMode {
        match self.container {
            Container::Type1(_) => IommuMode::Iommu,
            Container::NoIommu(_) => IommuMode::NoIommu,
        }
    }

    /// Opens the file of a device of the group.
    pub(super) fn device_fd(&self, device: &PciDevice, token: Option<VfToken>) -> Result<OwnedFd> {
        let address = device.address();
        let name = match token {
            Some(token) => format!("{address} vf_token={token}"),
            None => address.to_string(),
        };
        let name =
            CString::new(name).map_err(|_| Error::new(ErrorKind::NotFound, "open", address))?;
        vfio::device_fd(self.fd.as_fd(), &name).map_err(|errno| {
            if let Some(error) = token::refused(errno, device, token) {
                return error;
            }
            let error = Error::os(errno, "open", address);
            match errno {
                Errno::ENODEV => error.with_reason("it is no longer bound to a VFIO driver"),
                Errno::EINVAL => error.with_reason("the driver rejected the open request"),
                Errno::EPERM if self.container().is_none() => noiommu::not_capable(error),
                _ => error,
            }
        })
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Container {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Type1(one), Self::Type1(other)) => Arc::ptr_eq(one, other),
            (Self::NoIommu(one), Self::NoIommu(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

fn open_groups() -> MutexGuard<'static, BTreeMap<u32, Weak<Group>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address space of the group `beside`, or a new one.
fn space_of(beside: Option<&Group>) -> AddressSpaceId {
    beside.map_or_else(AddressSpaceId::unique, Group::address_space)
}

/// A container for groups without an IOMMU. `vfio-ioctls` opens only type 1 containers.
fn open_container() -> Result<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).open(CONTAINER);
    let fd = OwnedFd::from(opened.map_err(|error| container_io_error(&error))?);
    match vfio::is_known_version(fd.as_fd()) {
        Ok(true) => Ok(fd),
        Ok(false) => Err(Error::new(ErrorKind::Unsupported, "open", CONTAINER)
            .with_reason("the kernel reports an unknown version of the VFIO API")),
        Err(errno) => Err(Error::os(errno, "query", CONTAINER)),
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let error = Error::io(&error, "open", path.display());
        match error.kind() {
            ErrorKind::PermissionDenied if error.errno() == Some(Errno::EPERM as i32) => {
                noiommu::not_capable(error)
            }
            ErrorKind::PermissionDenied => error.with_advice(format!(
                "give it to your user: chown $USER {}, or a udev rule for SUBSYSTEM==\"vfio\"",
                path.display()
            )),
            ErrorKind::InUse => error
                .with_reason("the group is open already, and can be opened only once")
                .with_advice(format!("find who has it open: fuser -v {}", path.display())),
            _ => error,
        }
    })?;
    Ok(file.into())
}

fn set_container_error(errno: Errno, object: &str, beside: bool) -> Error {
    let error = Error::os(errno, "attach", object);
    match errno {
        Errno::EINVAL => error.with_reason("the group has a container already"),
        _ if beside => error
            .with_reason("it cannot share the other device's address space")
            .with_advice("open it in its own address space: Vfio::options().by_group()"),
        _ => error,
    }
}

fn check_viable(group: BorrowedFd<'_>, id: u32, device: &PciDevice) -> Result<()> {
    let object = format!("IOMMU group {id}");
    let flags = vfio::group_flags(group).map_err(|errno| Error::os(errno, "query", &object))?;
    if flags & VFIO_GROUP_FLAGS_VIABLE != 0 {
        return Ok(());
    }
    let in_the_way = in_the_way(device);
    let in_the_way = match in_the_way.is_empty() {
        true => "a kernel driver is bound to one of its devices".to_owned(),
        false => in_the_way.join(", "),
    };
    Err(Error::new(ErrorKind::GroupNotViable, "open", device.address())
        .with_reason(format!("IOMMU group {id} is not viable: {in_the_way}"))
        .with_advice("bind those devices to vfio-pci, or unbind them"))
}

/// The devices that prevent the device's group from being opened: "0000:00:1f.3 is bound to snd_hda_intel".
pub(super) fn in_the_way(device: &PciDevice) -> Vec<String> {
    let members = device.group_members().unwrap_or_default();
    members
        .iter()
        .filter_map(|member| {
            let driver = member.driver()?;
            let harmless = driver.contains("vfio") || driver == "pci-stub" || driver == "pcieport";
            (!harmless).then(|| format!("{} is bound to {driver}", member.address()))
        })
        .collect()
}

fn set_iommu_error(errno: Errno, object: &str) -> Error {
    let error = Error::os(errno, "set up the IOMMU for", object);
    match errno {
        Errno::EPERM => error.with_reason("the machine does not isolate interrupts").with_advice(
            "enable interrupt remapping, or, if you trust the device, set vfio_iommu_type1's \
                 parameter allow_unsafe_interrupts=1",
        ),
        _ => error,
    }
}

fn container_error(error: &VfioError) -> Error {
    match error {
        VfioError::OpenContainer(error) => container_io_error(error),
        VfioError::VfioExtension => Error::new(ErrorKind::NoIommu, "open", CONTAINER)
            .with_reason("VFIO finds no IOMMU that it can use (type1 v2)")
            .with_advice("load the driver: modprobe vfio_iommu_type1"),
        other => {
            Error::new(ErrorKind::Unsupported, "open", CONTAINER).with_reason(other.to_string())
        }
    }
}

fn container_io_error(error: &io::Error) -> Error {
    let error = Error::io(error, "open", CONTAINER);
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Gone => error
            .with_reason("the kernel has no VFIO, or it is not loaded")
            .with_advice("load it: modprobe vfio-pci"),
        ErrorKind::PermissionDenied => error.with_advice(format!(
            "chmod 666 {CONTAINER}, which by itself gives access to no device"
        )),
        _ => error,
    }
}
