//! What a file descriptor is, and memory files.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

#[cfg(feature = "vfio-user")]
use super::mount;

/// `memfd_create(name, MFD_CLOEXEC|MFD_ALLOW_SEALING)`, `size` bytes long.
pub(crate) fn memory_file(name: &str, size: u64) -> Result<OwnedFd, Errno> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(size)
        .map_err(|error| error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw))?;
    Ok(file.into())
}

/// Nobody can change the size of a memory file any more that may be sealed (`man 2 F_ADD_SEALS`).
pub(crate) fn fix_size(file: impl AsFd) -> Result<(), Errno> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(drop)
}

/// `memfd_create(name, MFD_CLOEXEC|MFD_ALLOW_SEALING)`, filled by `write`. When this returns, nobody can change it
/// any more, not even through `/proc` (`F_SEAL_*`, `man 2 F_ADD_SEALS`). Private mappings of it can be written.
pub(crate) fn constant_memory(
    name: &str,
    write: impl FnOnce(&mut File) -> std::io::Result<()>,
) -> std::io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(name, flags)?);
    write(&mut file)?;
    let seals = SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// `fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, len)`: the bytes read as zero, and whole blocks are
/// freed. EOPNOTSUPP if the file system does not support holes.
#[cfg(feature = "emulated")]
pub(crate) fn punch_hole(fd: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    use nix::fcntl::{FallocateFlags, fallocate};

    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let [offset, len] = [offset, len].map(i64::try_from);
    fallocate(fd, mode, offset.map_err(|_| Errno::EINVAL)?, len.map_err(|_| Errno::EINVAL)?)
}

/// Whether the file is shared memory (a memfd, a file in `/dev/shm`): a regular file on tmpfs. `fstatfs(2)`
/// alone is not enough, since it reports tmpfs for every device in `/dev` too.
///
/// Only files on tmpfs and hugetlbfs have seals (`man 2 F_GET_SEALS`). Seals are queried first, because
/// that query does not reach a file system whose process may not respond (FUSE).
pub(crate) fn is_tmpfs(fd: impl AsFd) -> bool {
    fcntl(&fd, FcntlArg::F_GET_SEALS).is_ok()
        && matches!(regular_size(&fd), Ok(Some(_)))
        && file_system(&fd) == Some(TMPFS_MAGIC)
}

/// Whether the file was opened for reading and writing (`man 2 F_GETFL`), and no seal forbids writing to it.
pub(crate) fn is_writable(fd: impl AsFd) -> bool {
    let flags = fcntl(&fd, FcntlArg::F_GETFL).unwrap_or(libc::O_RDONLY);
    // Files that have no seals answer EINVAL.
    let seals =
        fcntl(&fd, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_retain);
    let forbid = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE;
    flags & libc::O_ACCMODE == libc::O_RDWR && !seals.intersects(forbid)
}

/// Whether it is a dma-buf (`DMA_BUF_MAGIC` of `linux/magic.h`).
pub(crate) fn is_dma_buf(fd: impl AsFd) -> bool {
    file_system(fd) == Some(FsType(0x444d_4142))
}

/// Whether it is a regular file of a file system on a disk of this machine, whose pages the kernel brings
/// without asking another process or another machine. The types are known by name and by the number that
/// `fstatfs(2)` answers.
#[cfg(feature = "vfio-user")]
pub(crate) fn is_on_local_disk(fd: impl AsFd) -> bool {
    const TYPES: [(&str, u32); 6] = [
        ("ext2", 0xef53),
        ("ext3", 0xef53),
        ("ext4", 0xef53),
        ("xfs", 0x5846_5342),
        ("btrfs", 0x9123_683e),
        ("f2fs", 0xf2f5_2010),
    ];
    // By its mount first, which asks nobody.
    let Some(name) = mount::file_system(&fd) else { return false };
    let Some((_, magic)) = TYPES.iter().find(|(known, _)| *known == name) else { return false };
    file_system(&fd).is_some_and(|FsType(number)| number as u32 == *magic)
        && matches!(regular_size(&fd), Ok(Some(_)))
}

/// Whether the file is on hugetlbfs: the kernel rounds lengths of its mappings to huge pages. Seals are queried first,
/// as in [`is_tmpfs`].
pub(crate) fn is_hugetlb(fd: impl AsFd) -> bool {
    fcntl(&fd, FcntlArg::F_GET_SEALS).is_ok() && file_system(&fd) == Some(HUGETLBFS_MAGIC)
}

/// The page size of a file on hugetlbfs, in bytes; `None` for any other file. Seals are queried first, as in
/// [`is_tmpfs`].
#[cfg(feature = "emulated")]
pub(crate) fn huge_page_size(fd: impl AsFd) -> Option<u64> {
    fcntl(&fd, FcntlArg::F_GET_SEALS).ok()?;
    let file_system = fstatfs(fd).ok()?;
    (file_system.filesystem_type() == HUGETLBFS_MAGIC).then(|| file_system.block_size() as u64)
}

fn file_system(fd: impl AsFd) -> Option<FsType> {
    Some(fstatfs(fd).ok()?.filesystem_type())
}

/// The size in bytes of a regular file; `None` for a device.
pub(crate) fn regular_size(fd: impl AsFd) -> Result<Option<u64>, Errno> {
    let stat = fstat(fd)?;
    let regular = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
    Ok(regular.then(|| u64::try_from(stat.st_size).unwrap_or(0)))
}

/// Device and inode number, which identify the file in `/proc/self/maps`.
pub(crate) fn identity(fd: impl AsFd) -> Result<(u64, u64), Errno> {
    let FileStat { st_dev, st_ino, .. } = fstat(fd)?;
    Ok((st_dev, st_ino))
}

/// As [`identity`], or `None` if the file uses the kernel's shared anonymous inode, as eventfds, perf
/// events, KVM's vCPUs and, before Linux 6.10, VFIO devices do.
pub(crate) fn own_identity(fd: impl AsFd) -> Result<Option<(u64, u64)>, Errno> {
    let file = identity(fd)?;
    let anonymous = identity(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?)?;
    Ok((file != anonymous).then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eventfds_have_no_inode_of_their_own() {
        let memory = memory_file("test", 1).unwrap();
        assert_eq!(own_identity(&memory), identity(&memory).map(Some));
        assert_eq!(own_identity(EventFd::new().unwrap()), Ok(None));
    }

    #[test]
    fn a_device_on_tmpfs_is_not_shared_memory() {
        assert!(is_tmpfs(memory_file("test", 1).unwrap()));
        assert!(!is_tmpfs(File::open("/dev/zero").unwrap()), "devtmpfs reports tmpfs too");
        assert!(!is_tmpfs(File::open("/proc/self/maps").unwrap()));
        assert_eq!(regular_size(memory_file("test", 7).unwrap()), Ok(Some(7)));
        assert_eq!(regular_size(File::open("/dev/zero").unwrap()), Ok(None));
    }

    #[test]
    fn a_file_of_huge_pages_is_told_from_others() {
        assert!(!is_hugetlb(memory_file("test", 1).unwrap()));
        assert!(!is_hugetlb(File::open("/proc/self/maps").unwrap()));
        // A kernel may have no huge pages. It needs none for an empty file.
        if let Ok(huge) = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB) {
            assert!(is_hugetlb(huge));
        }
    }

    #[test]
    #[cfg(feature = "vfio-user")]
    fn a_file_on_a_disk_is_told_by_its_file_system() {
        let memory = memory_file("test", 1).unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(!is_on_local_disk(memory) && !is_on_local_disk(reader));
        assert!(!is_on_local_disk(File::open("/proc/self/maps").unwrap()));
        assert!(!is_on_local_disk(File::open("/dev/zero").unwrap()));
        let here = File::open("Cargo.toml").unwrap();
        let name = mount::file_system(&here).unwrap();
        let known = ["ext4", "xfs", "btrfs"].contains(&name.as_str());
        assert_eq!(is_on_local_disk(&here), known, "{name}");
        // A directory is not mapped.
        assert!(!is_on_local_disk(File::open(".").unwrap()));
    }
}
