//! The programs that the lab needs, and installing them.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command;
use crate::ui::Stage;

/// Makes sure that all that a boot needs is there: installs it, or says what
/// to do.
pub fn ensure_for_booting() -> Result<()> {
    ensure(missing_for_booting)
}

/// The same for building fuzz targets.
pub fn ensure_for_fuzzing() -> Result<()> {
    ensure(|| missing_programs(&[("c++", "g++")]))
}

/// The same for the tests that need no guest: patches are applied, and
/// instructions counted.
pub fn ensure_for_testing() -> Result<()> {
    ensure(|| missing_programs(&[("patch", "patch"), ("valgrind", "valgrind")]))
}

/// The same for building a kernel.
pub fn ensure_for_building() -> Result<()> {
    ensure(missing_for_building)
}

fn ensure(missing_packages: fn() -> Vec<&'static str>) -> Result<()> {
    for (program, package) in [("dpkg-deb", "dpkg"), ("apt-get", "apt"), ("setpriv", "util-linux")]
    {
        if !runs(program) {
            bail!("{program} is missing: the lab needs a Debian with the package {package}");
        }
    }
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }

    let names = missing.join(", ");
    if !command::is_root()? {
        bail!(
            "missing: {names}\nInstall it as root, or run the lab once as root to have it do so:\n\n\
             apt-get {UPDATE}\napt-get {}",
            install(&missing).join(" ")
        );
    }
    let stage = Stage::new("Installing", &names);
    for arguments in [vec![UPDATE], install(&missing)] {
        command::output(
            Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
    }
    stage.done("Installed", &names);
    match &missing_packages()[..] {
        [] => Ok(()),
        still => bail!("installed, but still not found or too old: {}", still.join(", ")),
    }
}

fn missing_for_booting() -> Vec<&'static str> {
    missing_programs(&[("xz", "xz-utils"), ("zstd", "zstd")])
}

fn missing_for_building() -> Vec<&'static str> {
    let programs = ["bc", "bison", "flex", "gcc", "make", "patch", "perl", "tar"];
    let mut missing = missing_programs(&programs.map(|program| (program, program)));
    missing.extend(missing_programs(&[("xz", "xz-utils")]));
    for (header, package) in [("gelf.h", "libelf-dev"), ("stdio.h", "libc6-dev")] {
        if !Path::new("/usr/include").join(header).exists() {
            missing.push(package);
        }
    }
    missing
}

/// Of programs and the packages that they are in, the packages whose program
/// is not there.
fn missing_programs(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let missing = programs.iter().filter(|(program, _)| !runs(program));
    missing.map(|&(_, package)| package).collect()
}

fn runs(program: &str) -> bool {
    command::output(Command::new(program).arg("--version")).is_ok()
}

const UPDATE: &str = "update";

/// The arguments by which apt-get installs packages, from where the machine has
/// its own. `--no-remove`: nothing that the user has may go for it.
fn install(packages: &[&'static str]) -> Vec<&'static str> {
    [&["install", "--yes", "--no-remove", "--no-install-recommends"], packages].concat()
}
