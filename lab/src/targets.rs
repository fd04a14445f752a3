//! `cargo lab targets`: checks that the crate compiles for other supported targets, and
//! that it fails with one error for unsupported ones.

use std::io::{BufReader, Read, Seek};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use cargo_metadata::Message;
use cargo_metadata::diagnostic::DiagnosticLevel;

use crate::cache::Store;
use crate::compiler::Compiler;
use crate::ui::{self, Stage};

/// Another C library, and another architecture.
const SUPPORTED: [&str; 2] = ["x86_64-unknown-linux-musl", "aarch64-unknown-linux-gnu"];

/// 32-bit addresses, and another kernel.
const UNSUPPORTED: [&str; 2] = ["i686-unknown-linux-gnu", "x86_64-unknown-freebsd"];

/// The feature combinations to check.
const FEATURES: [&[&str]; 3] = [&[], &["--all-features"], &["--no-default-features"]];

/// The beginning of the error.
const ERROR: &str = "vfio-remap needs ";

/// Checks the crate for all targets. Returns whether all results are as expected.
pub fn run(store: &Store) -> Result<bool> {
    let compiler = Compiler::ensure(store)?;
    let mut passed = true;
    for target in SUPPORTED {
        for features in FEATURES {
            let name = [&[target], features].concat().join(" ");
            passed &=
                check(compiler.check(target).args(features), &name, |errors| errors.is_empty())?;
        }
    }
    for target in UNSUPPORTED {
        passed &= check(&mut compiler.check(target), target, is_refused)?;
    }
    if !passed {
        ui::error("not every target has the expected result: see the errors above");
    }
    Ok(passed)
}

/// Whether the compiler has reported only our error.
fn is_refused(errors: &[String]) -> bool {
    matches!(errors, [error] if error.starts_with(ERROR))
}

fn check(cargo: &mut Command, name: &str, wanted: impl FnOnce(&[String]) -> bool) -> Result<bool> {
    let stage = Stage::new("Checking", name);
    let errors = errors(cargo)?;
    if !wanted(&errors) {
        drop(stage);
        let told = if errors.is_empty() { "no error".to_owned() } else { errors.join("\n") };
        ui::error(&format!("{name}: {told}"));
        return Ok(false);
    }
    stage.done("Checked", &format!("{name}: {}", errors.first().map_or("clean", String::as_str)));
    Ok(true)
}

/// The errors of the compiler, without its summary.
fn errors(cargo: &mut Command) -> Result<Vec<String>> {
    // Not a pipe, which nothing would read meanwhile.
    let mut said = tempfile::tempfile()?;
    let mut child = cargo
        .args(["--quiet", "--message-format=json"])
        .stdout(Stdio::piped())
        .stderr(said.try_clone()?)
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    let mut errors = Vec::new();
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerMessage(message) = message?
            && message.message.level == DiagnosticLevel::Error
            && !message.message.message.starts_with("aborting due to")
        {
            errors.push(message.message.message);
        }
    }
    // Cargo itself reports what fails before the compiler runs.
    if !child.wait()?.success() && errors.is_empty() {
        let mut text = String::new();
        said.rewind()?;
        said.read_to_string(&mut text)?;
        errors.push(text);
    }
    Ok(errors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload;

    #[test]
    fn a_target_is_refused_by_the_one_error_of_the_crate() {
        let source = std::fs::read_to_string(payload::workspace().join("src/lib.rs")).unwrap();
        let start = source.find(ERROR).expect("the crate has an error for other targets");
        let error = source[start..].split('"').next().unwrap().to_owned();
        assert!(is_refused(std::slice::from_ref(&error)));
        assert!(!is_refused(&[error, "unresolved import `nix`".to_owned()]));
        assert!(!is_refused(&["unresolved import `nix`".to_owned()]));
        assert!(!is_refused(&[]));
    }
}
