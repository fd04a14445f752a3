//! The tests that need no guest.

use anyhow::{Context, Result, bail};

use crate::payload::cargo;
use crate::tools::{self, Need};
use crate::ui;

/// The cargo commands that run them.
const STEPS: [&str; 7] = [
    "test --workspace --features vfio-remap/vm-memory,vfio-remap/passthrough",
    "test --release --test codegen",
    "test --release --package vfio-remap-nvme --test cost -- --include-ignored --skip counted --nocapture --test-threads=1",
    "test --release --package vfio-remap-ethernet --test cost -- --include-ignored --skip counted --nocapture --test-threads=1",
    "run --release --example tour",
    "run --release --example nvme -- verify",
    "run --release --example nic -- get",
];

/// Runs all of them. Stops at the first that fails.
pub fn test() -> Result<()> {
    tools::ensure(&[Need::Testing])?;
    for arguments in STEPS {
        ui::status("Running", &format!("cargo {arguments}"));
        let status = cargo().args(arguments.split(' ')).status().context("cannot run cargo")?;
        if !status.success() {
            bail!("cargo {arguments} failed");
        }
    }
    Ok(())
}
