//! Reset of one device, and of all on a bus.

use std::sync::Arc;

use vfio_remap::transport::{Vfio, VfioOptions};
use vfio_remap::{Device, ErrorKind, Window};

use crate::{lab, leftovers};

/// VET, which a reset of e1000e or igb sets to the Ethertype of VLANs (Intel 82576 datasheet, §8.2.7; igb
/// has a second one above it).
const VET: usize = 0x38;
const VET_AFTER_RESET: u32 = 0x8100;

struct Twin {
    device: Device,
    window: Window,
}

impl Twin {
    fn new(name: &str, options: VfioOptions<'_>) -> Self {
        let device = Device::new(Arc::new(options.open(lab::address(name)).unwrap()));
        device.config().unwrap().set_memory_decoding(true).unwrap();
        let window = lab::map_all(&device, 0);
        Self { device, window }
    }

    fn mark(&self) {
        self.window.register(VET).unwrap().write(0x1234u32);
        assert_eq!(self.vet(), 0x1234);
    }

    fn vet(&self) -> u32 {
        self.window.register(VET).unwrap().read()
    }

    fn close(self) {
        drop(self.window);
        self.device.close().unwrap();
    }
}

/// The ways to open a device on this kernel.
fn ways() -> Vec<VfioOptions<'static>> {
    let mut ways = vec![Vfio::options().by_group()];
    if lab::kernel() == "patched" {
        ways.push(Vfio::options().by_cdev());
    }
    ways
}

#[test]
fn a_window_reaches_its_device_after_a_function_reset() {
    leftovers::none_of(|| {
        let device = lab::open("igb");
        assert!(device.info().resettable && device.info().reset_at_open);
        let window = lab::map_all(&device, 0);
        let vet = window.register(VET).unwrap();
        vet.write(0x1234u32);
        assert!(device.reset().unwrap().is_over());
        assert_eq!(vet.read() & 0xffff, VET_AFTER_RESET);
        drop((vet, window));
        device.close().unwrap();
        let device = lab::open("edu");
        let error = device.reset().unwrap_err();
        assert_eq!((error.kind(), device.info().resettable), (ErrorKind::Unsupported, false));
        assert!(error.errno().is_some(), "{error}");
        device.close().unwrap();
    });
}

#[test]
fn a_hot_reset_resets_both_functions_behind_a_port() {
    for way in ways() {
        leftovers::none_of(|| {
            let [one, other] = ["twin0", "twin1"].map(|name| Twin::new(name, way));
            let affected = one.device.affected_by_hot_reset().unwrap();
            let found: Vec<_> = affected.iter().map(|device| device.address).collect();
            assert_eq!(found, [lab::address("twin0"), lab::address("twin1")]);
            assert!(affected.iter().all(|device| device.owned), "{affected:?}");
            assert_eq!(affected[1].driver.as_deref(), Some("vfio-pci"));
            one.mark();
            other.mark();
            // The other one's driver may not know: it has to be named.
            let error = one.device.hot_reset(&[]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotOwned, "{error}");
            let words = format!("{}, which this process has open", lab::address("twin1"));
            assert!(error.to_string().contains(&words), "{error}");
            assert_eq!((one.vet(), other.vet()), (0x1234, 0x1234));
            assert!(one.device.hot_reset(&[&other.device]).unwrap().is_over());
            assert_eq!((one.vet(), other.vet()), (VET_AFTER_RESET, VET_AFTER_RESET));
            other.mark();
            one.close();
            // One that is not open, and whose group is ours, is reset along.
            assert!(other.device.hot_reset(&[]).unwrap().is_over());
            assert_eq!(other.vet(), VET_AFTER_RESET);
            other.close();
        });
    }
}

#[test]
fn a_hot_reset_names_the_function_that_is_not_ours() {
    let twin1 = lab::address("twin1");
    for way in ways() {
        leftovers::none_of(|| {
            std::fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", twin1.to_string()).unwrap();
            let one = Twin::new("twin0", way);
            one.mark();
            let error = one.device.hot_reset(&[]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotOwned, "{error}");
            let words = format!("{twin1}, which has no driver");
            assert!(error.to_string().contains(&words), "{error}");
            assert!(error.advice().contains("bind them to vfio-pci"), "{error}");
            assert_eq!(one.vet(), 0x1234);
            one.close();
            lab::sysfs("twin1").bind_vfio_pci().unwrap().keep();
        });
    }
}

#[test]
fn a_device_without_a_bridge_above_it_has_no_hot_reset() {
    let device = lab::open("edu");
    for error in [device.affected_by_hot_reset().unwrap_err(), device.hot_reset(&[]).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("no bridge"), "{error}");
    }
    device.close().unwrap();
}
