//! What goes wrong says what, on which object, why, and what to do; and leaves nothing behind.

use vfio_remap::transport::Vfio;
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Placement, Reservation};

use crate::{lab, leftovers, noiommu_mode};

/// Runs `f`, which must fail with `kind` and mention `words`, and leave nothing behind.
fn refused<T: std::fmt::Debug>(
    kind: ErrorKind,
    words: &[&str],
    f: impl FnOnce() -> Result<T, Error>,
) {
    let error = leftovers::none_of(|| f().map(|_| ()).unwrap_err());
    assert_eq!(error.kind(), kind, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{error} does not mention {word}");
    }
}

#[test]
fn a_device_that_is_not_there_or_not_ours() {
    let nowhere: PciAddress = "0000:7f:1f.7".parse().unwrap();
    refused(ErrorKind::NotFound, &["0000:7f:1f.7", "lspci"], || Device::open(nowhere));
    let spare = lab::address("spare");
    let words = [&spare.to_string()[..], "bound to serial", "vfio-pci"];
    refused(ErrorKind::NotBound, &words, || Device::open(spare));
}

#[test]
fn a_group_that_is_open_already() {
    let _holder = lab::open("edu");
    let status = lab::child("bad_input::finds_the_group_open", &[], None);
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "a child of the test above: another process has the group open"]
fn finds_the_group_open() {
    refused(ErrorKind::InUse, &["/dev/vfio/", "fuser"], || Device::open(lab::address("edu")));
}

#[test]
fn a_user_without_permission() {
    let status = lab::child("bad_input::is_denied", &[], Some(65534));
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "a child of the test above: it runs as nobody"]
fn is_denied() {
    // Who may open the container and not the group is told of the group.
    refused(ErrorKind::PermissionDenied, &["/dev/vfio/"], || Device::open(lab::address("edu")));
    refused(ErrorKind::PermissionDenied, &["root"], || {
        lab::sysfs("spare").bind_vfio_pci().map(|binding| binding.keep())
    });
}

#[test]
fn ranges_that_make_no_sense() {
    let device = lab::open("edu");
    let bar = device.bar(0).unwrap();
    let map =
        |range: std::ops::Range<u64>| bar.map(range, Placement::Anywhere).map_err(Error::from);
    let edu = lab::address("edu").to_string();
    for range in
        [0..bar.size() + 1, bar.size()..bar.size() + 1, 0..u64::MAX, u64::MAX - 1..u64::MAX]
    {
        refused(ErrorKind::OutOfRange, &["bar 0", &edu, "0x100000"], || map(range));
    }
    for empty in [0..0, bar.size()..bar.size()] {
        refused(ErrorKind::OutOfRange, &["empty"], || map(empty));
    }
    refused(ErrorKind::OutOfRange, &["wraps"], || {
        bar.map(0..=u64::MAX, Placement::Anywhere).map_err(Error::from)
    });
    refused(ErrorKind::NotFound, &["bar 5"], || device.bar(5));
    refused(ErrorKind::NotFound, &["4294967295"], || device.bar(u32::MAX));
    let window = bar.map(.., Placement::Anywhere).unwrap();
    refused(ErrorKind::OutOfRange, &["leaves"], || window.register::<u32>(window.size()));
    refused(ErrorKind::OutOfRange, &["leaves"], || window.register::<u64>(usize::MAX));
    refused(ErrorKind::Unaligned, &["multiple of 4"], || window.register::<u32>(2));
    refused(ErrorKind::OutOfRange, &[], || bar.trapped_register::<u32>(u64::MAX - 1));
    for offset in [bar.size() - 2, bar.size(), u64::MAX - 1] {
        let transport = device.transport();
        refused(ErrorKind::OutOfRange, &["leave"], || transport.read_at(0, offset, &mut [0; 4]));
        refused(ErrorKind::OutOfRange, &["leave"], || transport.write_at(0, offset, &[0; 4]));
    }
    refused(ErrorKind::Unaligned, &[], || bar.trapped_register::<u64>(4));
}

#[test]
fn regions_that_cannot_be_mapped() {
    let device = lab::open("e1000e");
    let map = |index: u32| {
        device.region(index).unwrap().map(.., Placement::Anywhere).map_err(Error::from)
    };
    refused(ErrorKind::NotMappable, &["I/O ports", "Region::trapped_register"], || map(2));
    refused(ErrorKind::NotMappable, &["region 7"], || map(7));
    refused(ErrorKind::NotMappable, &["MSI-X table", "as windows of their own"], || map(3));
}

#[test]
fn placements_that_do_not_fit() {
    let device = lab::open("ivshmem64m");
    let window = lab::map_all(&device, 2);
    let duplicate = |place| window.duplicate(place).map_err(Error::from);
    refused(ErrorKind::UnsuitablePlacement, &["larger"], || {
        duplicate(Placement::In(Reservation::new(4096)?))
    });
    refused(ErrorKind::UnsuitablePlacement, &["congruent", "2 MiB"], || {
        duplicate(Placement::In(Reservation::congruent(64 << 20, 2 << 20, 4096)?))
    });
    refused(ErrorKind::AddressTaken, &["vfio"], || {
        duplicate(Placement::At(window.addresses().start))
    });
    refused(ErrorKind::Unaligned, &["page"], || duplicate(Placement::At(4095)));
}

#[test]
fn a_window_whose_registers_are_alive_stays_where_it_is() {
    let device = lab::open("edu");
    let mut window = lab::map_all(&device, 0);
    let register = window.register::<u32>(0).unwrap();
    let at = window.addresses();
    let place = Reservation::new(window.size()).unwrap();
    let range = place.range();
    let failed = window.relocate(Placement::In(place)).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::InUse);
    assert!(failed.to_string().contains("1 registers, clones"), "{failed}");
    assert_eq!(failed.into_reservation().unwrap().range(), range);
    assert_eq!((window.addresses(), register.read()), (at, lab::EDU_ID));
    let still = window.into_reservation().unwrap_err();
    assert_eq!(still.error().kind(), ErrorKind::InUse);
    drop(still);
    let still = device.close().unwrap_err();
    let words = format!("bar 0 of {}", lab::address("edu"));
    assert!(still.to_string().contains(&words), "{still}");
    drop(register);
    still.into_device().close().unwrap();
}

#[test]
fn the_limit_on_mappings_leaves_every_window_as_it_was() {
    const LIMIT: &str = "/proc/sys/vm/max_map_count";
    let device = lab::open("edu");
    let mut window = lab::map_all(&device, 0);
    let at = window.addresses();
    let before = std::fs::read_to_string(LIMIT).unwrap();
    std::fs::write(LIMIT, "400").unwrap();
    let mut duplicates = Vec::new();
    let failed = loop {
        match window.duplicate(Placement::Anywhere) {
            Ok((duplicate, _)) => duplicates.push(duplicate),
            Err(failed) => break failed,
        }
    };
    // Room for the new side of a relocation, and none for what covers the old one.
    duplicates.pop();
    let relocated = window.relocate(Placement::Anywhere);
    std::fs::write(LIMIT, before.trim()).unwrap();
    assert_eq!(failed.kind(), ErrorKind::TooManyMappings, "{failed}");
    assert!(failed.to_string().contains("vm.max_map_count"), "{failed}");
    assert!(duplicates.len() > 200, "{}", duplicates.len());
    match relocated {
        Ok(relocation) => {
            assert!(relocation.old.is_some(), "{}", relocation.report);
            assert_ne!(window.addresses(), at);
        }
        Err(failed) => {
            assert_eq!(failed.kind(), ErrorKind::TooManyMappings, "{failed}");
            assert_eq!(window.addresses(), at);
        }
    }
    for duplicate in &duplicates {
        assert_eq!(duplicate.register::<u32>(0).unwrap().read(), lab::EDU_ID);
    }
    assert_eq!(window.register::<u32>(0).unwrap().read(), lab::EDU_ID);
    drop((duplicates, window));
    device.close().unwrap();
}

#[test]
fn without_iommu_a_missing_mode_is_refused_by_name() {
    let refused =
        |kind, words: &[&str]| refused(kind, words, || noiommu_mode::open(Vfio::options()));
    if lab::kernel() != "patched" {
        refused(ErrorKind::Unsupported, &["CONFIG_VFIO_NOIOMMU", "enable the IOMMU"]);
        return;
    }
    refused(ErrorKind::NotBound, &["mode is off", "echo Y", noiommu_mode::SWITCH]);
    let error = lab::sysfs("edu").bind_vfio_pci().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoIommu, "{error}");
    std::fs::write(noiommu_mode::SWITCH, "Y").unwrap();
    refused(ErrorKind::NotBound, &["bind it to vfio-pci"]);
    std::fs::write(noiommu_mode::SWITCH, "N").unwrap();
}
