//! Options for opening a device.

use std::sync::Arc;

use super::cdev::{self, Ioas};
use super::dma::AddressSpace;
use super::group::Group;
use super::token::VfToken;
use super::{IommuMode, PciAddress, PciDevice, Sysfs, Vfio, noiommu};
use crate::error::{Error, ErrorKind, Result};

/// Options for cases that [`Vfio::open`] does not cover.
///
/// ```no_run
/// use vfio_remap::transport::{Vfio, VfToken};
/// # fn main() -> vfio_remap::Result<()> {
/// let token: VfToken = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse()?;
/// let function = Vfio::options().vf_token(token).open("0000:04:10.0")?;
/// // A second device, opened by its group, that reaches the same memory at the same addresses.
/// let second = Vfio::options().beside(&function).by_group().open("0000:05:00.0")?;
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
    /// Opens the device by its IOMMU group (`/dev/vfio/N`), even if the kernel offers its own file.
    pub fn by_group(self) -> Self {
        Self { way: Some(Way::Group), ..self }
    }

    /// Opens the device by its own file (`/dev/vfio/devices/vfioN`) and iommufd (Linux 6.6).
    pub fn by_cdev(self) -> Self {
        Self { way: Some(Way::Cdev), ..self }
    }

    /// Opens the device in the address space of another one, until it is closed: memory that is mapped
    /// for one of them is mapped for both.
    ///
    /// Both must be opened the same way. Open all of them before the first call of
    /// [`Device::dma`](crate::Device::dma): each device may narrow the range of addresses.
    pub fn beside(self, other: &'a Vfio) -> Self {
        Self { beside: Some(other), ..self }
    }

    /// Passes the VF token of an SR-IOV function whose physical function is bound to a VFIO driver (by
    /// group Linux 5.7, by its own file Linux 6.17).
    ///
    /// A virtual function requires the token that [`Vfio::set_vf_token`] has set. The physical function
    /// requires it while virtual ones are open; otherwise, opening it with a token sets the token.
    pub fn vf_token(self, token: VfToken) -> Self {
        Self { token: Some(token), ..self }
    }

    /// Opens the device at `address`, a [`PciAddress`] or text.
    ///
    /// # Errors
    /// As [`Vfio::open`]; `VfToken` if a token is missing, wrong, or given although the device takes
    /// none; `Unsupported` if the kernel does not offer the requested way, or the device
    /// [`beside`](Self::beside) it was opened another way.
    pub fn open<A>(self, address: A) -> Result<Vfio>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        self.open_in(&Sysfs::default(), address.try_into()?)
    }

    pub(super) fn open_in(self, sysfs: &Sysfs, address: PciAddress) -> Result<Vfio> {
        let device = bound(sysfs, address)?;
        if !noiommu::has_iommu(&device) {
            return Err(noiommu::iommu_missing("open", address));
        }
        self.open_device(&device, IommuMode::Iommu)
    }

    /// Opens the device at `address`, which no IOMMU confines: see [`Vfio::open_noiommu`].
    ///
    /// # Errors
    /// As [`Vfio::open_noiommu`], and as [`open`](Self::open).
    ///
    /// # Safety
    /// As [`Vfio::open_noiommu`].
    #[expect(unsafe_code, reason = "the caller vouches for what no type shows")]
    pub unsafe fn open_noiommu<A>(self, address: A) -> Result<Vfio>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        self.open_without_iommu(address.try_into()?)
    }

    /// As [`open_noiommu`](Self::open_noiommu). The callers have its contract.
    pub(super) fn open_without_iommu(self, address: PciAddress) -> Result<Vfio> {
        let device = Sysfs::default().device(address)?;
        if noiommu::has_iommu(&device) {
            return Err(noiommu::iommu_present(&device));
        }
        if !is_bound(&device) || !noiommu::is_in_mode(&device) {
            return Err(noiommu::not_in_mode(&device));
        }
        self.open_device(&device, IommuMode::NoIommu)
    }

    fn open_device(self, device: &PciDevice, mode: IommuMode) -> Result<Vfio> {
        if let Some(other) = self.beside {
            return self.open_beside(device, mode, other);
        }
        match self.way {
            Some(Way::Group) => self.by_group_in(device, mode, None),
            Some(Way::Cdev) => self.by_cdev_in(device, mode, None),
            None => self.open_by_either(device, mode),
        }
    }

    fn open_by_either(self, device: &PciDevice, mode: IommuMode) -> Result<Vfio> {
        let group_is_open = device.iommu_group().and_then(Group::open_here).is_some();
        if !cdev::is_offered(device, mode) || group_is_open {
            return self.by_group_in(device, mode, None);
        }
        match self.by_cdev_in(device, mode, None) {
            // The user may have access to the group's file, but not to the device's or iommufd's. And
            // Linux 6.6 to 6.16 accepts VF tokens only by group; otherwise it reports that the device is
            // open.
            Err(error)
                if error.kind() == ErrorKind::PermissionDenied
                    || error.kind() == ErrorKind::InUse && self.token.is_some() =>
            {
                let by_group = self.by_group_in(device, mode, None);
                by_group.map_err(|group| match group.kind() {
                    // Neither way works: report the error of the first.
                    ErrorKind::PermissionDenied | ErrorKind::NotFound | ErrorKind::InUse => error,
                    _ => group,
                })
            }
            other => other,
        }
    }

    fn open_beside(self, device: &PciDevice, mode: IommuMode, other: &Vfio) -> Result<Vfio> {
        let apart = |reason: String| {
            Error::new(ErrorKind::Unsupported, "open", device.address())
                .with_reason(reason)
                .with_advice("open both the same way, or this one in its own address space")
        };
        let name = other.name();
        if other.address_space().iommu_mode() != Some(mode) {
            return Err(apart(match other.address_space() {
                AddressSpace::Elsewhere => {
                    format!("other code opened {name} and has its address space")
                }
                _ => format!("an IOMMU confines either it or {name}, but not both"),
            }));
        }
        match (other.address_space(), self.way) {
            (AddressSpace::Group(group), None | Some(Way::Group)) => {
                self.by_group_in(device, mode, Some(group))
            }
            (AddressSpace::Ioas(ioas), None | Some(Way::Cdev)) => {
                self.by_cdev_in(device, mode, Some(ioas.clone()))
            }
            (AddressSpace::Group(_), _) => {
                Err(apart(format!("{name} was opened by its group, not by iommufd")))
            }
            _ => Err(apart(format!("{name} was opened by iommufd, not by its group"))),
        }
    }

    fn by_group_in(
        self,
        device: &PciDevice,
        mode: IommuMode,
        beside: Option<&Group>,
    ) -> Result<Vfio> {
        let group = Group::of(device, mode, beside)?;
        let fd = group.device_fd(device, self.token)?;
        Vfio::new(fd, Some(device), AddressSpace::Group(group))
    }

    fn by_cdev_in(
        self,
        device: &PciDevice,
        mode: IommuMode,
        beside: Option<Arc<Ioas>>,
    ) -> Result<Vfio> {
        let (fd, ioas) = cdev::open_device(device, mode, beside, self.token)?;
        Vfio::new(fd, Some(device), AddressSpace::Ioas(ioas))
    }
}

/// The device at `address`, if it is bound to a VFIO driver.
fn bound(sysfs: &Sysfs, address: PciAddress) -> Result<PciDevice> {
    let device = sysfs.device(address)?;
    if is_bound(&device) {
        return Ok(device);
    }
    let reason = match device.driver() {
        Some(driver) => format!("it is bound to {driver}"),
        None => "no driver is bound to it".to_owned(),
    };
    Err(Error::new(ErrorKind::NotBound, "open", address).with_reason(reason).with_advice(format!(
        "bind it to vfio-pci: PciDevice::bind_vfio_pci, or driverctl set-override {address} vfio-pci"
    )))
}

/// Whether the device is bound to a VFIO driver: vfio-pci, or a variant (`mlx5_vfio_pci`,
/// `nvgrace_gpu_vfio_pci`).
fn is_bound(device: &PciDevice) -> bool {
    device.driver().is_some_and(|name| name.contains("vfio"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use super::*;

    /// A copy of sysfs with one device.
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

        /// Adds the group that VFIO creates for a device without an IOMMU.
        fn add_noiommu_group(&self) {
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
    fn a_device_without_an_iommu_is_refused_with_advice() {
        let tree = Tree::new(Some("vfio-pci"));
        for _ in 0..2 {
            let error = tree.open();
            assert_eq!(error.kind(), ErrorKind::NoIommu);
            assert!(error.to_string().contains("intel_iommu=on"), "{error}");
            // In no-IOMMU mode the device has a group too.
            if !tree.0.join("kernel").exists() {
                tree.add_noiommu_group();
            }
        }
    }

    #[test]
    fn the_error_names_a_driver_that_is_not_vfio() {
        let error = Tree::new(Some("nvme")).open();
        assert_eq!(error.kind(), ErrorKind::NotBound);
        assert!(error.to_string().contains("bound to nvme"), "{error}");
        let error = Tree::new(None).open();
        assert!(error.to_string().contains("no driver"), "{error}");
    }
}
