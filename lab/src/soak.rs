//! `cargo lab soak`: runs what takes too long for a test.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::fuzz::{self, Limit};
use crate::guest::{self, Payload};
use crate::kernels::{self, Kernel, NEWEST, PATCHED};
use crate::libtest::Counts;
use crate::machine::Variant;
use crate::payload;
use crate::sanitize;
use crate::test;
use crate::ui;
use crate::vfio_user;
use crate::vmm::{self, Extent};

/// Runs of each fuzz target.
const RUNS: u64 = 10_000_000;

/// The test of faults under the Ethernet driver, and its seeds: fifty faults each.
const FAULTS: &str = "test --package vfio-remap-ethernet --features smoltcp --test host -- --nocapture faults_under_tcp";
const SEEDS: &str = "0..40";

/// How many guests use one vfio-user server, one after another.
const STARTS: u32 = 20;

/// The tests of the handler of SIGBUS, and by how much their rounds are multiplied.
const HANDLERS: &str = "test --release --test host revocation::";
const ROUNDS: &str = "100";

/// All interleavings of that handler with verbs, by loom.
const INTERLEAVINGS: &str = "test --release --package vfio-remap --lib interleavings";
const LOOM: &str = "--cfg vfio_remap_loom";

/// The guest tests of devices that are taken away or removed, and by how much their rounds are multiplied: fifty
/// times decoding is switched off, and twice a card is pulled. They print how long that took.
const OUTAGES: [&str; 3] = ["revocation::", "removal::", "--nocapture"];
const OUTAGE_ROUNDS: u32 = 20;
/// The example whose server truncates the file behind a window.
const TRUNCATIONS: (&str, [&str; 4]) = ("unplug", ["--cause", "truncate", "--rounds", "1000"]);
/// The time limit of such a boot.
const OUTAGE_TIME: Duration = Duration::from_secs(60 * 60);

/// The long tests among the tests of the kernel patches, and how many there are.
const RACES: (&str, u32) = ("_against_revocation_for_a_minute", 2);

/// Runs everything. Returns whether all passed.
pub fn run(lab: &Lab, store: &Store) -> Result<bool> {
    // Runs the second even if the first failed.
    let raced = race(lab, store)?;
    let newest = kernels::by_name(NEWEST).map_err(anyhow::Error::msg)?;
    let started = vfio_user::starts(lab, store, newest, STARTS)?;
    let passed_through = vmm::run(lab, store, &[], Extent::Long)?;
    let recovered = faults()?;
    let handled = handlers()? && interleavings()?;
    let contained = outages(lab, store, &test::selected(&[]))?;
    let sane = sanitize::run()?;
    let all = raced && started && passed_through && recovered && handled && contained && sane;
    Ok(fuzz::run(Limit::Runs(RUNS))? && all)
}

/// Two thousand faults of network cards under streams of TCP.
fn faults() -> Result<bool> {
    ui::status("Running", &format!("cargo {FAULTS}, seeds {SEEDS}"));
    let mut cargo = payload::cargo();
    let status = cargo
        .args(FAULTS.split(' '))
        .env("VFIO_REMAP_TEST_FAULT_SEEDS", SEEDS)
        .status()
        .context("cannot run cargo")?;
    Ok(status.success())
}

/// A million rounds in which handlers of SIGBUS revoke windows that are dropped, restored and relocated, and
/// thousands of truncated files.
fn handlers() -> Result<bool> {
    ui::status("Running", &format!("cargo {HANDLERS}, {ROUNDS} times as many rounds"));
    let mut cargo = payload::cargo();
    let status = cargo
        .args(HANDLERS.split(' '))
        .env(guest::ROUNDS, ROUNDS)
        .status()
        .context("cannot run cargo")?;
    Ok(status.success())
}

/// Tries all interleavings of handlers of SIGBUS with verbs, in a model of the registry of windows.
fn interleavings() -> Result<bool> {
    ui::status("Running", &format!("cargo {INTERLEAVINGS}, with loom"));
    let mut cargo = payload::cargo();
    let status = cargo
        .args(INTERLEAVINGS.split(' '))
        .env("RUSTFLAGS", LOOM)
        // Builds with other flags are kept apart.
        .env("CARGO_TARGET_DIR", payload::workspace().join("target/loom"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("cannot run cargo")?;
    Ok(status.success())
}

/// Takes devices away a thousand times by each cause, and pulls, unplugs and unbinds them forty times, in each of
/// these kernels. Returns whether all passed.
pub fn outages(lab: &Lab, store: &Store, kernels: &[&'static Kernel]) -> Result<bool> {
    ui::status("Running", &format!("outages in guests, {OUTAGE_ROUNDS} times as many rounds"));
    let lab = Lab { rounds: OUTAGE_ROUNDS, timeout: lab.timeout.max(OUTAGE_TIME), ..lab.clone() };
    let mut passed = true;
    for kernel in kernels {
        passed &= truncations(&lab, store, kernel)?;
    }
    Ok(test::guest(&lab, store, kernels, &OUTAGES.map(str::to_owned), false)? && passed)
}

/// Truncates the file behind windows a thousand times.
fn truncations(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    let (example, arguments) = TRUNCATIONS;
    let program = payload::tested_example(example)?;
    let Some(image) = kernel.image(store)? else {
        ui::warning(&format!("the mirror does not have kernel {} any more", kernel.name));
        return Ok(true);
    };
    let arguments = arguments.map(str::to_owned);
    let payload = Payload { program: &program, arguments: &arguments, files: &[] };
    let label = format!("{}-truncations", kernel.name);
    let outcome = lab.boot(&image, Variant::Usual, &payload, &label)?;
    let complaints = outcome.complaints();
    let passed = matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty();
    if !passed {
        ui::error(&format!("{label}\n{complaints}"));
    }
    Ok(passed)
}

/// Moves and duplicates a mapping while it is revoked, in the patched kernel.
fn race(lab: &Lab, store: &Store) -> Result<bool> {
    let program = payload::hazards()?;
    let kernel = kernels::by_name(PATCHED).map_err(anyhow::Error::msg)?;
    let Some(image) = kernel.image(store)? else {
        bail!("the mirror does not have the source of kernel {PATCHED} any more");
    };
    let (races, count) = RACES;
    let arguments = ["--ignored", races, "--nocapture"].map(str::to_owned);
    let payload = Payload { program: &program, arguments: &arguments, files: &[] };
    let outcome = lab.boot(&image, Variant::Usual, &payload, "patched-soak")?;
    let complaints = outcome.complaints();
    let passed = matches!(outcome.ending, Ending::Exited(0))
        && Counts::find(&outcome.output).is_some_and(|counts| counts.passed == count)
        && complaints.is_empty();
    if !passed {
        ui::error(&format!("{races}\n{complaints}"));
    }
    Ok(passed)
}
