//! Low power, entered and left.

use std::time::Duration;

use vfio_remap::device::Revoked;
use vfio_remap::{Device, ErrorKind};

use crate::{lab, leftovers, probe};

/// e1000e's status register, which is never 0.
const STATUS: u64 = 8;

/// What the kernel's power management says of a device: "active", "suspended".
fn status(device: &Device) -> String {
    let path = format!("/sys/bus/pci/devices/{}/power/runtime_status", device.name());
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// Waits until the kernel says so: it suspends and resumes in its own time.
fn becomes(device: &Device, wanted: &str) {
    for _ in 0..500 {
        if status(device) == wanted {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} is {}, not {wanted}", device.name(), status(device));
}

/// Whether this kernel has it (Linux 6.1); if not, it is refused and nothing is left behind.
fn is_offered(device: &Device) -> bool {
    if lab::kernel() != "5.10" {
        return true;
    }
    for _ in 0..2 {
        let error = device.low_power().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("Linux 6.1"), "{error}");
    }
    false
}

#[test]
fn a_sleeping_device_is_reached_through_the_kernel_only() {
    leftovers::none_of(|| {
        let device = lab::open("e1000e");
        let window = lab::map_all(&device, 0);
        let at = window.addresses().start + STATUS as usize;
        let register = window.register::<u32>(STATUS as usize).unwrap();
        if is_offered(&device) {
            for _ in 0..3 {
                let awake = register.read();
                assert_ne!(awake, 0);
                let low_power = device.low_power().unwrap();
                becomes(&device, "suspended");
                // It is revoked before the device sleeps, and restored after.
                assert_eq!(
                    (register.read(), window.revoked()),
                    (u32::MAX, Some(Revoked::LowPower))
                );
                assert_eq!(window.restore().unwrap_err().kind(), ErrorKind::Revoked);
                // The kernel wakes it for these, and no longer than they take.
                let bar = device.bar(0).unwrap();
                assert_eq!(bar.trapped_register::<u32>(STATUS).unwrap().read().unwrap(), awake);
                assert_eq!(device.config().unwrap().vendor_id().unwrap(), 0x8086);
                assert_eq!(register.read(), u32::MAX);
                let error = low_power.woken(Duration::ZERO).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                let error = device.low_power().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
                low_power.wake().unwrap();
                assert_eq!(register.read(), awake);
            }
            drop(device.low_power().unwrap());
            assert!(!window.is_revoked() && probe::load(at).is_some());
        }
        drop((register, window));
        device.close().unwrap();
    });
}

#[test]
fn an_access_through_the_kernel_wakes_a_device() {
    leftovers::none_of(|| {
        let device = lab::open("e1000e");
        let window = lab::map_all(&device, 0);
        let at = window.addresses().start + STATUS as usize;
        if is_offered(&device) {
            let low_power = device.low_power_until_woken().unwrap();
            becomes(&device, "suspended");
            let error = low_power.woken(Duration::ZERO).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            assert_eq!(probe::load(at), Some(u32::MAX));
            assert_eq!(device.config().unwrap().vendor_id().unwrap(), 0x8086);
            low_power.woken(Duration::from_secs(5)).unwrap();
            assert!(!window.is_revoked() && probe::load(at).is_some(), "it does not stay awake");
            // While its sleep is held, the device cannot be closed, and the error says so.
            let still = device.close().unwrap_err();
            assert!(still.to_string().contains("low power"), "{still}");
            let device = still.into_device();
            drop((low_power, window));
            device.close().unwrap();
        }
    });
}
