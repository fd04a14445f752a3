//! `cargo lab fuzz`: fuzzes the parsers of messages from untrusted peers, a device in the hands
//! of a guest, a driver on a hostile network card, and a model of that card under a hostile
//! driver, with libFuzzer and AddressSanitizer.
//!
//! The targets are built without cargo-fuzz, so that only a C++ compiler has to be
//! installed. A stable Rust compiler accepts all flags below but the sanitizer's, for
//! which `RUSTC_BOOTSTRAP` is set.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command;
use crate::klog::tail;
use crate::payload::{self, workspace};
use crate::tools::{self, Need};
use crate::ui::{self, Stage};

/// A binary of `fuzz/`.
struct Target {
    name: &'static str,
    /// Whether it can write seeds for its corpus.
    seeds: bool,
}

const TARGETS: [Target; 6] = [
    Target { name: "ethernet_driver", seeds: true },
    Target { name: "ethernet_model", seeds: false },
    Target { name: "passthrough", seeds: true },
    Target { name: "region_info", seeds: false },
    Target { name: "vfio_user_client", seeds: true },
    Target { name: "vfio_user_server", seeds: true },
];

/// Flags that make LLVM record for libFuzzer which blocks are reached and which operands
/// are compared.
const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Zsanitizer=address",
];

/// How long to fuzz each target.
#[derive(Clone, Copy)]
pub enum Limit {
    Runs(u64),
    Time(Duration),
}

/// How long `cargo lab test` fuzzes each target.
pub const SECONDS: u64 = 30;

/// Fuzzes all targets for a short time. Fails if there is a finding.
pub fn briefly() -> Result<()> {
    ensure!(run(Limit::Time(Duration::from_secs(SECONDS)))?, "fuzzing has found something");
    Ok(())
}

/// Fuzzes all targets at the same time. Returns whether there was no finding.
pub fn run(limit: Limit) -> Result<bool> {
    tools::ensure(&[Need::Fuzzing])?;
    let programs = build()?;
    let mut running = TARGETS
        .iter()
        .map(|target| Running::start(target, &programs.join(target.name), limit))
        .collect::<Result<Vec<_>>>()?;
    let what = match limit {
        Limit::Runs(runs) => format!("{} targets, {runs} runs of each", TARGETS.len()),
        Limit::Time(time) => format!("{} targets for {} s", TARGETS.len(), time.as_secs()),
    };
    let mut stage = Stage::new("Fuzzing", &what);
    while running.iter_mut().try_fold(false, |any, one| one.runs().map(|runs| any | runs))? {
        thread::sleep(Duration::from_millis(200));
        let done: Vec<_> = running.iter().map(Running::progress).collect();
        stage.progress(&done.join(", "));
    }
    drop(stage);
    running.iter_mut().try_fold(true, |all, one| Ok(one.judge()? && all))
}

/// Builds all targets and returns their directory.
fn build() -> Result<PathBuf> {
    let (host, directory) = (payload::host_triple()?, directory());
    let stage = Stage::new("Building", "fuzz targets");
    let mut cargo = payload::cargo();
    cargo
        .args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml"])
        // If a target is named, cargo does not use the flags for build scripts and macros.
        .args(["--target", &host, "--target-dir"])
        .arg(&directory)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", FLAGS.join(" "))
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command::output(&mut cargo)?;
    stage.done("Built", "fuzz targets");
    Ok(directory.join(host).join("release"))
}

/// The directory for builds, corpora and findings.
fn directory() -> PathBuf {
    workspace().join("target/fuzz")
}

/// A running target. Dropping this kills it.
struct Running {
    name: &'static str,
    child: Child,
    ended: Option<ExitStatus>,
    log: PathBuf,
}

impl Running {
    fn start(target: &Target, program: &Path, limit: Limit) -> Result<Self> {
        let Target { name, seeds } = *target;
        let corpus = directory().join("corpus").join(name);
        let findings = directory().join("findings");
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&findings)?;
        fs::create_dir_all(payload::logs())?;
        if seeds {
            command::output(Command::new(program).env("FUZZ_SEEDS", &corpus))?;
        }
        let log = payload::logs().join(format!("fuzz-{name}.log"));
        let limit = match limit {
            Limit::Runs(runs) => format!("-runs={runs}"),
            Limit::Time(time) => format!("-max_total_time={}", time.as_secs()),
        };
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .arg(&corpus)
            // A run takes less than a millisecond; the machine may be busy.
            .args([&limit, "-max_len=800", "-timeout=60", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/{name}-", findings.display()))
            // Saves memory and time: less detail on freed memory is enough.
            .env("ASAN_OPTIONS", "detect_stack_use_after_return=0:quarantine_size_mb=8")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot run setpriv (package util-linux)")?;
        Ok(Self { name, child, ended: None, log })
    }

    /// Whether it still runs.
    fn runs(&mut self) -> Result<bool> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended.is_none())
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn progress(&self) -> String {
        let said = self.said();
        let runs = said.lines().rev().find_map(|line| line.strip_prefix('#')?.split('\t').next());
        format!("{} {}", self.name, runs.unwrap_or("0"))
    }

    /// Returns whether it has ended without a finding, and prints the result.
    fn judge(&mut self) -> Result<bool> {
        let said = self.said();
        let log = self.log.display();
        if !self.ended.is_some_and(|status| status.success()) {
            ui::error(&format!(
                "{} has found something, see {log}:\n{}",
                self.name,
                finding(&said)
            ));
            return Ok(false);
        }
        let (runs, blocks) = summary(&said).with_context(|| format!("{log} has no result"))?;
        ensure!(runs > 100, "{} has hardly run, see {log}", self.name);
        ui::status("Fuzzed", &format!("{}: {runs} runs, {blocks} blocks reached", self.name));
        Ok(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The description of a finding: the first lines, without the stack, and the file of the
/// input.
fn finding(said: &str) -> String {
    let begins = |line: &&str| line.contains("panicked at") || line.contains("ERROR: ");
    let first = said.lines().skip_while(|line| !begins(line)).take(3);
    let input = said.lines().filter(|line| line.contains("Test unit written to"));
    let lines: Vec<_> = first.chain(input).collect();
    if lines.is_empty() { tail(said, 20) } else { lines.join("\n") }
}

/// The number of runs in libFuzzer's output, and of the blocks that they reached.
fn summary(said: &str) -> Option<(u64, u64)> {
    let number = |text: &str| text.split_whitespace().next()?.parse().ok();
    let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let done = said.lines().rev().find(|line| line.starts_with('#') && line.contains("cov: "))?;
    Some((number(runs?)?, number(done.split_once("cov: ")?.1)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_are_those_of_the_manifest() {
        let manifest = fs::read_to_string(workspace().join("fuzz/Cargo.toml")).unwrap();
        let names = manifest.lines().filter_map(|line| line.strip_prefix("name = "));
        let mut names: Vec<_> = names.map(|name| name.trim_matches('"')).skip(1).collect();
        names.sort_unstable();
        assert_eq!(names, TARGETS.map(|target| target.name));
    }

    #[test]
    fn the_result_is_read_from_the_output_of_libfuzzer() {
        let said = "#7\tINITED cov: 844 ft: 1047 corp: 5/2712b exec/s: 0\n\
                    #15000\tDONE   cov: 1434 ft: 2808 corp: 207/65Kb lim: 754\n\
                    Done 15000 runs in 6 second(s)\nstat::number_of_executed_units: 15000\n";
        assert_eq!(summary(said), Some((15000, 1434)));
        assert_eq!(summary("#7\tINITED cov: 844"), None);
    }

    #[test]
    fn a_finding_is_described_without_the_stack() {
        let said = "#7\tINITED\nthread 'main' panicked at lib.rs:1:\nmappings are left\nstack:\n \
                    #0 raise\n #1 abort\nartifact_prefix='/x/'; Test unit written to /x/crash-1\n";
        let told = finding(said);
        assert!(told.contains("mappings are left") && told.ends_with("/x/crash-1"), "{told}");
        assert!(!told.contains("abort"), "{told}");
        assert_eq!(finding("killed"), "killed");
    }
}
