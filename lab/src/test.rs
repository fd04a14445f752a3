//! `cargo lab test`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result};

use crate::boot::Lab;
use crate::cache::Store;
use crate::command;
use crate::guest::Payload;
use crate::kernels::{Image, KERNELS, Kernel, NEWEST, PATCHED};
use crate::machine::{self, Variant};
use crate::payload;
use crate::report::{self, Proof, Row};
use crate::tools::Need;
use crate::ui;

/// In the name of each test that wants a machine without an IOMMU. All others
/// want one with.
const WITHOUT_IOMMU: &str = "without_iommu";

/// Where those of them are that want VFIO's mode for that, which `patched` has.
const NOIOMMU_MODE: &str = "noiommu_mode::";

/// In the name of each test that wants hotplug by ACPI.
const ACPI_HOTPLUG: &str = "acpi_hotplug";

/// In the name of each test that wants an IOMMU that does not remap interrupts.
const WITHOUT_INTREMAP: &str = "without_intremap";

/// Where `tests/hazards` says what the lab's kernel patches promise.
const SERIES: &str = "series::";

/// The examples that run on real devices, and their arguments.
const EXAMPLES: [(&str, &[&str]); 3] = [
    ("tour", &["--device", "@igb"]),
    ("edu", &["--device", "@edu"]),
    ("nvme", &["verify", "--device", "@disk", "--yes-destroy-data"]),
];

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
/// `newest` and `patched` once more without an IOMMU, `patched` once more with
/// the tests of its patches, and the last but `patched` once more without
/// interrupt remapping. `newest` runs the examples, too, unless libtest is
/// told something. Whether all that the mirror still has passed.
pub fn guest(
    lab: &Lab,
    store: &Store,
    kernels: &[&'static Kernel],
    libtest: &[String],
) -> Result<bool> {
    let program = payload::guest_tests()?;
    // All before the first boot: what is missing for one is then known early.
    let images = kernels.iter().map(|kernel| kernel.image(store)).collect::<Result<Vec<_>>>()?;
    let special = |name: &str| {
        [WITHOUT_IOMMU, ACPI_HOTPLUG, WITHOUT_INTREMAP].iter().any(|wish| name.contains(wish))
    };
    let usual = only(&program, libtest, |name| !special(name))?;
    let acpi_hotplug = only(&program, libtest, |name| name.contains(ACPI_HOTPLUG))?;
    let without_intremap = only(&program, libtest, |name| name.contains(WITHOUT_INTREMAP))?;
    // One kernel is enough for what they all answer alike.
    let last = kernels.iter().map(|kernel| kernel.name).rfind(|&name| name != PATCHED);
    let examples = if libtest.is_empty() && kernels.iter().any(|kernel| kernel.name == NEWEST) {
        examples()?
    } else {
        Vec::new()
    };
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
        let selftests = selftests(&image)?;
        let mut run = |proof, variant, program: &Path, arguments: &[String], label: &str| {
            let payload = Payload { program, arguments, files: &selftests };
            let outcome = lab.boot(&image, variant, &payload, label)?;
            let result = report::Result::Ran { version: image.version.clone(), outcome, proof };
            rows.push(Row { label: label.to_owned(), result });
            Ok::<_, Error>(())
        };
        if kernel.name == NEWEST {
            for Example { name, program, arguments } in &examples {
                let label = format!("{}-{name}", kernel.name);
                run(Proof::Status, Variant::Usual, program, arguments, &label)?;
            }
        }
        let mut boot = |variant, program: &Path, arguments: &[String], label: &str| {
            run(Proof::Counts, variant, program, arguments, label)
        };
        if let Some(arguments) = &usual {
            boot(Variant::Usual, &program, arguments, kernel.name)?;
        }
        if let Some(arguments) = &acpi_hotplug {
            let label = format!("{}-acpi-hotplug", kernel.name);
            boot(Variant::AcpiHotplug, &program, arguments, &label)?;
        }
        if let Some(arguments) = &without_intremap
            && last == Some(kernel.name)
        {
            let label = format!("{}-without-intremap", kernel.name);
            boot(Variant::WithoutIntremap, &program, arguments, &label)?;
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
                boot(Variant::Nvdimm, &hazards, &arguments, "patched-series")?;
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

/// The kernel's own selftests, for the guest's `/lab/selftests`.
fn selftests(image: &Image) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for path in image.selftests()? {
        let name = path.file_name().context("a selftest is a file")?.to_string_lossy();
        files.push((format!("lab/selftests/{name}"), path));
    }
    Ok(files)
}

/// An example for guests, and what it is told.
struct Example {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
}

/// Builds the examples that run on real devices.
fn examples() -> Result<Vec<Example>> {
    let example = |&(name, arguments): &(&'static str, &[&str])| {
        let arguments = arguments.iter().map(|argument| machine::with_addresses(argument));
        let arguments = arguments.collect::<Result<_>>()?;
        Ok(Example { name, program: payload::example(name)?, arguments })
    };
    EXAMPLES.iter().map(example).collect()
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
