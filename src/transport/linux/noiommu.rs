//! VFIO's no-IOMMU mode (Linux 4.5; by a device's own file Linux 7.3): a device that nothing confines.

use std::fs;
use std::io;

use super::{Confinement, PciAddress, PciDevice};
use crate::error::{Error, ErrorKind};

/// The switch, a parameter of the module `vfio`; there is none in a kernel without the mode.
const SWITCH: &str = "module/vfio/parameters/enable_unsafe_noiommu_mode";

/// Whether an IOMMU confines the device. The group that VFIO makes up for one without is told by its
/// name.
pub(super) fn is_confined(device: &PciDevice) -> bool {
    let confines = match fs::read_to_string(device.path().join("iommu_group/name")) {
        Ok(name) => name.trim() != "vfio-noiommu",
        // Other groups have no name. What cannot be read is not trusted.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    device.iommu_group().is_some() && confines
}

/// Whether a VFIO driver has taken the device in this mode.
pub(super) fn is_in_mode(device: &PciDevice) -> bool {
    device.iommu_group().is_some() || device.own_file(Confinement::None).is_some()
}

/// Nothing confines the device, so safe code does not get it.
pub(super) fn unconfined(operation: &'static str, address: PciAddress) -> Error {
    Error::new(ErrorKind::NoIommu, operation, address).because("no IOMMU confines it").remedy(
        "switch on VT-d or AMD-Vi in the firmware, and boot with intel_iommu=on where the kernel \
             leaves it off; to do without all protection, see Vfio::open_noiommu",
    )
}

/// An IOMMU confines the device, so there is no need of giving that up.
pub(super) fn confined(device: &PciDevice) -> Error {
    Error::new(ErrorKind::Unsupported, "open without IOMMU", device.address())
        .because("an IOMMU confines it")
        .remedy("open it as any other: Vfio::open")
}

/// The mode is needed, and the device is not in it: what is missing for that.
pub(super) fn not_in_mode(device: &PciDevice) -> Error {
    let switch = device.sysfs().root().join(SWITCH);
    let error = Error::new(ErrorKind::NotBound, "open without IOMMU", device.address());
    match fs::read_to_string(&switch).as_deref().map(str::trim) {
        Ok("Y") => error
            .because("no VFIO driver has taken it in no-IOMMU mode")
            .remedy("bind it to vfio-pci again: the mode is read when a device is bound"),
        Ok(_) => error.because("VFIO's no-IOMMU mode is off").remedy(format!(
            "switch it on and bind the device to vfio-pci: echo Y > {}",
            switch.display()
        )),
        Err(_) => error
            .into_kind(ErrorKind::Unsupported)
            .because("the kernel has no no-IOMMU mode, or VFIO is not loaded")
            .remedy(
                "switch on the IOMMU, or load vfio-pci in a kernel that is built with \
                 CONFIG_VFIO_NOIOMMU",
            ),
    }
}

/// Who opens a device without an IOMMU must have CAP_SYS_RAWIO.
pub(super) fn not_capable(error: Error) -> Error {
    error
        .because("opening a device without an IOMMU requires CAP_SYS_RAWIO")
        .remedy("run it as root, or with CAP_SYS_RAWIO: setcap cap_sys_rawio+ep PROGRAM")
}

/// Why there is no memory for DMA by a group of this mode.
pub(super) fn no_addresses(name: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "do DMA with", name)
        .because(
            "no IOMMU translates its addresses, and a group in no-IOMMU mode neither pins memory nor \
             tells where it is",
        )
        .remedy(
            "switch on the IOMMU, or open the device by a file of its own, which does (Linux 7.3 \
             with CONFIG_VFIO_DEVICE_CDEV)",
        )
}
