//! The tests that need no guest.

use anyhow::{Context, Result, bail};

use crate::payload::{cargo, workspace};
use crate::ui;

/// Runs them all; stops at the first that fails.
pub fn test() -> Result<()> {
    let steps: &[(&str, Option<&str>)] = &[
        ("test --workspace --features vfio-remap/vm-memory", None),
        ("test --release --test codegen", Some("tests/codegen.rs")),
        ("run --release --example tour", Some("examples/tour.rs")),
        ("run --release --example nvme -- verify", Some("examples/nvme/main.rs")),
    ];
    for (arguments, needs) in steps {
        if needs.is_some_and(|path| !workspace().join(path).exists()) {
            continue;
        }
        ui::status("Running", &format!("cargo {arguments}"));
        let status = cargo().args(arguments.split(' ')).status().context("cannot run cargo")?;
        if !status.success() {
            bail!("cargo {arguments} failed");
        }
    }
    Ok(())
}
