//! `cargo lab test`.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::boot::Lab;
use crate::cache::Store;
use crate::command;
use crate::guest::Payload;
use crate::kernels::{KERNELS, Kernel, NEWEST};
use crate::payload;
use crate::report::{self, Row};
use crate::ui;

/// In the name of each test that wants a machine without an IOMMU. All others
/// want one with.
const WITHOUT_IOMMU: &str = "without_iommu";

/// Boots each kernel with the guest tests, and `newest` once more without an
/// IOMMU. Whether all that the mirror still has passed.
pub fn guest(
    lab: &Lab,
    store: &Store,
    kernels: &[&'static Kernel],
    libtest: &[String],
) -> Result<bool> {
    let program = payload::guest_tests()?;
    let with_iommu = arguments(["--test-threads=1", "--skip", WITHOUT_IOMMU], libtest);
    let mut rows = Vec::new();
    for kernel in kernels {
        let Some(image) = kernel.image(store)? else {
            let reason =
                "the mirror does not have it any more, and neither does the cache".to_owned();
            rows.push(Row {
                label: kernel.name.to_owned(),
                result: report::Result::Skipped(reason),
            });
            continue;
        };
        let mut boot = |iommu: bool, arguments: &[String], label: String| -> Result<()> {
            let payload = Payload { program: &program, arguments };
            let outcome = lab.boot(&image, iommu, &payload, &label)?;
            let result = report::Result::Ran { version: image.version.clone(), outcome };
            rows.push(Row { label, result });
            Ok(())
        };
        boot(true, &with_iommu, kernel.name.to_owned())?;
        if kernel.name == NEWEST {
            let names = tests_without_iommu(&program, libtest)?;
            let arguments = arguments(["--test-threads=1", "--exact"], libtest);
            if !names.is_empty() {
                boot(false, &[names, arguments].concat(), format!("{NEWEST}-without-iommu"))?;
            }
        }
    }
    println!("\n{}", report::table(&rows));
    // If the mirror has none of the kernels, nothing was tested.
    let passed = rows.iter().any(Row::ran) && rows.iter().all(Row::passed);
    if !passed {
        ui::error("not all is well in the guests: see the table above");
    }
    Ok(passed)
}

/// The tests that want a machine without an IOMMU, of those that the user's
/// arguments select. libtest runs what matches any of its filters, so it
/// cannot itself be told both.
fn tests_without_iommu(program: &Path, libtest: &[String]) -> Result<Vec<String>> {
    let mut list = Command::new(program);
    list.args(["--list", "--format", "terse"]).args(libtest);
    Ok(command::output(&mut list)?
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|name| name.contains(WITHOUT_IOMMU))
        .map(str::to_owned)
        .collect())
}

fn arguments<const N: usize>(ours: [&str; N], theirs: &[String]) -> Vec<String> {
    ours.iter().map(|&argument| argument.to_owned()).chain(theirs.iter().cloned()).collect()
}

/// The kernels that the user named, or all.
pub fn selected(named: &[&'static Kernel]) -> Vec<&'static Kernel> {
    if named.is_empty() { KERNELS.iter().collect() } else { named.to_vec() }
}
