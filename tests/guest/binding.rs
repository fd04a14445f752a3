//! Binding to vfio-pci, and giving back what was there.

use vfio_remap::transport::Sysfs;
use vfio_remap::{Device, ErrorKind};

use crate::{lab, leftovers};

fn overridden() -> String {
    let path = format!("/sys/bus/pci/devices/{}/driver_override", lab::address("spare"));
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn a_bound_device_opens_and_gets_its_driver_back() {
    let spare = lab::sysfs("spare");
    assert_eq!(spare.driver().as_deref(), Some("serial"));
    let before = overridden();
    {
        let binding = spare.bind_vfio_pci().unwrap();
        assert_eq!(spare.driver().as_deref(), Some("vfio-pci"));
        let device = Device::open(binding.device().address()).unwrap();
        device.close().unwrap();
    }
    assert_eq!((spare.driver().as_deref(), overridden()), (Some("serial"), before.clone()));
    spare.bind_vfio_pci().unwrap().restore().unwrap();
    assert_eq!((spare.driver().as_deref(), overridden()), (Some("serial"), before));
}

#[test]
fn binding_what_is_bound_already_changes_nothing() {
    let edu = lab::sysfs("edu");
    edu.bind_vfio_pci().unwrap().restore().unwrap();
    assert_eq!(edu.driver().as_deref(), Some("vfio-pci"));
}

#[test]
fn devices_are_found_with_what_sysfs_knows_of_them() {
    let devices = Sysfs::default().devices().unwrap();
    let edu = devices.iter().find(|device| device.address() == lab::address("edu")).unwrap();
    assert_eq!((edu.vendor_id().unwrap(), edu.device_id().unwrap()), (0x1234, 0x11e8));
    let nvme = lab::sysfs("nvme");
    assert_eq!(nvme.class_code().unwrap(), 0x01_0802);
    assert_eq!(nvme.group_members().unwrap().len(), 1);
}

#[test]
fn a_viable_group_opens_once_the_neighbour_is_bound() {
    leftovers::none_of(|| {
        let error = Device::open(lab::address("crowded")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::GroupNotViable);
        let neighbour = lab::sysfs("neighbour");
        let named = format!("{} is bound to serial", neighbour.address());
        assert!(error.to_string().contains(&named), "{error}");
        let binding = neighbour.bind_vfio_pci().unwrap();
        // A group can be open once, and both devices of it are open at a time.
        let both = ["crowded", "neighbour"].map(|name| Device::open(lab::address(name)).unwrap());
        both.into_iter().for_each(|device| device.close().unwrap());
        binding.restore().unwrap();
        assert_eq!(neighbour.driver().as_deref(), Some("serial"));
    });
}

#[test]
fn without_iommu_a_device_is_not_bound_and_keeps_its_driver() {
    let spare = lab::sysfs("spare");
    for error in [spare.bind_vfio_pci().unwrap_err(), Device::open(spare.address()).unwrap_err()] {
        let expected = [ErrorKind::NoIommu, ErrorKind::NotBound];
        assert!(expected.contains(&error.kind()), "{error}");
    }
    let error = spare.bind_vfio_pci().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoIommu);
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");
    assert_eq!(spare.driver().as_deref(), Some("serial"));
    assert_eq!(overridden().trim(), "(null)");
}
