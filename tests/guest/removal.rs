//! A device that is pulled while it is in use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::Revoked;
use vfio_remap::{Device, ErrorKind, Placement, Window};

use crate::machine::Machine;
use crate::{lab, leftovers};

/// The PCIe slot registers of the root port above a device (PCIe 5.0 §7.5.3.10), written as a pull
/// and a power-off look to pciehp; two writes back to back.
pub fn pull(address: vfio_remap::PciAddress) {
    use std::os::unix::fs::FileExt;
    let device = std::fs::canonicalize(format!("/sys/bus/pci/devices/{address}")).unwrap();
    let config = device.parent().unwrap().join("config");
    let port = std::fs::OpenOptions::new().read(true).write(true).open(config).unwrap();
    let byte = |at: u64| {
        let mut byte = [0];
        port.read_exact_at(&mut byte, at).unwrap();
        u64::from(byte[0])
    };
    let mut capability = byte(0x34);
    while byte(capability) != 0x10 {
        capability = byte(capability + 1);
        assert_ne!(capability, 0, "a root port has a PCI Express capability");
    }
    let control = capability + 0x18;
    let mut value = [0; 2];
    port.read_exact_at(&mut value, control).unwrap();
    let value = u16::from_le_bytes(value);
    for write in [(value & !0x730) | 0x700, (value & !0x700) | 0x138] {
        port.write_all_at(&write.to_le_bytes(), control).unwrap();
    }
}

#[test]
fn verbs_on_a_device_that_was_pulled_answer_and_leave_nothing() {
    let address = lab::address("hot");
    let device = lab::open("hot");
    let mut window = lab::map_all(&device, 0);
    let status = window.register::<u32>(8).unwrap();
    assert_ne!(status.read(), 0);
    pull(address);
    // QEMU answers 0 where nothing is; hardware answers all-ones.
    let end = Instant::now() + Duration::from_secs(20);
    while status.read() != 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(status.read(), 0);
    drop(status);
    // The kernel holds the removal until the device is closed; until then windows are what they were.
    let before = window.addresses();
    let (duplicate, report) = window.duplicate(Placement::Anywhere).unwrap();
    println!("{report}");
    assert_eq!(duplicate.register::<u32>(8).unwrap().read(), 0);
    drop(duplicate);
    window.relocate(Placement::Anywhere).unwrap();
    assert_ne!(window.addresses(), before);
    assert_eq!(window.register::<u32>(8).unwrap().read(), 0);
    // EAGAIN while the kernel is at the slot, ENOTTY where it finds no way to reset what is not there.
    let reset = device.reset().unwrap_err();
    assert!([Some(libc::EAGAIN), Some(libc::ENOTTY)].contains(&reset.errno()), "{reset}");
    assert!(reset.to_string().contains(&format!("cannot reset {address}: E")), "{reset}");
    drop(window);
    device.close().unwrap();
    lab::empty_hot_slot(|| {});
    let gone = Device::open(address).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound, "{gone}");
    lab::plug_hot_in(&mut Machine::open());
    lab::open("hot").close().unwrap();
}

/// An original, a duplicate and one that was relocated.
fn aliases(device: &Device) -> [Window; 3] {
    let original = lab::map_all(device, 0);
    let (duplicate, _) = original.duplicate(Placement::Anywhere).unwrap();
    let (mut relocated, _) = original.duplicate(Placement::Anywhere).unwrap();
    relocated.relocate(Placement::Anywhere).unwrap();
    [original, duplicate, relocated]
}

/// A thread of a driver, which reads and writes registers until its window is gone. e1000e's VLAN type (0x38) keeps
/// what is written to it (Intel 82574 datasheet, §10.2.2.7).
fn drive(window: &Window, turns: &AtomicU64) {
    let (status, kept) =
        (window.register::<u32>(8).unwrap(), window.register::<u32>(0x38).unwrap());
    let end = Instant::now() + Duration::from_secs(120);
    while status.try_read().is_ok() {
        kept.write(0x8100);
        turns.fetch_add(1, Ordering::Relaxed);
        assert!(Instant::now() < end, "it is never gone");
    }
}

#[test]
fn a_device_that_was_pulled_is_gone_and_no_access_faults() {
    let mut machine = Machine::open();
    let address = lab::address("hot");
    lab::in_rounds("pulled", 2, |_| {
        leftovers::none_of(|| {
            let device = lab::open("hot");
            let config = device.config().unwrap();
            let vendor = config.vendor_id().unwrap();
            let windows = aliases(&device);
            assert!(!device.gone() && !windows.iter().any(Window::gone));
            let turns: [AtomicU64; 3] = Default::default();
            std::thread::scope(|scope| {
                for (window, turns) in windows.iter().zip(&turns) {
                    scope.spawn(|| drive(window, turns));
                }
                let end = Instant::now() + Duration::from_secs(60);
                while turns.iter().any(|turns| turns.load(Ordering::Relaxed) == 0) {
                    assert!(Instant::now() < end, "the threads do not get on");
                    std::thread::yield_now();
                }
                pull(address);
                while !device.gone() {
                    assert!(Instant::now() < end, "nobody notices");
                    std::thread::yield_now();
                }
            });
            // The kernel goes on to answer what it keeps of configuration space itself.
            assert_eq!(config.vendor_id().unwrap(), vendor);
            assert_eq!(config.class_code().unwrap(), 0xff_ffff);
            for window in &windows {
                assert_eq!(window.revoked(), Some(Revoked::Gone));
                assert!(window.gone());
                let status = window.register::<u32>(8).unwrap();
                assert_eq!(status.read(), u32::MAX);
                window.register::<u32>(0x38).unwrap().write(0);
                let error = status.try_read().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Revoked, "{error}");
            }
            drop(windows);
            device.close().unwrap();
        });
        lab::empty_hot_slot(|| {});
        lab::plug_hot_in(&mut machine);
        let device = lab::open("hot");
        assert!(!device.gone());
        device.close().unwrap();
    });
}
