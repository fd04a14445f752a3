//! The cache of downloads and builds, outside the repository. Nothing is fetched
//! twice, and every entry is complete.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The location of the cache, for `--help`.
pub const LOCATION: &str = "$VFIO_REMAP_LAB_CACHE, or else $XDG_CACHE_HOME/vfio-remap-lab, \
                            or else ~/.cache/vfio-remap-lab";

/// The cache, and the mirror that fills it.
pub struct Store {
    pub directory: PathBuf,
    /// Only if the user named one.
    pub mirror: Option<String>,
}

impl Store {
    pub fn open(mirror: Option<String>) -> Result<Self> {
        Ok(Self { directory: directory()?, mirror })
    }
}

/// The cache's directory. Creates it if needed.
fn directory() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = set("VFIO_REMAP_LAB_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("vfio-remap-lab")))
        .or_else(|| Some(set("HOME")?.join(".cache/vfio-remap-lab")))
        .context("no place for a cache: set VFIO_REMAP_LAB_CACHE")?;
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create the cache {}", directory.display()))?;
    Ok(directory)
}

/// Replaces a directory in one step: `fill` writes to a temporary one, which replaces
/// `entry` when it is complete. An interrupted run does not change `entry`.
pub fn replace(entry: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = entry.parent().context("an entry is in a directory")?;
    fs::create_dir_all(parent)?;
    let work = tempfile::tempdir_in(parent)?;
    let new = work.path().join("new");
    fs::create_dir(&new)?;
    fill(&new)?;
    match fs::rename(entry, work.path().join("old")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    fs::rename(&new, entry).with_context(|| format!("cannot put {} in place", entry.display()))
}

/// A temporary directory for one task, so that two labs can run at the same time.
/// Removes directories of labs that were killed.
pub fn work_directory(parent: &Path, prefix: &str) -> Result<TempDir> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
        if owner.is_some_and(|process| !Path::new("/proc").join(process).exists())
            // Another boot may be removing it too.
            && let Err(error) = fs::remove_dir_all(entry.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
    }
    let prefix = format!("{prefix}{}.", process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir_in(parent)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_replaced_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let entry = root.path().join("kernels/6.1");
        replace(&entry, |new| Ok(fs::write(new.join("version"), "1")?)).unwrap();
        replace(&entry, |new| Ok(fs::write(new.join("version"), "2")?)).unwrap();
        assert_eq!(fs::read_to_string(entry.join("version")).unwrap(), "2");

        let failed = replace(&entry, |new| {
            fs::write(new.join("version"), "3")?;
            anyhow::bail!("interrupted")
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(entry.join("version")).unwrap(), "2");
        assert_eq!(fs::read_dir(entry.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn directories_of_killed_labs_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        // Process numbers end at 2^22.
        let left = parent.path().join("work-of-9999999.abc");
        fs::create_dir(&left).unwrap();
        let ours = work_directory(parent.path(), "work-of-").unwrap();
        let another = work_directory(parent.path(), "work-of-").unwrap();
        assert!(!left.exists() && ours.path().exists() && another.path().exists());
    }
}
