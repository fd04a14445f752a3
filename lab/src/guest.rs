//! The initramfs of a guest: busybox, `guest/init`, the kernel's modules and the payload.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::kernels::Image;
use crate::machine::{self, Variant};
use crate::modules;

const INIT: &str = include_str!("../guest/init");

/// The program that a guest runs.
pub struct Payload<'a> {
    pub program: &'a Path,
    pub arguments: &'a [String],
    /// Other files that it needs: paths in the guest, without the leading slash, and the
    /// files on the host.
    pub files: &'a [(String, PathBuf)],
}

/// The environment variable by which the rounds of some tests are multiplied, here and in guests.
pub const ROUNDS: &str = "VFIO_REMAP_ROUNDS";

/// Builds the initramfs for one boot. In the guest the payload writes to a terminal; `terminal` says
/// whether the host shows its output on one too. If not, the payload draws no progress bars. `rounds` is the value of
/// [`ROUNDS`].
pub fn initramfs(
    image: &Image,
    variant: Variant,
    busybox: &Path,
    payload: &Payload,
    terminal: bool,
    rounds: u32,
) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "lab", "lab/modules", "lab/on-demand", "proc", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(busybox)?);
    for set in [&modules::LOADED, &modules::ON_DEMAND] {
        for (path, module) in image.module_files(set)? {
            archive.file_in_directories(&path, &read(&module)?);
        }
    }
    let program = payload.program.file_name().context("the payload is a file")?.to_string_lossy();
    let program = format!("/lab/{program}");
    archive.file(&program[1..], &read(payload.program)?);
    for (path, file) in payload.files {
        archive.file_in_directories(path, &read(file)?);
    }
    let config = config(image.name, variant, &program, payload.arguments, terminal, rounds);
    archive.file("lab/config", config.as_bytes());
    Ok(archive.finish())
}

/// The part of init that differs between boots: the payload's environment and command
/// line.
fn config(
    kernel: &str,
    variant: Variant,
    program: &str,
    arguments: &[String],
    terminal: bool,
    rounds: u32,
) -> String {
    let environment = [
        ("LAB_DEVICES", machine::addresses(variant)),
        ("LAB_KERNEL", kernel.to_owned()),
        ("LAB_IOMMU", u8::from(variant.has_iommu()).to_string()),
        (ROUNDS, rounds.to_string()),
        ("TERM", if terminal { "linux" } else { "dumb" }.to_owned()),
        ("HOME", "/tmp".to_owned()),
        ("TMPDIR", "/tmp".to_owned()),
        ("RUST_BACKTRACE", "1".to_owned()),
    ];
    let mut config = String::new();
    for (name, value) in environment {
        config += &format!("export {name}={}\n", quoted(&value));
    }
    config += &format!("LAB_DRIVERS={}\n", quoted(&machine::drivers(variant)));
    config += &format!("set -- {}", quoted(program));
    for argument in arguments {
        config += &format!(" {}", quoted(argument));
    }
    config.push('\n');
    config
}

/// Quotes a word for a shell.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_reach_the_payload_unchanged() {
        let arguments = ["it's $HOME".to_owned(), String::new()];
        let config = config("6.1", Variant::Usual, "/lab/guest", &arguments, false, 7);
        assert!(config.contains("export VFIO_REMAP_ROUNDS='7'\n"));
        assert!(config.contains("export LAB_KERNEL='6.1'\n"));
        assert!(config.contains("export TERM='dumb'\n"));
        assert!(config.ends_with("set -- '/lab/guest' 'it'\\''s $HOME' ''\n"), "{config}");
    }
}
