//! `cargo lab test`.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::boot::Lab;
use crate::cache::Store;
use crate::command;
use crate::guest::Payload;
use crate::kernels::{KERNELS, Kernel, NEWEST, PATCHED};
use crate::machine::Variant;
use crate::payload;
use crate::report::{self, Row};
use crate::tools::Need;
use crate::ui;

/// In the name of each test that wants a machine without an IOMMU. All others
/// want one with.
const WITHOUT_IOMMU: &str = "without_iommu";

/// Where those of them are that want VFIO's mode for that, which `patched` has.
const NOIOMMU_MODE: &str = "noiommu_mode::";

/// In the name of each test that wants hotplug by ACPI.
const ACPI_HOTPLUG: &str = "acpi_hotplug";

/// Where `tests/hazards` says what the lab's kernel patches promise.
const SERIES: &str = "series::";

/// What the tests of these kernels, or of all if none is named, need programs for.
pub fn needs(
    kernels: &[&'static Kernel],
    host_only: bool,
    mirror: Option<String>,
) -> Result<Vec<Need>> {
    let mut needs = Vec::new();
    if kernels.is_empty() {
        needs.extend([Need::Testing, Need::Fuzzing]);
    }
    if !host_only {
        needs.push(Need::Booting);
        let store = Store::open(mirror)?;
        for kernel in selected(kernels) {
            if kernel.is_to_be_built(&store)? {
                needs.push(Need::Building);
            }
        }
    }
    Ok(needs)
}

/// Boots each kernel with the guest tests, and once more with hotplug by ACPI;
/// `newest` and `patched` once more without an IOMMU, and `patched` once more
/// with the tests of its patches. Whether all that the mirror still has passed.
pub fn guest(
    lab: &Lab,
    store: &Store,
    kernels: &[&'static Kernel],
    libtest: &[String],
) -> Result<bool> {
    let program = payload::guest_tests()?;
    // All before the first boot: what is missing for one is then known early.
    let images = kernels.iter().map(|kernel| kernel.image(store)).collect::<Result<Vec<_>>>()?;
    let special = |name: &str| name.contains(WITHOUT_IOMMU) || name.contains(ACPI_HOTPLUG);
    let usual = only(&program, libtest, |name| !special(name))?;
    let acpi_hotplug = only(&program, libtest, |name| name.contains(ACPI_HOTPLUG))?;
    let mut rows = Vec::new();
    for (kernel, image) in kernels.iter().zip(images) {
        let Some(image) = image else {
            let reason =
                "the mirror does not have it any more, and neither does the cache".to_owned();
            rows.push(Row {
                label: kernel.name.to_owned(),
                result: report::Result::Skipped(reason),
            });
            continue;
        };
        let mut boot = |variant, program: &Path, arguments: &[String], label: &str| -> Result<()> {
            let payload = Payload { program, arguments, files: &[] };
            let outcome = lab.boot(&image, variant, &payload, label)?;
            let result = report::Result::Ran { version: image.version.clone(), outcome };
            rows.push(Row { label: label.to_owned(), result });
            Ok(())
        };
        if let Some(arguments) = &usual {
            boot(Variant::Usual, &program, arguments, kernel.name)?;
        }
        if let Some(arguments) = &acpi_hotplug {
            let label = format!("{}-acpi-hotplug", kernel.name);
            boot(Variant::AcpiHotplug, &program, arguments, &label)?;
        }
        if [NEWEST, PATCHED].contains(&kernel.name) {
            let some = only(&program, libtest, |name| {
                let offered = kernel.name == PATCHED || !name.starts_with(NOIOMMU_MODE);
                name.contains(WITHOUT_IOMMU) && offered
            })?;
            if let Some(arguments) = some {
                let label = format!("{}-without-iommu", kernel.name);
                boot(Variant::WithoutIommu, &program, &arguments, &label)?;
            }
        }
        if kernel.name == PATCHED {
            let hazards = payload::hazards()?;
            if let Some(arguments) = only(&hazards, libtest, |name| name.starts_with(SERIES))? {
                boot(Variant::Usual, &hazards, &arguments, "patched-series")?;
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

/// The arguments that make libtest run, of the tests that the user's arguments
/// select, those that are `wanted`; `None` if there are none. libtest runs what
/// matches any of its filters, so it cannot itself be told both.
fn only(
    program: &Path,
    libtest: &[String],
    wanted: impl Fn(&str) -> bool,
) -> Result<Option<Vec<String>>> {
    let mut list = Command::new(program);
    list.args(["--list", "--format", "terse"]).args(libtest);
    let names: Vec<_> = command::output(&mut list)?
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|name| wanted(name))
        .map(str::to_owned)
        .collect();
    let arguments = arguments(["--test-threads=1", "--exact"], libtest);
    Ok((!names.is_empty()).then(|| [names, arguments].concat()))
}

fn arguments<const N: usize>(ours: [&str; N], theirs: &[String]) -> Vec<String> {
    ours.iter().map(|&argument| argument.to_owned()).chain(theirs.iter().cloned()).collect()
}

/// The kernels that the user named, or all.
pub fn selected(named: &[&'static Kernel]) -> Vec<&'static Kernel> {
    if named.is_empty() { KERNELS.iter().collect() } else { named.to_vec() }
}
