//! A device that is pulled while it is in use.

use std::time::{Duration, Instant};

use vfio_remap::{Device, Placement};

use crate::lab;
use crate::machine::Machine;

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
    lab::until_gone("hot");
    let gone = Device::open(address).unwrap_err();
    assert_eq!(gone.kind(), vfio_remap::ErrorKind::NotFound, "{gone}");
    // The slot stays without power for a second (PCIe 5.0 §6.7.1.8).
    std::thread::sleep(Duration::from_millis(1200));
    lab::plug_hot_in(&mut Machine::open());
    lab::open("hot").close().unwrap();
}
