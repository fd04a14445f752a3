//! A device's file that somebody else has opened: here by the bare ioctls, as a parent or a broker would.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::request_code_none;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd,
};
use vfio_remap::device::Interrupt;
use vfio_remap::transport::Vfio;
use vfio_remap::{Device, ErrorKind, PciAddress, Placement, Strategy};

use crate::{lab, leftovers};

/// A device's file, and the files that its opener keeps for it.
struct Opened {
    device: OwnedFd,
    _kept: Vec<File>,
}

fn file(path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// An ioctl of `linux/vfio.h` or `linux/iommufd.h`, whose argument the caller vouches for.
fn ioctl(file: &impl AsRawFd, number: u32, argument: usize) -> i32 {
    // SAFETY: callers pass a number, or the address of what the ioctl takes, which they hold meanwhile.
    let answer =
        unsafe { libc::ioctl(file.as_raw_fd(), request_code_none!(VFIO_TYPE, number), argument) };
    assert!(answer >= 0, "ioctl {number:#x}: {}", std::io::Error::last_os_error());
    answer
}

fn by_group(address: PciAddress) -> Opened {
    let container = file("/dev/vfio/vfio");
    let group = file(&format!("/dev/vfio/{}", lab::sysfs("edu").iommu_group().unwrap()));
    let name = CString::new(address.to_string()).unwrap();
    let container_fd = container.as_raw_fd();
    ioctl(&group, VFIO_BASE + 4, &raw const container_fd as usize); // VFIO_GROUP_SET_CONTAINER
    ioctl(&container, VFIO_BASE + 2, VFIO_TYPE1v2_IOMMU as usize); // VFIO_SET_IOMMU
    let device = ioctl(&group, VFIO_BASE + 6, name.as_ptr() as usize); // VFIO_GROUP_GET_DEVICE_FD
    // SAFETY: the kernel has just answered this descriptor, and it is nobody else's.
    Opened { device: unsafe { OwnedFd::from_raw_fd(device) }, _kept: vec![group, container] }
}

fn by_cdev(address: PciAddress) -> Opened {
    let own = std::fs::read_dir(format!("/sys/bus/pci/devices/{address}/vfio-dev")).unwrap();
    let own = own.flatten().next().unwrap().file_name();
    let device = file(&format!("/dev/vfio/devices/{}", own.display()));
    let iommu = file("/dev/iommu");
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        iommufd: iommu.as_raw_fd(),
        ..Default::default()
    };
    ioctl(&device, VFIO_BASE + 18, &raw mut bind as usize); // VFIO_DEVICE_BIND_IOMMUFD
    // struct iommu_ioas_alloc: its size, flags, and the number that is answered.
    let mut alloc = [12u32, 0, 0];
    ioctl(&iommu, 0x81, alloc.as_mut_ptr() as usize); // IOMMU_IOAS_ALLOC
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
        pt_id: alloc[2],
        ..Default::default()
    };
    ioctl(&device, VFIO_BASE + 19, &raw mut attach as usize); // VFIO_DEVICE_ATTACH_IOMMUFD_PT
    Opened { device: device.into(), _kept: vec![iommu] }
}

#[test]
fn a_device_file_of_other_code_is_driven_without_dma() {
    let edu = lab::address("edu");
    let mut ways: Vec<fn(PciAddress) -> Opened> = vec![by_group];
    if lab::kernel() == "patched" {
        ways.push(by_cdev);
    }
    for way in ways {
        // Which device it is may be known or not.
        for address in [Some(edu), None] {
            leftovers::none_of(|| {
                let Opened { device, _kept } = way(edu);
                // SAFETY: the file was opened above for this device, and the lab has an IOMMU.
                let vfio = unsafe { Vfio::from_fd(device, address) }.unwrap();
                drives(Device::new(Arc::new(vfio)), address);
            });
        }
    }
}

fn drives(device: Device, address: Option<PciAddress>) {
    match address {
        Some(address) => assert_eq!(device.name(), address.to_string()),
        None => assert!(device.name().contains("file descriptor"), "{}", device.name()),
    }
    device.config().unwrap().set_memory_decoding(true).unwrap();
    let mut window = device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
    let id = |window: &vfio_remap::Window| window.register::<u32>(0).unwrap().read();
    assert_eq!(id(&window), lab::EDU_ID);
    let (copy, duplicated) = window.duplicate(Placement::Anywhere).unwrap();
    let relocated = window.relocate(Placement::Anywhere).unwrap().report;
    // Only a driver that is known to be vfio-pci is trusted to fill a mapping again.
    let expected = match address {
        Some(_) if lab::kernel() == "patched" => Strategy::DontUnmap,
        _ => Strategy::MapAgain,
    };
    assert_eq!([duplicated.strategy, relocated.strategy], [expected; 2]);
    window.register::<u32>(4).unwrap().write(0x1234_5678);
    assert_eq!(copy.register::<u32>(4).unwrap().read(), !0x1234_5678);
    assert_eq!([id(&window), id(&copy)], [lab::EDU_ID; 2]);

    let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
    vectors.trigger(0).unwrap();
    assert_eq!(vectors.wait(0, Duration::from_secs(10)).unwrap(), 1);

    // Its address space is its opener's.
    for error in [device.dma().map(drop), device.hot_reset(&[]).map(drop)].map(Result::unwrap_err) {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("other code opened its device file"), "{error}");
        assert!(!error.advice().is_empty(), "{error}");
    }
    drop((window, copy, vectors));
    device.close().unwrap();
}

#[test]
fn a_file_that_is_no_devices_is_refused_and_closed() {
    leftovers::none_of(|| {
        let group = format!("/dev/vfio/{}", lab::sysfs("edu").iommu_group().unwrap());
        for path in [&group, "/dev/vfio/vfio"] {
            // SAFETY: no device is behind it.
            let error = unsafe { Vfio::from_fd(file(path).into(), None) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{path}: {error}");
            assert!(error.to_string().contains("it is not a VFIO device file"), "{error}");
            assert!(!error.advice().is_empty(), "{error}");
        }
    });
}
