//! A QEMU that is newer than the machine's own, from the packages of a later
//! Debian: unpacked into a root of its own with every library that it needs, and
//! run by that root's loader. The machine is left as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::ui::Stage;

/// Where it is, and where most of what it needs is.
const SUITES: [&str; 2] = ["trixie-backports", "trixie"];
const QEMU: &str = "qemu-system-x86";
/// What is unpacked: e2fsprogs is for what guests leave on their disks.
const PACKAGES: [&str; 2] = [QEMU, "e2fsprogs"];
/// The first QEMU with a vfio-user-pci, major and minor version.
const OLDEST: (u32, u32) = (10, 1);

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// The root, in the cache.
pub struct Root {
    /// Of QEMU's package.
    pub version: String,
    directory: PathBuf,
}

impl Root {
    /// From the cache, or fetched into it. `None` if the mirror has no QEMU that
    /// is new enough.
    pub fn ensure(store: &Store) -> Result<Option<Self>> {
        let directory = store.directory.join("newer-qemu");
        let wanted = PACKAGES.join(" ");
        let kept = fs::read_to_string(directory.join("packages"));
        if !kept.is_ok_and(|kept| kept == wanted) && !fetch(store, &directory, &wanted)? {
            return Ok(None);
        }
        let version = fs::read_to_string(directory.join("version"))?;
        Ok(Some(Self { version, directory: directory.join("root") }))
    }

    /// A program of the root, by its path there, as a command line to which
    /// arguments can be added.
    pub fn command_line(&self, program: &str) -> Vec<PathBuf> {
        vec![self.path(LOADER), "--library-path".into(), self.path(LIBRARIES), self.path(program)]
    }

    /// A program of the root as a command.
    pub fn command(&self, program: &str) -> Command {
        let line = self.command_line(program);
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]);
        command
    }

    /// Where a file of the root is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.directory.join(path)
    }

    /// A library of the root, by its name.
    pub fn library(&self, name: &str) -> PathBuf {
        self.path(LIBRARIES).join(name)
    }

    /// The loader, which programs know by its path `lib64/ld-linux-x86-64.so.2`.
    pub fn loader(&self) -> PathBuf {
        self.path(LOADER)
    }
}

/// `false` if the mirror has none that is new enough.
fn fetch(store: &Store, directory: &Path, wanted: &str) -> Result<bool> {
    let stage = Stage::new("Fetching", "a QEMU with vfio-user-pci");
    let Some(suite) = Suite::open_all(&SUITES, store)? else {
        return Ok(false);
    };
    if suite.show(QEMU)?.is_none() {
        return Ok(false);
    }
    let packages = suite.closure(&PACKAGES)?;
    let version = packages
        .iter()
        .find_map(|package| package.strip_prefix(QEMU)?.strip_prefix('='))
        .context("a package is among those that it needs")?;
    if upstream(version).is_none_or(|found| found < OLDEST) {
        return Ok(false);
    }
    cache::replace(directory, |new| {
        let root = new.join("root");
        fs::create_dir(&root)?;
        suite.unpack(&packages, &root)?;
        fs::write(new.join("version"), version)?;
        Ok(fs::write(new.join("packages"), wanted)?)
    })?;
    stage.done("Fetched", &format!("QEMU {version}"));
    Ok(true)
}

/// Major and minor version of a package's version, such as
/// `1:11.1.3+ds-1~bpo13+1`.
fn upstream(version: &str) -> Option<(u32, u32)> {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = version.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_enough_is_told_by_the_packages_version() {
        assert_eq!(upstream("1:11.1.3+ds-1~bpo13+1"), Some((11, 1)));
        assert!(upstream("1:10.0.2+ds-2+deb13u1~bpo12+1").unwrap() < OLDEST);
        assert!(upstream("10.1~rc1").unwrap() >= OLDEST);
        assert_eq!(upstream("none"), None);
    }
}
