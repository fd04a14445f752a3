//! `cargo lab release`: checks that the packages can be published.
//!
//! It checks that each package builds from its own files, and with the lowest versions of dependencies
//! that its manifest allows. It also reports how the API differs from that of a commit.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::mutants::copy_tracked;
use crate::payload::{self, Sources};
use crate::ui::{self, Stage};

/// What is published.
const PACKAGES: [&str; 3] = ["vfio-remap", "vfio-remap-ethernet", "vfio-remap-nvme"];

/// Runs the checks. Returns whether the packages can be published. `baseline` is the commit for the report.
pub fn run(baseline: Option<&str>) -> Result<bool> {
    let packaged = package()?;
    let bounds = lower_bounds()?;
    if let Some(baseline) = baseline {
        compare(baseline)?;
    }
    Ok(packaged && bounds)
}

/// Packs the packages, and builds them from the packed files.
fn package() -> Result<bool> {
    let mut cargo = payload::cargo();
    // Not committed yet is no reason to find a mistake later.
    cargo.args(["publish", "--dry-run", "--allow-dirty", "--workspace"]);
    step("Packaging", &PACKAGES.join(", "), &mut cargo)
}

/// Builds them with the lowest versions that the manifests allow of direct dependencies, in a copy of the
/// repository with a lock file of its own.
fn lower_bounds() -> Result<bool> {
    let directory = payload::workspace().join("target/lower-bounds");
    let sources = Sources { workspace: directory.join("copy"), target: directory.join("target") };
    copy_tracked(payload::workspace(), &sources.workspace)?;
    // What only tests and the lab need would raise the versions.
    let drivers = ["edu", "ethernet", "nvme"].map(|name| format!("drivers/{name}/Cargo.toml"));
    for manifest in drivers.iter().map(String::as_str).chain(["Cargo.toml"]) {
        let path = sources.workspace.join(manifest);
        fs::write(&path, published(&fs::read_to_string(&path)?))?;
    }
    let mut resolve = sources.cargo();
    resolve.args(["generate-lockfile", "-Z", "direct-minimal-versions"]);
    // A stable cargo takes the option, too.
    resolve.env("RUSTC_BOOTSTRAP", "1");
    if !step("Resolving", "the lowest versions of dependencies", &mut resolve)? {
        return Ok(false);
    }
    let mut passed = true;
    for package in PACKAGES {
        let mut check = sources.cargo();
        check.args(["check", "--all-features", "--package", package, "--target-dir"]);
        check.arg(&sources.target);
        passed &= step("Checking", &format!("{package} with these"), &mut check)?;
    }
    Ok(passed)
}

/// The end of the list of members: what has dependencies that no published package has.
const UNPUBLISHED: &str = ", \"examples/vmm\", \"lab\"]";

/// A manifest without what users of the package do not get: dependencies of its tests, and the lab.
fn published(manifest: &str) -> String {
    let mut skipped = false;
    let lines = manifest.lines().filter(|line| {
        if line.starts_with('[') {
            skipped = line.ends_with("dev-dependencies]");
        }
        !skipped
    });
    lines.flat_map(|line| [line, "\n"]).collect::<String>().replace(UNPUBLISHED, "]")
}

/// What changed in the API since a commit. It decides nothing before version 0.1 is out.
fn compare(baseline: &str) -> Result<()> {
    let installed = Command::new("cargo-semver-checks").arg("--version").output().is_ok();
    if !installed {
        ui::warning("no report on the API: cargo install cargo-semver-checks --locked");
        return Ok(());
    }
    for package in PACKAGES {
        let mut cargo = payload::cargo();
        cargo.args(["semver-checks", "--package", package, "--baseline-rev", baseline]);
        let status = cargo.status().context("cannot run cargo semver-checks")?;
        ui::status("Compared", &format!("{package} with {baseline}: {status}"));
    }
    Ok(())
}

/// Runs cargo to its end. Returns whether it succeeded. If not, prints its output.
fn step(verb: &'static str, what: &str, cargo: &mut Command) -> Result<bool> {
    let stage = Stage::new(verb, what);
    let ended = command::unchecked(cargo)?;
    if ended.status.success() {
        stage.done("Passed", what);
        return Ok(true);
    }
    drop(stage);
    ui::error(&format!("{what}:\n{}", String::from_utf8_lossy(&ended.stderr)));
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_tests_need_is_left_out() {
        let manifest = "[workspace]\nmembers = [\"drivers/nvme\", \"examples/vmm\", \"lab\"]\n\n[dependencies]\nlog = \"0.4\"\n\
                        [dev-dependencies]\nclap = \"4\"\n[target.'cfg(unix)'.dev-dependencies]\ntokio = \"1\"\n\
                        [[example]]\nname = \"tour\"\n";
        let left = "[workspace]\nmembers = [\"drivers/nvme\"]\n\n[dependencies]\nlog = \"0.4\"\n\
                    [[example]]\nname = \"tour\"\n";
        assert_eq!(published(manifest), left);
    }

    #[test]
    fn the_manifest_names_what_is_not_published() {
        let manifest = fs::read_to_string(payload::workspace().join("Cargo.toml")).unwrap();
        assert!(manifest.contains(UNPUBLISHED));
        assert!(!published(&manifest).contains("\"lab\""));
    }
}
