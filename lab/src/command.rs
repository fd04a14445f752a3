//! Running other programs: their errors become ours, with what they said.

use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Runs a program to its end and gives its standard output. An error holds
/// all that it wrote to standard error.
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
        .with_context(|| format!("{} wrote what is not UTF-8", program(command)))
}

/// As [`output`], but leaves it to the caller to judge the exit status.
pub fn unchecked(command: &mut Command) -> Result<Output> {
    // apt's messages are read by `apt.rs`.
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
