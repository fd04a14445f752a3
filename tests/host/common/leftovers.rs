//! Nothing is left behind: mappings and file descriptors, before and after.

use std::collections::BTreeSet;

/// What this process holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Holdings {
    files: BTreeSet<String>,
    mappings: BTreeSet<String>,
}

/// What of this process concerns VFIO, our reservations, memory files and dma-bufs.
pub fn holdings() -> Holdings {
    let ours = |name: &str| ["vfio", "iommu", "dmabuf"].iter().any(|it| name.contains(it));
    let files = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let target = std::fs::read_link(entry.path()).ok()?.display().to_string();
            ours(&target).then(|| format!("{} {target}", entry.file_name().display()))
        })
        // One file each for the life of the process: that marks reservations, that signals eventfds, that
        // revoked windows show.
        .filter(|file| {
            let kept = ["vfio-remap-reserved", "vfio-remap-signal", "vfio-remap-revoked"];
            !kept.iter().any(|name| file.contains(name))
        })
        .collect();
    let mappings = std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| ours(line))
        .map(str::to_owned)
        .collect();
    Holdings { files, mappings }
}

/// Runs `f`, and sees that it leaves nothing behind.
pub fn none_of<T>(f: impl FnOnce() -> T) -> T {
    let before = holdings();
    let result = f();
    assert_eq!(before, holdings(), "left behind");
    result
}
