//! VFIO's no-IOMMU mode, for a device that no IOMMU confines (Linux 4.5; by the device's own file Linux
//! 7.3).

use std::fs;
use std::io;

use super::{IommuMode, PciAddress, PciDevice};
use crate::error::{Error, ErrorKind};

/// The parameter of the module `vfio` that enables the mode. A kernel without the mode does not have it.
const SWITCH: &str = "module/vfio/parameters/enable_unsafe_noiommu_mode";

/// Whether an IOMMU confines the device. Without one, VFIO creates a group that is recognized by its name.
pub(super) fn has_iommu(device: &PciDevice) -> bool {
    let confines = match fs::read_to_string(device.path().join("iommu_group/name")) {
        Ok(name) => name.trim() != "vfio-noiommu",
        // Other groups have no name. A group whose name cannot be read counts as one without an IOMMU.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    device.iommu_group().is_some() && confines
}

/// Whether a VFIO driver has bound the device in this mode.
pub(super) fn is_in_mode(device: &PciDevice) -> bool {
    device.iommu_group().is_some() || device.own_file(IommuMode::NoIommu).is_some()
}

/// The error of safe functions if no IOMMU confines the device.
pub(super) fn iommu_missing(operation: &'static str, address: PciAddress) -> Error {
    Error::new(ErrorKind::NoIommu, operation, address).with_reason("no IOMMU confines it").with_advice(
        "enable VT-d or AMD-Vi in the firmware, and boot with intel_iommu=on if the kernel leaves it \
             disabled; to use the device without protection, see Vfio::open_noiommu",
    )
}

/// The error of `open_noiommu` if an IOMMU confines the device.
pub(super) fn iommu_present(device: &PciDevice) -> Error {
    Error::new(ErrorKind::Unsupported, "open without IOMMU", device.address())
        .with_reason("an IOMMU confines it")
        .with_advice("open it with Vfio::open")
}

/// The error of `open_noiommu` if the device is not in no-IOMMU mode, with what is missing.
pub(super) fn not_in_mode(device: &PciDevice) -> Error {
    let switch = device.sysfs().root().join(SWITCH);
    let error = Error::new(ErrorKind::NotBound, "open without IOMMU", device.address());
    match fs::read_to_string(&switch).as_deref().map(str::trim) {
        Ok("Y") => error.with_reason("no VFIO driver has bound it in no-IOMMU mode").with_advice(
            "bind it to vfio-pci again: the kernel reads the mode when a device is bound",
        ),
        Ok(_) => error.with_reason("VFIO's no-IOMMU mode is off").with_advice(format!(
            "enable it and bind the device to vfio-pci: echo Y > {}",
            switch.display()
        )),
        Err(_) => error
            .into_kind(ErrorKind::Unsupported)
            .with_reason("the kernel has no no-IOMMU mode, or VFIO is not loaded")
            .with_advice(
                "enable the IOMMU, or load vfio-pci on a kernel built with CONFIG_VFIO_NOIOMMU",
            ),
    }
}

/// The error if CAP_SYS_RAWIO is missing, which opening a device without an IOMMU requires.
pub(super) fn not_capable(error: Error) -> Error {
    error.with_reason("opening a device without an IOMMU requires CAP_SYS_RAWIO").with_advice(
        "run the program as root or with CAP_SYS_RAWIO: setcap cap_sys_rawio+ep PROGRAM",
    )
}

/// The error of DMA by a group in no-IOMMU mode.
pub(super) fn no_addresses(name: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "do DMA with", name)
        .with_reason(
            "no IOMMU translates its addresses, and a group in no-IOMMU mode neither pins memory nor \
             reports its physical address",
        )
        .with_advice(
            "enable the IOMMU, or open the device by its own file (Linux 7.3 with \
             CONFIG_VFIO_DEVICE_CDEV)",
        )
}
