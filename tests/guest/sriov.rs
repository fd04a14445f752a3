//! Virtual functions, and the token that opens them.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use vfio_remap::transport::{VfToken, Vfio, VfioOptions};
use vfio_remap::{Device, Error, ErrorKind, PciAddress};

use crate::{lab, leftovers};

const SWITCH: &str = "/sys/module/vfio_pci/parameters/enable_sriov";
const TOKEN: VfToken = VfToken(*b"vfio-remap guest");
const ANOTHER: VfToken = VfToken(*b"another token...");
/// Never set.
const WRONG: VfToken = VfToken(*b"a token too many");

const NO_IDLE_D3: &str = "/sys/module/vfio_pci/parameters/disable_idle_d3";

/// The virtual functions of igb, which vfio-pci takes as soon as they are there.
struct Functions(PathBuf);

impl Functions {
    fn new(count: usize) -> Self {
        if lab::kernel() == "5.10" {
            // It lets an idle physical function sleep although virtual ones are there, and warns when it
            // wakes it with them. Closed like this, it stays awake.
            fs::write(NO_IDLE_D3, "Y").unwrap();
            drop(Vfio::open(lab::address("igb")).unwrap());
        }
        fs::write(SWITCH, "Y").unwrap();
        let device = PathBuf::from(format!("/sys/bus/pci/devices/{}", lab::address("igb")));
        fs::write(device.join("sriov_numvfs"), count.to_string()).unwrap();
        Self(device)
    }

    fn address(&self, index: usize) -> PciAddress {
        let target = fs::read_link(self.0.join(format!("virtfn{index}"))).unwrap();
        target.file_name().unwrap().to_str().unwrap().parse().unwrap()
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        fs::write(self.0.join("sriov_numvfs"), "0").unwrap();
        fs::write(SWITCH, "N").unwrap();
        if lab::kernel() == "5.10" {
            fs::write(NO_IDLE_D3, "N").unwrap();
        }
    }
}

/// The ways to open a device on this kernel.
fn ways() -> Vec<VfioOptions<'static>> {
    let mut ways = vec![Vfio::options().by_group(), Vfio::options()];
    if lab::kernel() == "patched" {
        ways.push(Vfio::options().by_cdev());
    }
    ways
}

#[test]
fn a_virtual_function_opens_with_its_token_only() {
    let functions = Functions::new(2);
    let igb = lab::address("igb");
    let function = functions.address(1);
    for way in ways() {
        leftovers::none_of(|| {
            let refused = |result: Result<Vfio, Error>, words: &str| {
                let error = result.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::VfToken, "{error}");
                assert_eq!(error.errno(), Some(libc::EACCES), "{error}");
                assert!(error.to_string().contains(words), "{error}");
                assert!(!error.advice().is_empty());
            };
            refused(way.open(function), "VfioOptions::vf_token");
            refused(way.vf_token(WRONG).open(function), "not the one");
            let physical = way.open(igb).unwrap();
            physical.set_vf_token(TOKEN).unwrap();
            refused(way.open(function), "VfioOptions::vf_token");
            refused(way.vf_token(WRONG).open(function), "not the one");
            let virtual_function = Arc::new(way.vf_token(TOKEN).open(function).unwrap());
            let device = Device::new(virtual_function);
            assert!(device.bar(0).unwrap().size() > 0);
            // While it is open, the physical one wants the token, too.
            drop(physical);
            refused(way.open(igb), "VfioOptions::vf_token");
            drop(way.vf_token(TOKEN).open(igb).unwrap());
            device.close().unwrap();
            // Now it sets it.
            drop(way.vf_token(ANOTHER).open(igb).unwrap());
            refused(way.vf_token(TOKEN).open(function), "not the one");
            drop(way.vf_token(ANOTHER).open(function).unwrap());
        });
    }
}

#[test]
fn an_open_device_is_told_from_a_refused_token() {
    if lab::kernel() != "patched" {
        // By group, a device can be open twice.
        return;
    }
    let igb = lab::address("igb");
    leftovers::none_of(|| {
        let _open = Vfio::options().by_cdev().vf_token(TOKEN).open(igb).unwrap();
        for way in [Vfio::options(), Vfio::options().by_cdev()] {
            let error = way.vf_token(TOKEN).open(igb).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
            assert!(error.to_string().contains("fuser"), "{error}");
        }
    });
}

#[test]
fn a_token_for_a_device_without_tokens_is_refused() {
    let edu = lab::address("edu");
    for way in ways() {
        leftovers::none_of(|| {
            let error = way.vf_token(TOKEN).open(edu).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::VfToken, "{error}");
            assert!(error.to_string().contains("takes no VF token"), "{error}");
            assert!(error.to_string().contains("open it without a token"), "{error}");
            let vfio = way.open(edu).unwrap();
            let error = vfio.set_vf_token(TOKEN).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("not a physical function"), "{error}");
        });
    }
}
