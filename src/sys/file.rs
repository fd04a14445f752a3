//! What a file descriptor is, and memory files.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

/// `memfd_create(name, MFD_CLOEXEC)`, `size` bytes long.
pub(crate) fn memory_file(name: &str, size: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(fd);
    file.set_len(size)
        .map_err(|error| error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))?;
    Ok(file.into())
}

/// Whether the file's pages are a tmpfs's own (a memfd, a file in `/dev/shm`), by `fstatfs(2)`.
pub(crate) fn is_tmpfs(fd: impl AsFd) -> bool {
    fstatfs(fd).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
}

/// The size in bytes of a regular file; `None` for a device.
pub(crate) fn regular_size(fd: impl AsFd) -> Result<Option<u64>, Errno> {
    let stat = fstat(fd)?;
    let regular = SFlag::from_bits_truncate(stat.st_mode).contains(SFlag::S_IFREG);
    Ok(regular.then(|| u64::try_from(stat.st_size).unwrap_or(0)))
}

/// Device and inode number: which file this is, as `/proc/self/maps` shows it.
pub(crate) fn identity(fd: impl AsFd) -> Result<(u64, u64), Errno> {
    let FileStat { st_dev, st_ino, .. } = fstat(fd)?;
    Ok((st_dev, st_ino))
}
