//! The ways to open a device.

use std::sync::Arc;

use super::cdev::{self, Ioas};
use super::dma::AddressSpace;
use super::group::Group;
use super::token::VfToken;
use super::{Confinement, PciAddress, PciDevice, Sysfs, Vfio, noiommu};
use crate::error::{Error, ErrorKind, Result};

/// Options for cases that [`Vfio::open`] does not cover.
///
/// ```no_run
/// use vfio_remap::transport::{Vfio, VfToken};
/// # fn main() -> vfio_remap::Result<()> {
/// let token: VfToken = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse()?;
/// let function = Vfio::options().vf_token(token).open("0000:04:10.0".parse()?)?;
/// // Another one, by its group whatever else there is, that reaches the same memory at the same addresses.
/// let second = Vfio::options().beside(&function).by_group().open("0000:05:00.0".parse()?)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct VfioOptions<'a> {
    way: Option<Way>,
    beside: Option<&'a Vfio>,
    token: Option<VfToken>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Group,
    Cdev,
}

impl<'a> VfioOptions<'a> {
    /// By its IOMMU group (`/dev/vfio/N`), whatever else the kernel offers.
    pub fn by_group(self) -> Self {
        Self { way: Some(Way::Group), ..self }
    }

    /// By a file of its own (`/dev/vfio/devices/vfioN`) and iommufd (Linux 6.6).
    pub fn by_cdev(self) -> Self {
        Self { way: Some(Way::Cdev), ..self }
    }

    /// In the address space of another device: what is mapped for one, the other reaches, too. It leaves
    /// that again when it is closed.
    ///
    /// Both are opened the same way. Open all of them before [`Device::dma`](crate::Device::dma) is asked
    /// which addresses there are: each device may narrow them.
    pub fn beside(self, other: &'a Vfio) -> Self {
        Self { beside: Some(other), ..self }
    }

    /// With the token of an SR-IOV function whose physical function a VFIO driver has, too (by group Linux
    /// 5.7, by a file of its own Linux 6.17).
    ///
    /// A virtual function needs the token that [`Vfio::set_vf_token`] has set; so does the physical one
    /// while virtual ones are open. Opening the physical one with a token sets it.
    pub fn vf_token(self, token: VfToken) -> Self {
        Self { token: Some(token), ..self }
    }

    /// Opens the device at `address`.
    ///
    /// # Errors
    /// As [`Vfio::open`]; `VfToken` where a token is missing, wrong, or given where none is taken;
    /// `Unsupported` where the way that was asked for is not there, or not the way of the device
    /// [`beside`](Self::beside) it.
    pub fn open(self, address: PciAddress) -> Result<Vfio> {
        self.open_in(&Sysfs::default(), address)
    }

    pub(super) fn open_in(self, sysfs: &Sysfs, address: PciAddress) -> Result<Vfio> {
        let device = bound(sysfs, address)?;
        if !noiommu::is_confined(&device) {
            return Err(noiommu::unconfined("open", address));
        }
        self.open_device(&device, Confinement::Iommu)
    }

    /// Opens the device at `address`, which no IOMMU confines: see [`Vfio::open_noiommu`].
    ///
    /// # Errors
    /// As [`Vfio::open_noiommu`], and as [`open`](Self::open).
    ///
    /// # Safety
    /// As [`Vfio::open_noiommu`].
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn open_noiommu(self, address: PciAddress) -> Result<Vfio> {
        self.open_unconfined(address)
    }

    /// As [`open_noiommu`](Self::open_noiommu), whose contract the caller has passed on.
    pub(super) fn open_unconfined(self, address: PciAddress) -> Result<Vfio> {
        let device = Sysfs::default().device(address)?;
        if noiommu::is_confined(&device) {
            return Err(noiommu::confined(&device));
        }
        if !is_bound(&device) || !noiommu::is_in_mode(&device) {
            return Err(noiommu::not_in_mode(&device));
        }
        self.open_device(&device, Confinement::None)
    }

    fn open_device(self, device: &PciDevice, confinement: Confinement) -> Result<Vfio> {
        if let Some(other) = self.beside {
            return self.open_beside(device, confinement, other);
        }
        match self.way {
            Some(Way::Group) => self.by_group_in(device, confinement, None),
            Some(Way::Cdev) => self.by_cdev_in(device, confinement, None),
            None => self.open_by_either(device, confinement),
        }
    }

    fn open_by_either(self, device: &PciDevice, confinement: Confinement) -> Result<Vfio> {
        let group_is_open = device.iommu_group().and_then(Group::open_here).is_some();
        if !cdev::is_offered(device, confinement) || group_is_open {
            return self.by_group_in(device, confinement, None);
        }
        match self.by_cdev_in(device, confinement, None) {
            // A user may have been given the group's file, and neither the device's nor iommufd's; and
            // Linux 6.6 to 6.16 takes VF tokens by group only, which looks as if the device were open.
            Err(error)
                if error.kind() == ErrorKind::PermissionDenied
                    || error.kind() == ErrorKind::InUse && self.token.is_some() =>
            {
                let by_group = self.by_group_in(device, confinement, None);
                by_group.map_err(|group| match group.kind() {
                    // Neither way is open to the user: the first counts.
                    ErrorKind::PermissionDenied | ErrorKind::NotFound | ErrorKind::InUse => error,
                    _ => group,
                })
            }
            other => other,
        }
    }

    fn open_beside(
        self,
        device: &PciDevice,
        confinement: Confinement,
        other: &Vfio,
    ) -> Result<Vfio> {
        let apart = |reason: String| {
            Error::new(ErrorKind::Unsupported, "open", device.address())
                .because(reason)
                .remedy("open both the same way, or this one with an address space of its own")
        };
        let name = other.name();
        if other.address_space().confinement() != Some(confinement) {
            return Err(apart(match other.address_space() {
                AddressSpace::Elsewhere => {
                    format!("the address space of {name} is that of whoever opened it")
                }
                _ => format!("an IOMMU confines one of it and {name}, and not the other"),
            }));
        }
        match (other.address_space(), self.way) {
            (AddressSpace::Group(group), None | Some(Way::Group)) => {
                self.by_group_in(device, confinement, Some(group))
            }
            (AddressSpace::Ioas(ioas), None | Some(Way::Cdev)) => {
                self.by_cdev_in(device, confinement, Some(ioas.clone()))
            }
            (AddressSpace::Group(_), _) => {
                Err(apart(format!("{name} is opened by its group, not by iommufd")))
            }
            _ => Err(apart(format!("{name} is opened by iommufd, not by its group"))),
        }
    }

    fn by_group_in(
        self,
        device: &PciDevice,
        confinement: Confinement,
        beside: Option<&Group>,
    ) -> Result<Vfio> {
        let group = Group::of(device, confinement, beside)?;
        let fd = group.device_fd(device, self.token)?;
        Vfio::new(fd, Some(device), AddressSpace::Group(group))
    }

    fn by_cdev_in(
        self,
        device: &PciDevice,
        confinement: Confinement,
        beside: Option<Arc<Ioas>>,
    ) -> Result<Vfio> {
        let (fd, ioas) = cdev::open_device(device, confinement, beside, self.token)?;
        Vfio::new(fd, Some(device), AddressSpace::Ioas(ioas))
    }
}

/// The device at `address`, which a VFIO driver holds.
fn bound(sysfs: &Sysfs, address: PciAddress) -> Result<PciDevice> {
    let device = sysfs.device(address)?;
    if is_bound(&device) {
        return Ok(device);
    }
    let reason = match device.driver() {
        Some(driver) => format!("it is bound to {driver}"),
        None => "no driver is bound to it".to_owned(),
    };
    Err(Error::new(ErrorKind::NotBound, "open", address).because(reason).remedy(format!(
        "bind it to vfio-pci: PciDevice::bind_vfio_pci, or driverctl set-override {address} vfio-pci"
    )))
}

/// Whether a VFIO driver holds the device; variant drivers (`mlx5_vfio_pci`, `nvgrace_gpu_vfio_pci`) are
/// some, too.
fn is_bound(device: &PciDevice) -> bool {
    device.driver().is_some_and(|name| name.contains("vfio"))
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
            Vfio::options().open_in(&Sysfs::at(&self.0), address).unwrap_err()
        }

        /// The group that VFIO makes up for a device without an IOMMU.
        fn make_up_group(&self) {
            let group = self.0.join("kernel/iommu_groups/7");
            std::fs::create_dir_all(&group).unwrap();
            std::fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
            symlink(&group, self.0.join("bus/pci/devices/0000:00:03.0/iommu_group")).unwrap();
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_device_without_an_iommu_is_refused_with_what_switches_one_on() {
        let tree = Tree::new(Some("vfio-pci"));
        for _ in 0..2 {
            let error = tree.open();
            assert_eq!(error.kind(), ErrorKind::NoIommu);
            assert!(error.to_string().contains("intel_iommu=on"), "{error}");
            // In no-IOMMU mode it has a group, which confines nothing.
            if !tree.0.join("kernel").exists() {
                tree.make_up_group();
            }
        }
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
