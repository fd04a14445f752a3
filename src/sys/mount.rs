//! `/proc/self/mountinfo`: the type of the file system that a file is on.
//!
//! `fstatfs(2)` asks the file system, and one in another process (FUSE) answers when that process likes.
//! The kernel answers these files by itself.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

/// The type of the file system of an open file, such as `ext4`. `None` if its mount is not one of this mount
/// namespace, or `/proc` is not mounted. Does not ask the file system.
pub(crate) fn file_system(fd: impl AsFd) -> Option<String> {
    let fd = fd.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    // The names of directories in it are any bytes.
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    type_of(&String::from_utf8_lossy(&mounts), id.trim())
}

/// The type of the mount `id` (`man 5 proc_pid_mountinfo`). Spaces in names are escaped there.
fn type_of(mounts: &str, id: &str) -> Option<String> {
    let mut fields = mounts
        .lines()
        .map(|line| line.split(' '))
        .find_map(|mut fields| (fields.next() == Some(id)).then_some(fields))?;
    // Up to a hyphen there are any number of optional fields.
    fields.find(|field| *field == "-")?;
    fields.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_type_follows_the_optional_fields() {
        let mounts = "\
22 28 0:21 / /proc rw,nosuid - proc proc rw
28 1 254:1 / / rw shared:1 master:2 - ext4 /dev/vda1 rw
280 28 0:44 /a\\040-\\040ext4 /mnt/- rw - fuse.ext4 - rw
29 28 0:45 /
";
        let found = ["22", "28", "280", "2", "29", ""].map(|id| type_of(mounts, id));
        let expected = [Some("proc"), Some("ext4"), Some("fuse.ext4"), None, None, None];
        assert_eq!(found, expected.map(|name| name.map(str::to_owned)));
    }

    #[test]
    fn files_of_this_machine_have_types() {
        assert_eq!(file_system(File::open("/proc/self/maps").unwrap()).as_deref(), Some("proc"));
        // Its mount is the kernel's own.
        assert_eq!(file_system(std::io::pipe().unwrap().0), None);
    }
}
