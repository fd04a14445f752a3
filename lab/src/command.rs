//! Runs other programs and returns their errors, with what they wrote.

use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Runs a program to its end and returns its standard output. An error contains its
/// standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = unchecked(command)?;
    if !output.status.success() {
        bail!(
            "{} failed ({}):\n{}",
            program(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("the output of {} is not UTF-8", program(command)))
}

/// As [`output`], but does not check the exit status.
pub fn unchecked(command: &mut Command) -> Result<Output> {
    // `apt.rs` parses apt's messages.
    command.env("LC_ALL", "C");
    command.output().with_context(|| format!("cannot run {}", program(command)))
}

/// The program's name, for messages.
fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

pub fn is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}
