//! QEMU, from the packages of a later Debian, unpacked into a separate root with all its
//! libraries, and run by that root's loader. Nothing is installed on the machine. QEMU is
//! not updated, except if it has no vfio-user-pci: then the lab checks for a newer one
//! every week.
//!
//! The lab does not use the machine's QEMU or that of its backports. Up to 10.0 QEMU has no
//! vfio-user-pci. With `tcg,thread=multi`, 10.0.2 sometimes aborts in `iotlb_to_section`
//! while another processor switches a BAR, or stops delivering timer interrupts to a
//! processor.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::kernels;
use crate::ui::{self, Stage};

/// The suites of QEMU and its dependencies; the first that the mirror has is used.
const SUITES: [&[&str]; 2] = [&["trixie-backports", "trixie"], &["trixie"]];
const QEMU: &str = "qemu-system-x86";
/// The packages to unpack. e2fsprogs checks the disks of guests.
const PACKAGES: [&str; 2] = [QEMU, "e2fsprogs"];
/// The first QEMU with a vfio-user-pci, major and minor version.
const VFIO_USER: (u32, u32) = (10, 1);

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// The root, in the cache.
#[derive(Clone)]
pub struct Root {
    /// The version of QEMU's package.
    pub version: String,
    /// Its directory in the cache.
    directory: PathBuf,
}

impl Root {
    /// Returns the root from the cache, after fetching it if needed.
    pub fn ensure(store: &Store) -> Result<Self> {
        let directory = store.directory.join("qemu");
        let kept = Self::kept(&directory);
        if let Some(kept) = kept.as_ref().filter(|kept| !kept.is_to_be_replaced()) {
            return Ok(kept.clone());
        }
        match (fetch(store, &directory, kept.as_ref()), kept) {
            (Ok(()), _) => Self::kept(&directory).context("the fetched QEMU is not in the cache"),
            (Err(error), Some(kept)) => {
                ui::warning(&format!(
                    "cannot check for a newer QEMU than the cached one: {error:#}"
                ));
                Ok(kept)
            }
            (Err(error), None) => Err(error.context("cannot fetch QEMU")),
        }
    }

    /// The root in `directory`, if it has all packages.
    fn kept(directory: &Path) -> Option<Self> {
        let packages = fs::read_to_string(directory.join("packages")).ok()?;
        let version = fs::read_to_string(directory.join("version")).ok()?;
        (packages == PACKAGES.join(" ")).then(|| Self { version, directory: directory.to_owned() })
    }

    /// Whether to check the mirror for a newer one.
    fn is_to_be_replaced(&self) -> bool {
        !self.has_vfio_user() && kernels::is_old(&self.directory)
    }

    pub fn has_vfio_user(&self) -> bool {
        upstream(&self.version).is_some_and(|version| version >= VFIO_USER)
    }

    /// QEMU, with its firmware and without a machine. `setpriv` (of util-linux, which every
    /// Debian has) makes the kernel kill it when the lab ends. `setsid` gives it a session, so
    /// that the kernel schedules it as a group of its own (sched(7), "The autogroup feature").
    pub fn qemu(&self) -> Command {
        let mut command = Command::new("setsid");
        command
            .args(["setpriv", "--pdeathsig", "KILL"])
            .args(self.command_line("usr/bin/qemu-system-x86_64"))
            // Without these it would search the machine's directories for modules and firmware.
            .env("QEMU_MODULE_DIR", self.library("qemu"))
            .arg("-L")
            .arg(self.path("usr/share/qemu"))
            .arg("-L")
            .arg(self.path("usr/share/seabios"));
        command
    }

    /// Another program of the root, by its path there.
    pub fn command(&self, program: &str) -> Command {
        let line = self.command_line(program);
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]);
        command
    }

    /// The path of a file of the root.
    pub fn path(&self, path: &str) -> PathBuf {
        self.directory.join("root").join(path)
    }

    /// A library of the root, by its name.
    pub fn library(&self, name: &str) -> PathBuf {
        self.path(LIBRARIES).join(name)
    }

    /// The loader, which programs refer to as `lib64/ld-linux-x86-64.so.2`.
    pub fn loader(&self) -> PathBuf {
        self.path(LOADER)
    }

    fn command_line(&self, program: &str) -> [PathBuf; 4] {
        [self.path(LOADER), "--library-path".into(), self.path(LIBRARIES), self.path(program)]
    }
}

/// Fetches the packages into `directory`, unless it already has this version.
fn fetch(store: &Store, directory: &Path, kept: Option<&Root>) -> Result<()> {
    let stage = Stage::new("Fetching", "QEMU");
    let suite = suite(store)?;
    let packages = suite.closure(&PACKAGES)?;
    let version = packages
        .iter()
        .find_map(|package| package.strip_prefix(QEMU)?.strip_prefix('='))
        .context("a package is among those that it needs")?;
    if kept.is_some_and(|kept| kept.version == version) {
        // Records that it was checked today.
        return Ok(fs::write(directory.join("version"), version)?);
    }
    cache::replace(directory, |new| {
        let root = new.join("root");
        fs::create_dir(&root)?;
        suite.unpack(&packages, &root)?;
        fs::write(new.join("version"), version)?;
        Ok(fs::write(new.join("packages"), PACKAGES.join(" "))?)
    })?;
    stage.done("Fetched", &format!("QEMU {version}"));
    Ok(())
}

fn suite(store: &Store) -> Result<Suite> {
    for names in SUITES {
        if let Some(suite) = Suite::open_all(names, store)?
            && suite.show(QEMU)?.is_some()
        {
            return Ok(suite);
        }
    }
    bail!("the mirror has no {QEMU} in trixie or its backports")
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
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn the_packages_version_shows_whether_it_has_vfio_user() {
        let root = |version: &str| Root { version: version.to_owned(), directory: PathBuf::new() };
        assert!(root("1:11.1.3+ds-1~bpo13+1").has_vfio_user());
        assert!(!root("1:10.0.2+ds-2+deb13u1~bpo12+1").has_vfio_user());
        assert!(root("10.1~rc1").has_vfio_user());
        assert!(!root("none").has_vfio_user());
    }

    #[test]
    fn an_old_qemu_is_replaced_after_a_week() {
        let directory = tempfile::tempdir().unwrap();
        let keep = |version: &str, days: u64| {
            let file = directory.path().join("version");
            fs::write(&file, version).unwrap();
            let age = Duration::from_secs(days * 24 * 60 * 60);
            File::open(&file).unwrap().set_modified(SystemTime::now() - age).unwrap();
            Root::kept(directory.path())
        };
        assert!(keep("1:10.0.2+ds-2", 0).is_none());
        fs::write(directory.path().join("packages"), PACKAGES.join(" ")).unwrap();
        assert!(!keep("1:10.0.2+ds-2", 6).unwrap().is_to_be_replaced());
        assert!(keep("1:10.0.2+ds-2", 8).unwrap().is_to_be_replaced());
        assert!(!keep("1:11.1.3+ds-1", 8).unwrap().is_to_be_replaced());
    }
}
