//! The series' own selftests, built with the kernel.

use std::process::Command;

use crate::device::address;

/// What a selftest writes, in the form that the kernel's tests have (TAP). It must end well.
fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(format!("/lab/selftests/{program}")).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}", output.status);
    said
}

/// The selftest for BARs.
fn run_on(device: &str) -> String {
    run("vfio_pci_mremap_test", &[&address(device).to_string()])
}

/// All tests pass, at least so many, and none is skipped.
fn assert_all_pass(said: &str, least: u32) {
    assert_eq!((total(said, "fail"), total(said, "skip")), (0, 0), "{said}");
    assert!(total(said, "pass") >= least, "{said}");
}

/// The number before a word such as `fail`, in the line of totals.
fn total(said: &str, what: &str) -> u32 {
    let totals = said.lines().find(|line| line.starts_with("# Totals:")).unwrap();
    let total = totals.split(' ').find_map(|word| word.strip_prefix(what)?.strip_prefix(':'));
    total.unwrap().parse().unwrap()
}

#[test]
fn mremap_selftest_passes() {
    for device in ["ivshmem4g", "ivshmem64m"] {
        assert_all_pass(&run_on(device), 14);
    }
}

/// Reading a register may have an effect: only a prefetchable BAR is read.
#[test]
fn mremap_selftest_leaves_registers_alone() {
    let said = run_on("nvme");
    assert_eq!((total(&said, "fail"), total(&said, "pass")), (0, 0));
}

/// Shared memory is duplicated. udmabuf, a PCI resource in sysfs, and the rings of perf and of
/// asynchronous I/O are not.
#[test]
fn duplicate_selftest_passes() {
    assert_all_pass(&run("mremap_duplicate", &[]), 12);
}

/// Nor is /dev/mem, or the BAR that vfio-pci has when it is mapped through sysfs.
#[test]
fn pfnmap_selftest_passes() {
    let resource = format!("/sys/bus/pci/devices/{}/resource2", address("ivshmem64m"));
    for file in ["/dev/mem", &resource] {
        assert_all_pass(&run("pfnmap", &["--", file]), 8);
    }
}
