//! Checks for the programs that the lab needs, and installs them.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::command;
use crate::ui::{self, Stage};

/// A task that needs programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Unpacking kernels and QEMU.
    Booting,
    /// Building a kernel.
    Building,
    /// Building fuzz targets.
    Fuzzing,
    /// The tests that need no guest: they apply patches and count instructions.
    Testing,
}

/// A file that shows that a package is installed.
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

/// Makes sure that everything needed is installed. As root it installs what is missing;
/// otherwise the error says what to do.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if needs.contains(&Need::Booting) {
        boots_on(env::consts::ARCH)?;
    }
    for (program, package) in [("dpkg-deb", "dpkg"), ("apt-get", "apt"), ("setpriv", "util-linux")]
    {
        if !runs(program) {
            bail!("{program} is missing: the lab needs Debian with the package {package}");
        }
    }
    let missing = missing(needs, is_there);
    if missing.is_empty() {
        return Ok(());
    }

    let names = missing.join(", ");
    if !command::is_root()? {
        bail!(
            "missing: {names}\nInstall them as root, or run the lab once as root, which installs them:\n\n\
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

/// Fails on other architectures: guests run programs that are built for this machine.
fn boots_on(architecture: &str) -> Result<()> {
    ensure!(
        architecture == "x86_64",
        "the lab's kernels are for x86-64, but programs for guests would be built for this \
         machine, which is {architecture}; `cargo lab test --host-only` and `cargo lab fuzz` \
         boot nothing"
    );
    Ok(())
}

/// Updates apt's package lists. Only prints a warning if that fails, since the other
/// sources may have what is needed.
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

/// The needed packages that are not installed, each once.
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

/// The arguments for apt-get to install packages. With `--no-remove` it removes no
/// package of the user.
fn install(packages: &[&'static str]) -> Vec<&'static str> {
    [&["install", "--yes", "--no-remove", "--no-install-recommends"], packages].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_another_architecture() {
        assert!(boots_on("x86_64").is_ok());
        assert!(boots_on("aarch64").unwrap_err().to_string().contains("is aarch64"));
    }

    #[test]
    fn missing_packages_are_named_together_and_once() {
        let needs = [Need::Testing, Need::Fuzzing, Need::Booting, Need::Building];
        let there = [Program("gcc"), Program("make"), Header("stdio.h")];
        let missing = missing(&needs, |sign| there.contains(&sign));
        assert_eq!(missing[..4], ["patch", "valgrind", "g++", "xz-utils"]);
        assert_eq!(missing.iter().filter(|package| **package == "patch").count(), 1);
        assert!(missing.contains(&"libelf-dev") && !missing.contains(&"libc6-dev"));
    }
}
