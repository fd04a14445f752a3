//! Huge pages of this machine, reserved for a while.

use std::fs;
use std::io::ErrorKind;

use anyhow::{Context, Result};

/// The size of a page in bytes.
pub const SIZE: u64 = 2 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Pages that were added to the kernel's pool, and are taken out of it when this is dropped.
pub struct HugePages {
    before: u64,
}

fn read(name: &str) -> Result<u64> {
    let path = format!("{POOL}/{name}");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.trim().parse().with_context(|| format!("{path} has no number: {text:?}"))
}

fn set(count: u64) -> std::io::Result<()> {
    fs::write(format!("{POOL}/nr_hugepages"), count.to_string())
}

impl HugePages {
    /// Adds `count` pages. `None` if the kernel has no such pages, not as many memory in one piece, or
    /// does not let us.
    pub fn reserve(count: u64) -> Result<Option<Self>> {
        if !fs::exists(POOL)? {
            return Ok(None);
        }
        let before = read("nr_hugepages")?;
        let free = read("free_hugepages")?;
        match set(before + count) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(None),
            done => done.context("cannot reserve huge pages")?,
        }
        let pages = Self { before };
        Ok((read("free_hugepages")? >= free + count).then_some(pages))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = set(self.before) {
            crate::ui::warning(&format!("{POOL} is not what it was, {}: {error}", self.before));
        }
    }
}
