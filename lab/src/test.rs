//! `cargo lab test`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Error, Result};

use crate::boot::{Lab, Show};
use crate::cache::Store;
use crate::command;
use crate::guest::quoted;
use crate::kernels::{self, KERNELS, Kernel, NEWEST, PATCHED};
use crate::machine::{self, Variant};
use crate::modules;
use crate::payload;
use crate::report::{self, Proof, Row};
use crate::side_by_side::{self, Job, Plan};
use crate::tools::Need;
use crate::ui;
use crate::vfio_user;
use crate::vmm::{self, Extent, Nested};

/// In the name of each test that needs a machine without an IOMMU. All others
/// need one with an IOMMU.
const WITHOUT_IOMMU: &str = "without_iommu";

/// The module of those tests that need VFIO's no-IOMMU mode, which only `patched` has.
const NOIOMMU_MODE: &str = "noiommu_mode::";

/// In the name of each test that needs hotplug by ACPI.
const ACPI_HOTPLUG: &str = "acpi_hotplug";

/// In the name of each test that needs an IOMMU that does not remap interrupts.
const WITHOUT_INTREMAP: &str = "without_intremap";

/// The module of `tests/hazards` with the tests of the lab's kernel patches.
const SERIES: &str = "series::";

/// The examples that run on real devices, and their arguments.
const EXAMPLES: [(&str, &[&str]); 4] = [
    ("tour", &["--device", "@igb"]),
    ("edu", &["--device", "@edu"]),
    ("unplug", &["--device", "@nvme", "--cause", "d3"]),
    ("nvme", &["verify", "--device", "@disk", "--yes-destroy-data"]),
];

/// The example that runs on a card which the kernel's driver has, by this script.
const NIC: &str = "nic";
const CARD_IN_USE: &str = include_str!("../guest/card-in-use");

/// What the tests of these kernels, or of all if none is named, need.
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

/// Boots each kernel with the guest tests, and again with hotplug by ACPI. Boots `newest`
/// and `patched` again without an IOMMU, `patched` again with the tests of its patches,
/// and the last kernel before `patched` again without interrupt remapping. Runs the
/// examples on `newest`, unless there are arguments for libtest. Two guests run at a time.
/// If `all`, the tests of `vfio-user` and `vmm` are among them. Returns whether all kernels passed
/// that the mirror still has.
pub fn guest(
    lab: &Lab,
    store: &Store,
    kernels: &[&'static Kernel],
    libtest: &[String],
    all: bool,
) -> Result<bool> {
    let program = payload::guest_tests()?;
    let special = |name: &str| {
        [WITHOUT_IOMMU, ACPI_HOTPLUG, WITHOUT_INTREMAP].iter().any(|need| name.contains(need))
    };
    let usual = only(&program, libtest, |name| !special(name))?;
    let acpi_hotplug = only(&program, libtest, |name| name.contains(ACPI_HOTPLUG))?;
    let without_intremap = only(&program, libtest, |name| name.contains(WITHOUT_INTREMAP))?;
    // One kernel is enough, since all kernels behave the same.
    let last = kernels.iter().map(|kernel| kernel.name).rfind(|&name| name != PATCHED);
    let scripts = tempfile::tempdir()?;
    let nested = if all { Nested::build(lab, store, scripts.path())? } else { None };
    let mut plans = Vec::new();
    for &kernel in kernels {
        let mut jobs = Vec::new();
        if kernel.name == NEWEST && libtest.is_empty() {
            jobs.push(examples(format!("{}-examples", kernel.name), scripts.path())?);
        }
        let mut boot = |variant, program: &Path, arguments: &[String], label: &str| {
            let (program, arguments) = (program.to_owned(), arguments.to_owned());
            let (label, files, modules) = (label.to_owned(), Vec::new(), None);
            let proof = Proof::Counts;
            jobs.push(Job { label, variant, program, arguments, files, modules, proof });
        };
        if let Some(arguments) = &usual {
            boot(Variant::Usual, &program, arguments, kernel.name);
        }
        if let Some(arguments) = &acpi_hotplug {
            let label = format!("{}-acpi-hotplug", kernel.name);
            boot(Variant::AcpiHotplug, &program, arguments, &label);
        }
        if let Some(arguments) = &without_intremap
            && last == Some(kernel.name)
        {
            let label = format!("{}-without-intremap", kernel.name);
            boot(Variant::WithoutIntremap, &program, arguments, &label);
        }
        if [NEWEST, PATCHED].contains(&kernel.name) {
            let some = only(&program, libtest, |name| {
                let offered = kernel.name == PATCHED || !name.starts_with(NOIOMMU_MODE);
                name.contains(WITHOUT_IOMMU) && offered
            })?;
            if let Some(arguments) = some {
                let label = format!("{}-without-iommu", kernel.name);
                boot(Variant::WithoutIommu, &program, &arguments, &label);
            }
        }
        if kernel.name == PATCHED {
            let hazards = payload::hazards()?;
            if let Some(arguments) = only(&hazards, libtest, |name| name.starts_with(SERIES))? {
                boot(Variant::Nvdimm, &hazards, &arguments, "patched-series");
            }
        }
        if let Some(nested) = nested.as_ref().filter(|_| vmm::is_brief(kernel)) {
            jobs.push(nested.job(kernel, Extent::Brief));
        }
        plans.push(Plan { kernel, jobs });
    }
    let boots: usize = plans.iter().map(|plan| plan.jobs.len()).sum();
    let show = if boots > 1 || all { Show::AtTheEnd } else { Show::AtOnce };
    let lab = &Lab { show, ..lab.clone() };
    let newest = kernels::by_name(NEWEST).map_err(Error::msg)?;
    if all {
        // Fetched first, since apt cannot fetch one kernel for several threads at a time.
        newest.image(store)?;
    }
    let vfio_user = || if all { vfio_user::test(lab, store, newest) } else { Ok(true) };
    let (vfio_user, rows) = side_by_side::run(lab, store, plans, vfio_user);
    println!("\n{}", report::table(&rows));
    // If the mirror has none of the kernels, nothing was tested.
    let passed = rows.iter().any(Row::ran) && rows.iter().all(Row::passed);
    if !passed {
        ui::error("a guest test or a kernel has failed: see the table above");
    }
    Ok(vfio_user? && passed)
}

/// One boot that runs all examples that need real devices.
fn examples(label: String, scripts: &Path) -> Result<Job> {
    let mut files = Vec::new();
    let mut commands = Vec::new();
    for (name, arguments) in EXAMPLES {
        let path = format!("lab/examples/{name}");
        let arguments = arguments.iter().map(|argument| machine::with_addresses(argument));
        let arguments = arguments.collect::<Result<Vec<_>>>()?;
        commands.push([vec![format!("/{path}")], arguments].concat());
        files.push((path, payload::tested_example(name)?));
    }
    let card_in_use = scripts.join("card-in-use");
    fs::write(&card_in_use, CARD_IN_USE)?;
    files.push((format!("lab/examples/{NIC}"), payload::tested_example(NIC)?));
    files.push(("lab/card-in-use".to_owned(), card_in_use));
    let card = machine::with_addresses("@e1000e")?;
    commands.push(["sh", "/lab/card-in-use", &card].map(str::to_owned).to_vec());
    let program = scripts.join("run-examples");
    fs::write(&program, script(&commands))?;
    let (arguments, modules, proof) = (Vec::new(), Some(&modules::NETWORK), Proof::Status);
    Ok(Job { label, variant: Variant::Usual, program, arguments, files, modules, proof })
}

/// A script that runs commands one after the other. Its exit status is that of the last
/// one that failed.
fn script(commands: &[Vec<String>]) -> String {
    let mut script = "#!/bin/sh\nstatus=0\n".to_owned();
    for command in commands {
        let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
        let line = words.join(" ");
        script += &format!("echo {}\n{line} || status=$?\n", quoted(&format!("$ {line}")));
    }
    script + "exit $status\n"
}

/// Arguments for libtest to run those tests that both the user's arguments and `wanted`
/// select; `None` if there are none. libtest runs the tests that match any of its filters,
/// so it cannot combine the two itself.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_runs_all_and_reports_a_failure() {
        let commands = [["sh", "-c", "exit 7"], ["echo", "it's", "done"]];
        let commands = commands.map(|command| command.map(str::to_owned).to_vec());
        let ran = Command::new("sh").args(["-c", &script(&commands)]).output().unwrap();
        assert_eq!(ran.status.code(), Some(7));
        let said = String::from_utf8(ran.stdout).unwrap();
        assert!(said.ends_with("\nit's done\n"), "{said}");
        let well = Command::new("sh").args(["-c", &script(&commands[1..])]).output().unwrap();
        assert_eq!(well.status.code(), Some(0));
    }
}
