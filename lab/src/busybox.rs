//! The guest's user space except for the payload: one static busybox.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::ui::Stage;

/// Any suite would do.
const SUITE: &str = "trixie";
const PACKAGE: &str = "busybox-static";

/// Returns busybox from the cache, after fetching it if needed.
pub fn path(store: &Store) -> Result<PathBuf> {
    let entry = store.directory.join("busybox");
    let busybox = entry.join("busybox");
    if busybox.exists() {
        return Ok(busybox);
    }
    let stage = Stage::new("Fetching", PACKAGE);
    let Some(suite) = Suite::open(SUITE, store)? else {
        bail!("the mirror has no suite {SUITE}, which the guests' busybox comes from");
    };
    cache::replace(&entry, |new| {
        let tree = tempfile::tempdir_in(&store.directory)?;
        suite.unpack(&[PACKAGE.to_owned()], tree.path())?;
        let installed = ["usr/bin/busybox", "bin/busybox"]
            .iter()
            .map(|path| tree.path().join(path))
            .find(|path| path.exists());
        let Some(installed) = installed else {
            bail!("the package {PACKAGE} contains no busybox");
        };
        fs::copy(installed, new.join("busybox"))?;
        Ok(())
    })?;
    stage.done("Fetched", PACKAGE);
    Ok(busybox)
}
