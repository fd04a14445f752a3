//! Memory that a client maps for DMA.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::emulated::bus::Target;
use crate::emulated::user::User;
use crate::space::{Access, DmaMemory};
use crate::sys::{self, file};
use crate::transport::vfio_user::protocol::dma::Rights;
use crate::transport::vfio_user::protocol::wire::DmaMap;

/// How the contents of a client's file are reached.
enum Pages {
    /// By `pread(2)` and `pwrite(2)`.
    Read,
    /// By mapping them, in pages of this size in bytes.
    Mapped(u64),
}

/// How a file is reached. EOPNOTSUPP if an access could wait for another process (FUSE) or another machine (NFS), and
/// for anything that is not a regular file.
fn pages(fd: &OwnedFd) -> Result<Pages, Errno> {
    if file::is_tmpfs(fd) {
        return Ok(Pages::Read);
    }
    let page = match file::huge_page_size(fd) {
        Some(page) => page,
        None if file::is_on_local_disk(fd) => sys::page_size() as u64,
        None => return Err(Errno::EOPNOTSUPP),
    };
    Ok(Pages::Mapped(page))
}

/// The memory that `map` describes in a client's file. If it is refused, the file and the reason.
pub(super) fn of_file(user: &User, map: &DmaMap, fd: OwnedFd) -> Result<Target, (OwnedFd, Errno)> {
    let checked = pages(&fd).and_then(|pages| {
        let end = map.offset.checked_add(map.size).ok_or(Errno::EINVAL)?;
        // By then the file system is known to be one that does not wait.
        let size = file::regular_size(&fd)?.ok_or(Errno::EOPNOTSUPP)?;
        if end > size { Err(Errno::EINVAL) } else { Ok(pages) }
    });
    let page = match checked {
        Ok(Pages::Read) => return Ok(Target::File(Arc::new(File::from(fd)), map.offset)),
        Ok(Pages::Mapped(page)) => page,
        Err(errno) => return Err((fd, errno)),
    };
    // Both ends are rounded to pages.
    let bytes = map.size.saturating_add(2 * page);
    let mapped = match user.may_map(bytes) {
        true => DmaMemory::of_peer(fd.as_fd(), map.offset, map.size, page, access(map)),
        false => Err(Errno::ENOMEM),
    };
    mapped.map(|memory| Target::Mapped(memory, bytes)).map_err(|errno| (fd, errno))
}

fn access(map: &DmaMap) -> Access {
    match Rights::from_flags(map.flags).include(Rights::WRITE) {
        true => Access::ReadWrite,
        false => Access::ReadOnly,
    }
}
