//! Fetches packages of any Debian suite with apt, from the mirror in this machine's
//! configuration, without changing that configuration. apt checks the signatures.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::Store;
use crate::command;
use crate::tools;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite's packages, which apt reads with a private configuration.
pub struct Suite {
    name: String,
    options: Vec<String>,
}

impl Suite {
    /// Updates the list of a suite's packages. `None` if the mirror has no such
    /// suite (any more).
    pub fn open(name: &str, store: &Store) -> Result<Option<Self>> {
        Self::open_all(&[name], store)
    }

    /// As [`open`](Self::open), for suites that depend on one another.
    /// [`closure`](Self::closure) prefers packages of the first.
    pub fn open_all(names: &[&str], store: &Store) -> Result<Option<Self>> {
        let [first, ..] = names else { bail!("no suite is named") };
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: install the package debian-archive-keyring"
        );
        let mirror = mirror(store)?;
        let all = names.join("+");
        let directory = store.directory.join("apt").join(&all);
        fs::create_dir_all(directory.join("lists/partial"))?;
        fs::create_dir_all(directory.join("archives/partial"))?;
        let sources = directory.join("sources.list");
        let lines: String = names.iter().map(|name| sources_line(name, &mirror)).collect();
        fs::write(&sources, lines)?;
        let options = private_options(&directory, &sources);
        let suite = Self { name: (*first).to_owned(), options };

        let update = command::unchecked(suite.tool("apt-get").args(["update", "--error-on=any"]))?;
        let said = String::from_utf8_lossy(&update.stderr);
        if update.status.success() {
            Ok(Some(suite))
        } else if is_gone(&said, names) {
            Ok(None)
        } else {
            bail!("cannot read the packages of {all} from {mirror}:\n{said}");
        }
    }

    /// Packages and all their dependencies, as apt would install them on an empty
    /// system: names with versions, as [`unpack`](Self::unpack) takes them.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut install = self.tool("apt-get");
        install.args(["--simulate", "--no-install-recommends", "-t", &self.name, "install"]);
        let said = command::output(install.args(packages))?;
        Ok(said.lines().filter_map(simulated_install).collect())
    }

    /// A package's control fields. `None` if the suite has no such package.
    pub fn show(&self, package: &str) -> Result<Option<Control>> {
        Ok(self.shown(&[package.to_owned()])?.map(Control))
    }

    /// The control fields of those packages of a list that the suite has, with their
    /// names.
    pub fn show_all(&self, packages: &[String]) -> Result<Vec<(String, Control)>> {
        Ok(self.shown(packages)?.map_or_else(Vec::new, |shown| paragraphs(&shown)))
    }

    /// The output of `apt-cache show` for those packages of a list that the suite has.
    /// `None` if it has none of them.
    fn shown(&self, packages: &[String]) -> Result<Option<String>> {
        let mut show = self.tool("apt-cache");
        let shown = command::unchecked(show.args(["show", "--no-all-versions"]).args(packages))?;
        let said = String::from_utf8_lossy(&shown.stderr);
        if shown.status.success() {
            Ok(Some(String::from_utf8_lossy(&shown.stdout).into_owned()))
        } else if has_none(&said) {
            Ok(None)
        } else {
            bail!("cannot look up {} in {}:\n{}", packages.join(", "), self.name, said.trim_end());
        }
    }

    /// Downloads packages and unpacks them, without their scripts, into a
    /// directory.
    pub fn unpack(&self, packages: &[String], into: &Path) -> Result<()> {
        let debs = tempfile::tempdir_in(into)?;
        command::output(self.tool("apt-get").current_dir(&debs).arg("download").args(packages))
            .with_context(|| format!("cannot download from {}", self.name))?;
        for deb in fs::read_dir(&debs)? {
            command::output(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(into))?;
        }
        Ok(())
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// `target=Packages` leaves out indexes that desktops add, such as AppStream's.
fn sources_line(suite: &str, mirror: &str) -> String {
    format!("deb [signed-by={KEYRING} target=Packages lang=none] {mirror} {suite} main\n")
}

/// Options that keep the system's packages and lists separate from ours.
fn private_options(directory: &Path, sources: &Path) -> Vec<String> {
    let directory = directory.display();
    [
        format!("Dir::Etc::sourcelist={}", sources.display()),
        "Dir::Etc::sourceparts=-".to_owned(),
        "Dir::Etc::preferences=/dev/null".to_owned(),
        "Dir::Etc::preferencesparts=-".to_owned(),
        "Dir::State::status=/dev/null".to_owned(),
        // apt refuses a default release of the machine that is not among our suites.
        "APT::Default-Release=".to_owned(),
        format!("Dir::State::lists={directory}/lists"),
        format!("Dir::Cache={directory}"),
        "Acquire::GzipIndexes=true".to_owned(),
        // apt's own user may not be able to read the cache.
        "APT::Sandbox::User=root".to_owned(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect()
}

/// Whether apt reports that the mirror has no such suite. This differs from a mirror
/// that cannot be reached, and from one that lacks a list of a suite that it has.
fn is_gone(said: &str, suites: &[&str]) -> bool {
    let releases: Vec<_> = suites
        .iter()
        .flat_map(|suite| ["InRelease", "Release"].map(|file| format!("/dists/{suite}/{file}")))
        .collect();
    let is_release = |word: &str| releases.iter().any(|release| word.ends_with(release));
    said.lines().any(|line| {
        line.contains("does not have a Release file")
            || line.contains(" 404 ") && line.split_whitespace().any(is_release)
    })
}

/// Whether the only error of apt-cache is that there is no such package.
fn has_none(said: &str) -> bool {
    let mut errors = said.lines().filter(|line| line.starts_with("E: ")).peekable();
    errors.peek().is_some() && errors.all(|error| error == "E: No packages found")
}

/// The package in a line that apt writes for one that it would install:
/// `Inst libc6 (2.41-12 Debian:13.8/stable [amd64])`.
fn simulated_install(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
    Some(format!("{name}={}", rest.split_whitespace().next()?))
}

/// Splits the output of `apt-cache show` into packages, which empty lines separate.
fn paragraphs(shown: &str) -> Vec<(String, Control)> {
    let paragraphs = shown.split("\n\n").map(|text| Control(text.to_owned()));
    let named =
        paragraphs.filter_map(|control| Some((control.field("Package")?.to_owned(), control)));
    named.collect()
}

/// The control fields of a package.
pub struct Control(String);

impl Control {
    pub fn version(&self) -> Option<&str> {
        self.field("Version")
    }

    /// The names of the packages that it depends on; the first of alternatives.
    pub fn depends(&self) -> Vec<&str> {
        self.field("Depends")
            .unwrap_or_default()
            .split(',')
            .filter_map(|dependency| dependency.split_whitespace().next())
            .map(|name| name.split(':').next().unwrap_or(name))
            .collect()
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
    }
}

/// The mirror's address: from the user, or from the machine's configuration.
pub fn mirror(store: &Store) -> Result<String> {
    if let Some(mirror) = &store.mirror {
        return Ok(mirror.clone());
    }
    if let Some(mirror) = configured_mirror()? {
        return Ok(mirror);
    }
    if command::is_root()? {
        tools::update();
        if let Some(mirror) = configured_mirror()? {
            return Ok(mirror);
        }
    }
    bail!(
        "apt knows no Debian mirror: run `apt-get update` as root, \
         or give the mirror's address with --mirror or LAB_MIRROR"
    )
}

fn configured_mirror() -> Result<Option<String>> {
    let targets = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
        "Label: Debian",
    ]))?;
    Ok(targets.lines().next().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_lose_their_versions_and_alternatives() {
        let control = Control(
            "Package: linux-image-7\nVersion: 7.3.4-1~bpo13+1\n\
             Depends: dracut | linux-initramfs-tool, linux-binary-7 (= 7.3.4-1), perl:any\n"
                .to_owned(),
        );
        assert_eq!(control.version(), Some("7.3.4-1~bpo13+1"));
        assert_eq!(control.depends(), ["dracut", "linux-binary-7", "perl"]);
    }

    #[test]
    fn packages_to_install_are_read_with_their_versions() {
        let line = "Inst libc6 (2.41-12+deb13u5 Debian:13.8/stable [amd64]) []";
        assert_eq!(simulated_install(line).as_deref(), Some("libc6=2.41-12+deb13u5"));
        assert_eq!(simulated_install("Conf libc6 (2.41-12+deb13u5 Debian [amd64])"), None);
    }

    #[test]
    fn packages_that_are_shown_together_are_separated() {
        let shown = "Package: fio\nDepends: libaio1\n\nPackage: libaio1\nVersion: 0.3\n\n";
        let [(fio, one), (libaio, other)] = &paragraphs(shown)[..] else { panic!("two packages") };
        assert_eq!((&**fio, &**libaio), ("fio", "libaio1"));
        assert_eq!((one.depends(), other.version()), (vec!["libaio1"], Some("0.3")));
    }

    #[test]
    fn a_missing_suite_is_not_a_missing_network() {
        let is_gone = |said| is_gone(said, &["old-backports", "old"]);
        assert!(is_gone("E: The repository 'x old Release' does not have a Release file."));
        assert!(is_gone("E: Failed to fetch http://x/dists/old/Release  404  Not Found [IP: y]"));
        assert!(!is_gone("W: Failed to fetch x  Could not resolve 'mirror'"));
    }

    #[test]
    fn a_missing_list_is_not_a_missing_suite() {
        let list = "http://x/dists/old/main/binary-amd64/Packages.xz";
        let other = "http://x/dists/other/InRelease";
        for url in [list, other] {
            assert!(!is_gone(&format!("E: Failed to fetch {url}  404  Not Found"), &["old"]));
        }
    }

    #[test]
    fn a_failing_lookup_is_not_a_missing_package() {
        assert!(has_none("N: Unable to locate package x\nE: No packages found\n"));
        assert!(!has_none("E: The value 'old' is invalid for APT::Default-Release\n"));
        assert!(!has_none("E: Could not open lock file x\nE: No packages found\n"));
        assert!(!has_none(""));
    }
}
