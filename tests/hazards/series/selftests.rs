//! The series' own selftest, built with the kernel.

use std::process::Command;

use crate::device::address;

/// What the selftest writes, in the form that the kernel's tests have (TAP). It must end well.
fn run(device: &str) -> String {
    let output = Command::new("/lab/selftests/vfio_pci_mremap_test")
        .arg(address(device).to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{device}: {}", output.status);
    said
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
        let said = run(device);
        assert_eq!((total(&said, "fail"), total(&said, "skip")), (0, 0), "{device}");
        assert!(total(&said, "pass") >= 7, "{device}");
    }
}

/// Reading a register may have an effect: only a prefetchable BAR is read.
#[test]
fn mremap_selftest_leaves_registers_alone() {
    let said = run("nvme");
    assert_eq!((total(&said, "fail"), total(&said, "pass")), (0, 0));
}
