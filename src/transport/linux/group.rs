//! IOMMU groups and the container that gives them an address space.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;
use vfio_ioctls::{VfioContainer, VfioError};

use super::PciDevice;
use super::binding::no_iommu;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::vfio;

/// The groups that this process has open.
static OPEN: Mutex<BTreeMap<u32, Weak<Group>>> = Mutex::new(BTreeMap::new());

/// An open IOMMU group in a container of its own, which is its address space for DMA.
pub(super) struct Group {
    fd: OwnedFd,
    /// Closed after the group.
    container: VfioContainer,
}

impl Group {
    /// The group of `device`, opened and attached. A group can be open once: all devices of it that
    /// this process opens share what is returned here.
    pub(super) fn of(device: &PciDevice) -> Result<Arc<Self>> {
        let id = device.iommu_group().ok_or_else(|| no_iommu("open", device.address()))?;
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open.get(&id);
        if let Some(group) = known.and_then(Weak::upgrade) {
            return Ok(group);
        }
        // Another thread may be about to close it: it is no longer to be had, and not yet closed.
        let mut patience = if known.is_some() { 100 } else { 0 };
        let group = loop {
            match Self::new(device, id) {
                Err(error) if error.kind() == ErrorKind::InUse && patience > 0 => {
                    patience -= 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break Arc::new(other?),
            }
        };
        open.retain(|_, group| group.strong_count() > 0);
        open.insert(id, Arc::downgrade(&group));
        Ok(group)
    }

    /// Whether this process has the group of `device` open.
    pub(super) fn is_open(device: &PciDevice) -> bool {
        let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        device.iommu_group().and_then(|id| open.get(&id)?.upgrade()).is_some()
    }

    fn new(device: &PciDevice, id: u32) -> Result<Self> {
        let container = VfioContainer::new(None).map_err(|error| container_error(&error))?;
        let fd = open(id)?;
        check_viable(fd.as_fd(), id, device)?;
        let object = format!("IOMMU group {id}");
        vfio::set_container(fd.as_fd(), &container).map_err(|errno| {
            let error = Error::os(errno, "attach", &object);
            match errno {
                Errno::EINVAL => error.because("the group has a container already"),
                _ => error,
            }
        })?;
        vfio::set_iommu_type1v2(&container).map_err(|errno| set_iommu_error(errno, &object))?;
        Ok(Self { fd, container })
    }

    /// The container, for DMA.
    pub(super) fn container(&self) -> &VfioContainer {
        &self.container
    }

    /// The device's own file.
    pub(super) fn device_fd(&self, device: &PciDevice) -> Result<OwnedFd> {
        let address = device.address();
        let name = CString::new(address.to_string())
            .map_err(|_| Error::new(ErrorKind::NotFound, "open", address))?;
        vfio::device_fd(self.fd.as_fd(), &name).map_err(|errno| {
            let error = Error::os(errno, "open", address);
            match errno {
                Errno::ENODEV => error.because("it has left its VFIO driver meanwhile"),
                Errno::EINVAL => error.because("its driver refuses to open it so"),
                _ => error,
            }
        })
    }
}

fn open(id: u32) -> Result<OwnedFd> {
    let path = PathBuf::from(format!("/dev/vfio/{id}"));
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| {
        let error = Error::io(&error, "open", path.display());
        match error.kind() {
            ErrorKind::PermissionDenied => error.remedy(format!(
                "give it to your user: chown $USER {}, or by a udev rule for SUBSYSTEM==\"vfio\"",
                path.display()
            )),
            ErrorKind::InUse => error
                .because("a group can be open once, and somebody has it open")
                .remedy(format!("find out who: fuser -v {}", path.display())),
            _ => error,
        }
    })?;
    Ok(file.into())
}

fn check_viable(group: BorrowedFd<'_>, id: u32, device: &PciDevice) -> Result<()> {
    let object = format!("IOMMU group {id}");
    let flags = vfio::group_flags(group).map_err(|errno| Error::os(errno, "query", &object))?;
    if flags & VFIO_GROUP_FLAGS_VIABLE != 0 {
        return Ok(());
    }
    let in_the_way = in_the_way(device);
    let in_the_way = match in_the_way.is_empty() {
        true => "a device of it is held by a kernel driver".to_owned(),
        false => in_the_way.join(", "),
    };
    Err(Error::new(ErrorKind::GroupNotViable, "open", device.address())
        .because(format!("IOMMU group {id} is not viable: {in_the_way}"))
        .remedy("bind those devices to vfio-pci, or unbind them"))
}

/// What keeps the device's group from being opened: "0000:00:1f.3 is bound to snd_hda_intel".
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
        Errno::EPERM => error
            .because("the machine does not isolate interrupts")
            .remedy("switch on interrupt remapping, or, trusting the device, set allow_unsafe_interrupts=1 of vfio_iommu_type1"),
        _ => error,
    }
}

fn container_error(error: &VfioError) -> Error {
    const PATH: &str = "/dev/vfio/vfio";
    match error {
        VfioError::OpenContainer(io) => {
            let error = Error::io(io, "open", PATH);
            match error.kind() {
                ErrorKind::NotFound | ErrorKind::Gone => error
                    .because("the kernel has no VFIO, or it is not loaded")
                    .remedy("load it: modprobe vfio-pci"),
                ErrorKind::PermissionDenied => {
                    error.remedy(format!("chmod 666 {PATH}: by itself it gives nothing"))
                }
                _ => error,
            }
        }
        VfioError::VfioExtension => Error::new(ErrorKind::NoIommu, "open", PATH)
            .because("VFIO finds no IOMMU that it can use (type1 v2)")
            .remedy("load the driver: modprobe vfio_iommu_type1"),
        other => Error::new(ErrorKind::Unsupported, "open", PATH).because(other.to_string()),
    }
}
