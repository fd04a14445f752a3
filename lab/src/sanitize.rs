//! `cargo lab sanitize`: runs the tests of revocation and of the handler of SIGBUS with AddressSanitizer and
//! ThreadSanitizer.
//!
//! As for `fuzz`, `RUSTC_BOOTSTRAP` has a stable compiler accept the flags. It brings the sanitizers' run-time
//! libraries. The standard library is not instrumented.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::payload::{self, workspace};
use crate::ui;

struct Sanitizer {
    name: &'static str,
    flags: &'static str,
    /// The environment variable with its options, and these.
    options: (&'static str, &'static str),
    /// Parts of the names of the tests.
    tests: &'static [&'static str],
    /// Parts of the names of those of them that do not fit.
    skipped: &'static [&'static str],
}

const SANITIZERS: [Sanitizer; 2] = [
    Sanitizer {
        name: "address",
        flags: "-Zsanitizer=address",
        // The tests expect the default action for SIGBUS. Entries and tables of the registry are never freed.
        options: ("ASAN_OPTIONS", "handle_sigbus=0 detect_leaks=0"),
        tests: &["revocation::"],
        // The sanitizer does not get the memory that the test refuses the process.
        skipped: &["nothing_is_written_if_a_window_cannot_be_revoked"],
    },
    Sanitizer {
        name: "thread",
        flags: "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer",
        options: ("TSAN_OPTIONS", "handle_sigbus=0 die_after_fork=0"),
        // Those of peer-to-peer mappings lock mutexes, whose slow path is not instrumented.
        tests: &["revocation::guard::", "revocation::other_handlers::", "revocation::races::"],
        // Faults in handlers of other signals: it calls those with all signals blocked, SIGBUS among them. And tests
        // whose threads wait for each other's mutexes.
        skipped: &[
            "malloc_is_interrupted",
            "a_handler_that_interrupts",
            "it_comes_and_goes",
            "a_duplicate_is_revoked_with_all",
        ],
    },
];

/// What ThreadSanitizer cannot see of the standard library and the test harness, which are not instrumented: the order
/// that channels and the end of a test make; that of the last drop of an `Arc`, which is by a fence; and the list of the
/// threads' stacks. Any frame of a stack counts. The last line names the harness's main thread only.
const SUPPRESSIONS: &str = "\
race:std::sync::mpmc
race:drop_slow
race:stack_overflow
race:^test::run_test$
";

/// Runs the tests with each sanitizer. Returns whether all passed.
pub fn run() -> Result<bool> {
    SANITIZERS.iter().try_fold(true, |all, sanitizer| Ok(sanitizer.run()? && all))
}

impl Sanitizer {
    fn run(&self) -> Result<bool> {
        let host = payload::host_triple()?;
        let suppressions = self.directory().join("suppressions");
        fs::create_dir_all(self.directory())?;
        fs::write(&suppressions, SUPPRESSIONS)?;
        let (variable, options) = self.options;
        let options = match self.name {
            "thread" => format!("{options} suppressions={}", suppressions.display()),
            _ => options.to_owned(),
        };
        ui::status("Running", &format!("{} with {}", self.tests.join(" "), self.name));
        let mut cargo = payload::cargo();
        cargo
            .args(["test", "--test", "host"])
            // If a target is named, cargo does not use the flags for build scripts and macros.
            .args(["--target", &host, "--target-dir"])
            .arg(self.directory())
            .args(["--", "--test-threads=1"])
            .args(self.tests)
            .args(self.skipped.iter().flat_map(|test| ["--skip", test]))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", self.flags)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env(variable, options);
        Ok(cargo.status().context("cannot run cargo")?.success())
    }

    /// The directory for its builds, whose flags differ.
    fn directory(&self) -> PathBuf {
        workspace().join("target/sanitize").join(self.name)
    }
}
