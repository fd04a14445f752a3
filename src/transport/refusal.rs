//! Why a mapping for DMA was refused, in words that do not depend on the transport.

use std::fmt;

use nix::errno::Errno;

use crate::error::{Error, ErrorKind};

/// The error of a mapping that was answered by `errno`: EEXIST, EINVAL, ENOSPC and EMFILE mean the same whoever
/// says them. The kinds are those that [`DmaSpace::map`](crate::device::DmaSpace::map) promises, and goes
/// by: it tries another place for `AddressTaken`.
#[cold]
pub(crate) fn refused(errno: Errno, object: impl fmt::Display) -> Error {
    let error = Error::os(errno, "map for DMA", object);
    match errno {
        Errno::EEXIST => error
            .into_kind(ErrorKind::AddressTaken)
            .because("a part of it is mapped already")
            .remedy("unmap that first, or map it anywhere: IovaPlacement::default"),
        Errno::EINVAL => error
            .into_kind(ErrorKind::OutOfRange)
            .because(
                "address, size and IOVA must be multiples of the page size, and lie in the ranges \
                 that can be mapped",
            )
            .remedy("see DmaSpace::limits"),
        Errno::ENOSPC => error
            .into_kind(ErrorKind::TooManyMappings)
            .because("there is no room for another mapping")
            .remedy("unmap some, or map more at once"),
        Errno::EMFILE => error
            .into_kind(ErrorKind::TooManyMappings)
            .because("the server keeps a file descriptor for each mapping, and may have no more")
            .remedy(
                "map more at once, or raise the server's limit: ClientLimits::files, ulimit -n",
            ),
        _ => error,
    }
}
