//! Builds the programs that run in guests: static binaries, since a guest has no
//! libraries.

use std::env;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::Message;
use elf::ElfBytes;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;

use crate::command;

/// The workspace that this lab is a member of.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the lab is in the workspace")
}

/// The directory for builds for guests and for logs. It is separate from that of the host's
/// builds, which have other flags.
pub fn target_directory() -> PathBuf {
    workspace().join("target/lab")
}

/// The directory of the logs of the last boots and builds.
pub fn logs() -> PathBuf {
    target_directory().join("logs")
}

/// The cargo that runs this lab, in the workspace.
pub fn cargo() -> Command {
    Sources::ours().cargo()
}

/// The sources of programs for guests: this workspace or a copy of it, and its build directory.
pub struct Sources {
    pub workspace: PathBuf,
    pub target: PathBuf,
}

impl Sources {
    fn ours() -> Self {
        Self { workspace: workspace().to_owned(), target: target_directory() }
    }

    /// The cargo that runs this lab, in that workspace.
    pub fn cargo(&self) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.workspace);
        cargo
    }
}

/// The tests that need a guest.
pub fn guest_tests() -> Result<PathBuf> {
    guest_tests_of(&Sources::ours())
}

/// As [`guest_tests`], from other sources.
pub fn guest_tests_of(sources: &Sources) -> Result<PathBuf> {
    let arguments = "test --no-run --test guest --profile lab --features vm-memory,passthrough";
    build_of(sources, "guest", &arguments.split(' ').collect::<Vec<_>>())
}

/// The reproducers of hazards, and the tests of the lab's kernel patches.
pub fn hazards() -> Result<PathBuf> {
    build("hazards", &["test", "--no-run", "--test", "hazards", "--profile", "lab"])
}

/// An example with the profile and features of the tests.
pub fn tested_example(name: &str) -> Result<PathBuf> {
    let arguments = ["build", "--example", name, "--profile", "lab", "--features", "vm-memory"];
    build(name, &arguments)
}

pub fn example(name: &str) -> Result<PathBuf> {
    build(name, &["build", "--release", "--example", name])
}

/// A program of the package `vmm`.
pub fn vmm(name: &str) -> Result<PathBuf> {
    build(name, &["build", "--package", "vmm", "--bin", name, "--profile", "lab"])
}

pub fn benchmark(name: &str) -> Result<PathBuf> {
    build(name, &["bench", "--no-run", "--bench", name])
}

/// An example for this machine, not for a guest.
pub fn host_example(name: &str) -> Result<PathBuf> {
    executable(name, cargo().args(["build", "--release", "--example", name]))
}

/// Builds a target for guests.
fn build(target: &str, arguments: &[&str]) -> Result<PathBuf> {
    build_of(&Sources::ours(), target, arguments)
}

fn build_of(sources: &Sources, target: &str, arguments: &[&str]) -> Result<PathBuf> {
    let host = host_triple()?;
    let rustflags = format!("target.{host}.rustflags=['-C', 'target-feature=+crt-static']");
    let mut command = sources.cargo();
    command
        .args(arguments)
        // If a target is named, cargo does not use the flags for build scripts and macros.
        .args(["--target", &host, "--config", &rustflags])
        .arg("--target-dir")
        .arg(&sources.target)
        // These would override the flags above.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    let executable = executable(target, &mut command)?;
    ensure!(
        is_static(&executable)?,
        "{} is not static: the guest has no libraries for it",
        executable.display()
    );
    Ok(executable)
}

/// Runs cargo and returns the executable that it built for a target.
fn executable(target: &str, cargo: &mut Command) -> Result<PathBuf> {
    let mut child = cargo
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    let mut executable = None;
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.target.name == target
            && let Some(path) = artifact.executable
        {
            executable = Some(path.into_std_path_buf());
        }
    }
    if !child.wait()?.success() {
        bail!("cannot build {target}");
    }
    executable.with_context(|| format!("cargo built no {target}"))
}

/// The target that cargo builds for by default.
pub fn host_triple() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = command::output(Command::new(rustc).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names its host")?.to_owned())
}

/// A static executable names no dynamic loader.
fn is_static(executable: &Path) -> Result<bool> {
    let bytes = std::fs::read(executable)?;
    let elf = ElfBytes::<AnyEndian>::minimal_parse(&bytes)?;
    let segments = elf.segments().context("an executable has segments")?;
    Ok(segments.iter().all(|segment| segment.p_type != PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_executable_is_recognized() {
        let this_test = env::current_exe().unwrap();
        assert_eq!(is_static(&this_test).unwrap(), cfg!(target_feature = "crt-static"));
    }
}
