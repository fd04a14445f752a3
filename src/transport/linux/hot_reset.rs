//! Hot reset: resets a bus or slot with every device on it (`linux/vfio.h`; with iommufd since Linux 6.6).

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_DEVID_NOT_OWNED, VFIO_PCI_HOT_RESET_FLAG_DEV_ID, vfio_pci_dependent_device,
    vfio_pci_hot_reset_info,
};

use super::group::Group;
use super::{PciAddress, Sysfs};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::vfio_reset;
use crate::transport::AffectedDevice;
use crate::transport::info_reply::InfoReply;

/// Registers a device as open in this process until this value is dropped. A hot reset must name such a
/// device.
#[derive(Debug)]
pub(super) struct OpenHere(PciAddress);

impl OpenHere {
    pub(super) fn register(address: PciAddress) -> Self {
        *open_here().entry(address).or_default() += 1;
        Self(address)
    }

    /// Whether this process has the device open once.
    pub(super) fn is_only_one(&self) -> bool {
        open_here().get(&self.0) == Some(&1)
    }
}

impl Drop for OpenHere {
    fn drop(&mut self) {
        let mut open = open_here();
        if let Some(count) = open.get_mut(&self.0) {
            *count -= 1;
        }
        open.retain(|_, count| *count > 0);
    }
}

fn open_here() -> MutexGuard<'static, BTreeMap<PciAddress, usize>> {
    static OPEN: Mutex<BTreeMap<PciAddress, usize>> = Mutex::new(BTreeMap::new());
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The devices that a hot reset of `device` resets.
pub(super) fn affected(device: BorrowedFd<'_>, name: &str) -> Result<Vec<AffectedDevice>> {
    let bytes = vfio_reset::hot_reset_info(device).map_err(|errno| {
        let error = Error::os(errno, "hot reset", name);
        match errno {
            Errno::ENODEV => error.into_kind(ErrorKind::Unsupported).with_reason(
                "neither its bus nor its slot can be reset: there is no bridge above it",
            ),
            Errno::ENOTTY => error.with_reason("its driver has no hot reset"),
            Errno::EPERM => error
                .with_reason("another affected device is in no IOMMU group")
                .with_advice("bind all devices of its bus to vfio-pci"),
            _ => error,
        }
    })?;
    let sysfs = Sysfs::default();
    // The kernel reports 16 bits of the domain. All devices on a bus have the same domain.
    let domain = name.parse().ok().map(|address: PciAddress| address.domain);
    read(&InfoReply::new(&bytes, "hot reset information"))?
        .into_iter()
        .map(|mut dependent| {
            let domain = domain.filter(|domain| domain & 0xffff == dependent.address.domain);
            dependent.address.domain = domain.unwrap_or(dependent.address.domain);
            let device = sysfs.entry(dependent.address);
            let owned = match dependent.owner {
                Owner::Group(id) => Group::open_here(id).is_some(),
                Owner::Iommufd(owned) => owned,
            };
            Ok(AffectedDevice { address: dependent.address, driver: device.driver(), owned })
        })
        .collect()
}

/// Resets all affected devices. The caller names those that it has open: `name` and `others`.
pub(super) fn perform(
    device: BorrowedFd<'_>,
    name: &str,
    others: &[String],
    by_group: bool,
) -> Result<()> {
    let affected = affected(device, name)?;
    let named: BTreeSet<&str> = others.iter().map(String::as_str).chain([name]).collect();
    let in_the_way: Vec<_> =
        affected.iter().filter_map(|affected| in_the_way(affected, &named)).collect();
    if !in_the_way.is_empty() {
        return Err(Error::new(ErrorKind::NotOwned, "hot reset", name)
            .with_reason(format!("it would reset other devices too: {}", in_the_way.join(", ")))
            .with_advice(
                "bind them to vfio-pci, open them the same way (with iommufd: beside this one), and \
                 name them",
            ));
    }
    let groups = if by_group { groups_of(&affected) } else { Vec::new() };
    let files: Vec<_> = groups.iter().map(|group| group.as_fd()).collect();
    vfio_reset::hot_reset(device, &files).map_err(|errno| {
        let error = Error::os(errno, "hot reset", name);
        match errno {
            Errno::EINVAL => error.into_kind(ErrorKind::NotOwned).with_reason(format!(
                "this process does not own all affected devices: {}",
                affected.iter().map(AffectedDevice::to_string).collect::<Vec<_>>().join(", ")
            )),
            Errno::EBUSY | Errno::EAGAIN => error
                .into_kind(ErrorKind::InUse)
                .with_reason("one of the devices is being accessed")
                .with_advice("stop their drivers, and try again"),
            _ => error,
        }
    })
}

/// Why an affected device prevents the reset, if it does.
fn in_the_way(affected: &AffectedDevice, named: &BTreeSet<&str>) -> Option<String> {
    let address = affected.address;
    match &affected.driver {
        None => Some(format!("{address}, which has no driver")),
        Some(driver) if !driver.contains("vfio") => Some(format!("{address}, bound to {driver}")),
        _ if !affected.owned => {
            Some(format!("{address}, which this process has not opened the same way"))
        }
        _ if open_here().contains_key(&address)
            && !named.contains(address.to_string().as_str()) =>
        {
            Some(format!("{address}, which this process has open but did not name"))
        }
        _ => None,
    }
}

/// The groups of the devices, each once.
fn groups_of(affected: &[AffectedDevice]) -> Vec<Arc<Group>> {
    let sysfs = Sysfs::default();
    let ids: BTreeSet<u32> =
        affected.iter().filter_map(|device| sysfs.entry(device.address).iommu_group()).collect();
    ids.into_iter().filter_map(Group::open_here).collect()
}

/// A `vfio_pci_dependent_device`.
#[derive(Debug, PartialEq, Eq)]
struct Dependent {
    address: PciAddress,
    owner: Owner,
}

#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// The holder of this IOMMU group.
    Group(u32),
    /// Whether it is the iommufd of the device that was queried.
    Iommufd(bool),
}

fn read(reply: &InfoReply<'_>) -> Result<Vec<Dependent>> {
    let flags = reply.u32(offset_of!(vfio_pci_hot_reset_info, flags))?;
    let count = reply.u32(offset_of!(vfio_pci_hot_reset_info, count))? as usize;
    let first = offset_of!(vfio_pci_hot_reset_info, devices);
    reply
        .array(first, size_of::<vfio_pci_dependent_device>(), count)?
        .map(|at| {
            let owner = reply.u32(at)?;
            let segment = reply.u16(at + offset_of!(vfio_pci_dependent_device, segment))?;
            // Two bytes: the bus, then the device and function.
            let place = reply.u16(at + offset_of!(vfio_pci_dependent_device, bus))?.to_ne_bytes();
            let [bus, devfn] = place;
            let address =
                PciAddress { domain: segment.into(), bus, device: devfn >> 3, function: devfn & 7 };
            let owner = match flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID {
                0 => Owner::Group(owner),
                _ => Owner::Iommufd(owner.cast_signed() != VFIO_PCI_DEVID_NOT_OWNED),
            };
            Ok(Dependent { address, owner })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// argsz, flags, count; then owner, segment, bus and devfn of each.
    fn reply(flags: u32, count: u32, owners: [u32; 2]) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [28, flags, count].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        for (owner, devfn) in owners.into_iter().zip([0x08, 0x0b]) {
            bytes.extend(owner.to_ne_bytes());
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend([0x5e, devfn]);
        }
        bytes
    }

    #[test]
    fn affected_devices_are_read_with_their_owners() {
        let read = |flags, owners| read(&InfoReply::new(&reply(flags, 2, owners), "test")).unwrap();
        let by_group = read(0, [7, 12]);
        let addresses = by_group.iter().map(|device| device.address.to_string());
        assert_eq!(addresses.collect::<Vec<_>>(), ["0001:5e:01.0", "0001:5e:01.3"]);
        assert_eq!((&by_group[0].owner, &by_group[1].owner), (&Owner::Group(7), &Owner::Group(12)));
        let by_iommufd = read(VFIO_PCI_HOT_RESET_FLAG_DEV_ID, [0, u32::MAX]);
        assert_eq!(by_iommufd[0].owner, Owner::Iommufd(true));
        assert_eq!(by_iommufd[1].owner, Owner::Iommufd(false));
    }

    #[test]
    fn a_reply_that_claims_more_devices_than_it_holds_is_malformed() {
        let bytes = reply(0, u32::MAX, [7, 12]);
        let error = read(&InfoReply::new(&bytes, "test")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }

    #[test]
    fn the_error_names_each_device_that_prevents_the_reset() {
        let device = |driver: Option<&str>, owned| AffectedDevice {
            address: "0000:5e:01.3".parse().unwrap(),
            driver: driver.map(str::to_owned),
            owned,
        };
        let why = |affected: &AffectedDevice, named: &[&str]| {
            in_the_way(affected, &named.iter().copied().collect()).unwrap_or_default()
        };
        assert!(why(&device(None, true), &[]).contains("0000:5e:01.3, which has no driver"));
        assert!(why(&device(Some("e1000e"), false), &[]).contains("bound to e1000e"));
        assert!(why(&device(Some("vfio-pci"), false), &[]).contains("not opened"));
        assert_eq!(why(&device(Some("vfio-pci"), true), &[]), "");
        let open = OpenHere::register("0000:5e:01.3".parse().unwrap());
        assert!(why(&device(Some("vfio-pci"), true), &[]).contains("did not name"));
        assert_eq!(why(&device(Some("vfio-pci"), true), &["0000:5e:01.3"]), "");
        drop(open);
        assert_eq!(why(&device(Some("vfio-pci"), true), &[]), "");
    }
}
