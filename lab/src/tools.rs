//! The programs that the lab needs, and installing them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::cache::Store;
use crate::command;
use crate::qemu;
use crate::ui::Stage;

/// The first QEMU with an igb.
const OLDEST_QEMU: u32 = 8;

/// Makes sure that all that a boot needs is there: installs it, or says what
/// to do.
pub fn ensure_for_booting(store: &Store) -> Result<()> {
    ensure(store, missing_for_booting)
}

/// The same for building fuzz targets.
pub fn ensure_for_fuzzing(store: &Store) -> Result<()> {
    ensure(store, || missing_programs(&[("c++", "g++")]))
}

/// The same for counting instructions.
pub fn ensure_for_counting(store: &Store) -> Result<()> {
    ensure(store, || missing_programs(&[("valgrind", "valgrind")]))
}

/// The same for building a kernel.
pub fn ensure_for_building(store: &Store) -> Result<()> {
    ensure(store, missing_for_building)
}

fn ensure(store: &Store, missing_packages: fn() -> Vec<&'static str>) -> Result<()> {
    for (program, package) in [("dpkg-deb", "dpkg"), ("setpriv", "util-linux")] {
        if !runs(program) {
            bail!("{program} is missing: the lab needs a Debian with the package {package}");
        }
    }
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }

    let codename = codename()?;
    let sources = tempfile::tempdir()?;
    let mirror = apt::mirror(store)?;
    let lines = sources_lines(&codename, &mirror);
    if !command::is_root()? {
        bail!("{}", instructions(&codename, &lines, &missing));
    }
    let stage = Stage::new("Installing", &missing.join(", "));
    fs::create_dir(sources.path().join("parts"))?;
    fs::write(sources.path().join("parts/lab.list"), lines)?;
    fs::create_dir_all(sources.path().join("lists/partial"))?;
    let directory = sources.path().display().to_string();
    for arguments in apt_get_arguments(&codename, &directory, &missing) {
        command::output(
            Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
    }
    stage.done("Installed", &missing.join(", "));
    match &missing_packages()[..] {
        [] => Ok(()),
        still => bail!("installed, but still not found or too old: {}", still.join(", ")),
    }
}

fn missing_for_booting() -> Vec<&'static str> {
    let mut missing = missing_programs(&[("xz", "xz-utils"), ("zstd", "zstd")]);
    if qemu_major().is_none_or(|major| major < OLDEST_QEMU) {
        missing.push("qemu-system-x86");
    }
    missing
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

fn qemu_major() -> Option<u32> {
    let version = command::output(Command::new(qemu::PROGRAM).arg("--version")).ok()?;
    parse_qemu_major(&version)
}

fn parse_qemu_major(version: &str) -> Option<u32> {
    let number = version.split_once("version ")?.1;
    number.split('.').next()?.parse().ok()
}

fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("what system is this?")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no VERSION_CODENAME")?;
    Ok(codename.trim_matches('"').to_owned())
}

/// Debian 12 itself has a QEMU without igb; its backports have a good one.
fn sources_lines(codename: &str, mirror: &str) -> String {
    apt::sources_line(codename, mirror)
        + &apt::sources_line(&format!("{codename}-backports"), mirror)
}

/// The calls of apt-get that install packages from sources of our own, which
/// leaves the system's list of sources as it is. `--no-remove`: nothing that
/// the user has may go for it.
fn apt_get_arguments(codename: &str, sources: &str, packages: &[&str]) -> [Vec<String>; 2] {
    let options = [
        "-o".to_owned(),
        "Dir::Etc::sourcelist=/dev/null".to_owned(),
        "-o".to_owned(),
        format!("Dir::Etc::sourceparts={sources}/parts"),
        "-o".to_owned(),
        format!("Dir::State::lists={sources}/lists"),
        "-o".to_owned(),
        // Those directories may be where apt's own user cannot look.
        "APT::Sandbox::User=root".to_owned(),
    ];
    let backports = format!("{codename}-backports");
    let install = ["install", "--yes", "--no-remove", "--no-install-recommends", "-t", &backports];
    let with_options = |rest: &[&str]| {
        let rest = rest.iter().map(|&argument| argument.to_owned());
        options.iter().cloned().chain(rest).collect::<Vec<_>>()
    };
    [with_options(&["update"]), with_options(&[&install[..], packages].concat())]
}

fn instructions(codename: &str, lines: &str, packages: &[&str]) -> String {
    let sources = "/tmp/lab-sources";
    let mut text = format!(
        "missing: {}\nInstall as root, or run the lab once as root to have it do so:\n\n\
         mkdir -p {sources}/parts {sources}/lists/partial\n\
         cat >{sources}/parts/lab.list <<END\n{lines}END\n",
        packages.join(", ")
    );
    for arguments in apt_get_arguments(codename, sources, packages) {
        text += &format!("apt-get {}\n", arguments.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_says_its_version() {
        let version = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright\n";
        assert_eq!(parse_qemu_major(version), Some(10));
        assert_eq!(parse_qemu_major("not QEMU"), None);
    }

    #[test]
    fn the_instructions_name_what_is_missing_and_take_it_from_backports() {
        let text = instructions("bookworm", "deb MIRROR bookworm main\n", &["qemu-system-x86"]);
        assert!(text.starts_with("missing: qemu-system-x86\n"), "{text}");
        assert!(text.contains("-t bookworm-backports qemu-system-x86\n"), "{text}");
    }
}
