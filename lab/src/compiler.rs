//! A compiler with the sources of its standard library, so that it builds for targets
//! whose library nobody has installed: Debian's, unpacked into a root of its own with all
//! that it needs. The machine is left as it is.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::payload;
use crate::ui::Stage;

/// The first suite has a compiler that is new enough, the second what that needs.
const SUITES: [&str; 2] = ["trixie-backports", "trixie"];

/// The library for build scripts and macros, with the compiler's own parts; and its sources.
const LIBRARY: &str = "libstd-rust-dev";
const SOURCES: &str = "rust-src";

/// The compiler itself. What its package wants for linking, the machine has.
const RUSTC: &str = "rustc";

/// Runs the compiler by the root's loader, wherever the root is.
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
    /// From the cache, or fetched into it. What the mirror had when it was first asked stays.
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

    /// Checks the crate for a target, the standard library for which is built first. The
    /// builds stay.
    pub fn check(&self, target: &str) -> Command {
        let mut cargo = payload::cargo();
        cargo
            .args(["check", "--locked", "-Z", "build-std=std,panic_abort", "--target", target])
            .arg("--target-dir")
            .arg(payload::workspace().join("target/targets"))
            .env("RUSTC", self.rustc())
            .env("CARGO_PROFILE_DEV_DEBUG", "false")
            // The machine's cargo is a stable one, and so is this compiler.
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
