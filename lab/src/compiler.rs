//! A Rust compiler with the sources of its standard library, to build for targets whose
//! library is not installed. It is Debian's, unpacked into a separate root with all its
//! dependencies. Nothing is installed on the machine.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::payload;
use crate::ui::Stage;

/// The first suite has a compiler that is new enough, the second its dependencies.
const SUITES: [&str; 2] = ["trixie-backports", "trixie"];

/// The standard library, for build scripts and macros, with parts of the compiler; and its
/// sources.
const LIBRARY: &str = "libstd-rust-dev";
const SOURCES: &str = "rust-src";

/// The compiler itself. The machine already has the linker that its package depends on.
const RUSTC: &str = "rustc";

/// Runs the compiler by the root's loader, for any location of the root.
const WRAPPER: &str = r#"#!/bin/sh
usr="$(dirname "$0")/root"/usr
exec "$usr/lib64/ld-linux-x86-64.so.2" --library-path "$usr/lib/x86_64-linux-gnu" \
    "$usr/bin/rustc" --sysroot "$usr" "$@"
"#;

/// The compiler, in the cache.
pub struct Compiler {
    directory: PathBuf,
}

impl Compiler {
    /// Returns the compiler from the cache, after fetching it if needed. It is never updated.
    pub fn ensure(store: &Store) -> Result<Self> {
        let directory = store.directory.join("rustc");
        let compiler = Self { directory };
        let wrapper = fs::read_to_string(compiler.rustc());
        if !wrapper.is_ok_and(|wrapper| wrapper == WRAPPER) {
            fetch(store, &compiler.directory).context("cannot fetch a Rust compiler")?;
        }
        Ok(compiler)
    }

    fn rustc(&self) -> PathBuf {
        self.directory.join("rustc")
    }

    /// Checks the crate for a target, after building the standard library for it. The
    /// builds are kept.
    pub fn check(&self, target: &str) -> Command {
        let mut cargo = payload::cargo();
        cargo
            .args(["check", "--locked", "-Z", "build-std=std,panic_abort", "--target", target])
            .arg("--target-dir")
            .arg(payload::workspace().join("target/targets"))
            .env("RUSTC", self.rustc())
            .env("CARGO_PROFILE_DEV_DEBUG", "false")
            // Cargo and this compiler are stable releases, and build-std is unstable.
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        cargo
    }
}

fn fetch(store: &Store, directory: &Path) -> Result<()> {
    let stage = Stage::new("Fetching", "a Rust compiler and its sources, 150 MB");
    let suite = Suite::open_all(&SUITES, store)?
        .with_context(|| format!("the mirror has no {}", SUITES[0]))?;
    let mut packages = suite.closure(&[LIBRARY, SOURCES])?;
    let version = packages
        .iter()
        .find_map(|package| package.strip_prefix(LIBRARY)?.strip_prefix('='))
        .context("a package is among those that it needs")?
        .to_owned();
    packages.push(format!("{RUSTC}={version}"));
    cache::replace(directory, |new| {
        let root = new.join("root");
        fs::create_dir(&root)?;
        suite.unpack(&packages, &root)?;
        let wrapper = new.join("rustc");
        fs::write(&wrapper, WRAPPER)?;
        Ok(fs::set_permissions(wrapper, Permissions::from_mode(0o755))?)
    })?;
    stage.done("Fetched", &format!("rustc {version}"));
    Ok(())
}
