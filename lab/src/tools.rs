//! The programs that the lab needs, and installing them.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::command;
use crate::ui::{self, Stage};

/// What programs are needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Unpacking what boots.
    Booting,
    /// Building a kernel.
    Building,
    /// Building fuzz targets.
    Fuzzing,
    /// The tests that need no guest: patches are applied, and instructions counted.
    Testing,
}

/// By what a package is known to be installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    Program(&'static str),
    Header(&'static str),
}

use Sign::{Header, Program};

impl Need {
    fn packages(self) -> &'static [(Sign, &'static str)] {
        match self {
            Self::Booting => &[(Program("xz"), "xz-utils"), (Program("zstd"), "zstd")],
            Self::Building => &[
                (Program("bc"), "bc"),
                (Program("bison"), "bison"),
                (Program("flex"), "flex"),
                (Program("gcc"), "gcc"),
                (Program("make"), "make"),
                (Program("patch"), "patch"),
                (Program("perl"), "perl"),
                (Program("tar"), "tar"),
                (Program("xz"), "xz-utils"),
                (Header("gelf.h"), "libelf-dev"),
                (Header("stdio.h"), "libc6-dev"),
                (Header("uuid/uuid.h"), "uuid-dev"),
            ],
            Self::Fuzzing => &[(Program("c++"), "g++")],
            Self::Testing => &[(Program("patch"), "patch"), (Program("valgrind"), "valgrind")],
        }
    }
}

/// Makes sure that all that is needed is there: installs it, or says what to do.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if needs.contains(&Need::Booting) {
        boots_on(env::consts::ARCH)?;
    }
    for (program, package) in [("dpkg-deb", "dpkg"), ("apt-get", "apt"), ("setpriv", "util-linux")]
    {
        if !runs(program) {
            bail!("{program} is missing: the lab needs a Debian with the package {package}");
        }
    }
    let missing = missing(needs, is_there);
    if missing.is_empty() {
        return Ok(());
    }

    let names = missing.join(", ");
    if !command::is_root()? {
        bail!(
            "missing: {names}\nInstall it as root, or run the lab once as root to have it do so:\n\n\
             apt-get update\napt-get {}",
            install(&missing).join(" ")
        );
    }
    let stage = Stage::new("Installing", &names);
    update();
    command::output(apt_get().args(install(&missing)))?;
    stage.done("Installed", &names);
    match &self::missing(needs, is_there)[..] {
        [] => Ok(()),
        still => bail!("installed, but still not found: {}", still.join(", ")),
    }
}

/// Whether this is a machine for booting: what is built for it is to run in guests.
fn boots_on(architecture: &str) -> Result<()> {
    ensure!(
        architecture == "x86_64",
        "the lab's kernels and their QEMU are for x86-64, and so must be what runs in them, \
         but this machine, for which it would be built, is {architecture}; \
         `cargo lab test --host-only` and `cargo lab fuzz` boot nothing"
    );
    Ok(())
}

/// Has apt ask the machine's sources what they have. Where one does not answer, the
/// others may have what is wanted: the user is told, and what comes next decides.
pub fn update() {
    if let Err(error) = command::output(apt_get().arg("update")) {
        ui::warning(&format!("{error:#}"));
    }
}

fn apt_get() -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

/// The packages that are needed and not there, each once.
fn missing(needs: &[Need], is_there: impl Fn(Sign) -> bool) -> Vec<&'static str> {
    let mut missing = Vec::new();
    for &(sign, package) in needs.iter().flat_map(|need| need.packages()) {
        if !missing.contains(&package) && !is_there(sign) {
            missing.push(package);
        }
    }
    missing
}

fn is_there(sign: Sign) -> bool {
    match sign {
        Program(program) => runs(program),
        Header(header) => Path::new("/usr/include").join(header).exists(),
    }
}

fn runs(program: &str) -> bool {
    command::output(Command::new(program).arg("--version")).is_ok()
}

/// The arguments by which apt-get installs packages, from where the machine has
/// its own. `--no-remove`: nothing that the user has may go for it.
fn install(packages: &[&'static str]) -> Vec<&'static str> {
    [&["install", "--yes", "--no-remove", "--no-install-recommends"], packages].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_architecture_is_refused_by_name() {
        assert!(boots_on("x86_64").is_ok());
        assert!(boots_on("aarch64").unwrap_err().to_string().contains("is aarch64"));
    }

    #[test]
    fn all_that_is_missing_is_named_at_once_and_once() {
        let needs = [Need::Testing, Need::Fuzzing, Need::Booting, Need::Building];
        let there = [Program("gcc"), Program("make"), Header("stdio.h")];
        let missing = missing(&needs, |sign| there.contains(&sign));
        assert_eq!(missing[..4], ["patch", "valgrind", "g++", "xz-utils"]);
        assert_eq!(missing.iter().filter(|package| **package == "patch").count(), 1);
        assert!(missing.contains(&"libelf-dev") && !missing.contains(&"libc6-dev"));
    }
}
