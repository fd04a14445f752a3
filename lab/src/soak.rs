//! `cargo lab soak`: what takes longer than a test may.

use anyhow::Result;

use crate::fuzz::{self, Limit};

/// Runs of each fuzz target.
const RUNS: u64 = 10_000_000;

/// Runs it all. Whether all went well.
pub fn run() -> Result<bool> {
    fuzz::run(Limit::Runs(RUNS))
}
