//! Errors of mapping memory for DMA that are the same for every transport.

use std::fmt;

use nix::errno::Errno;

use crate::error::{Error, ErrorKind};

/// The error of a mapping for DMA that failed with `errno`. EEXIST, EINVAL, ENOSPC and EMFILE mean the
/// same for every transport. [`DmaSpace::map`](crate::device::DmaSpace::map) documents these kinds and
/// depends on them: it tries another address after `AddressTaken`.
#[cold]
pub(crate) fn map_refused(errno: Errno, object: impl fmt::Display) -> Error {
    let error = Error::os(errno, "map for DMA", object);
    match errno {
        Errno::EEXIST => error
            .into_kind(ErrorKind::AddressTaken)
            .with_reason("a part of it is mapped already")
            .with_advice("unmap that part first, or map it at any address: IovaPlacement::default"),
        Errno::EINVAL => error
            .into_kind(ErrorKind::OutOfRange)
            .with_reason(
                "address, size and IOVA must be multiples of the page size, and the IOVA must lie in a \
                 range that can be mapped",
            )
            .with_advice("see DmaSpace::limits"),
        Errno::ENOSPC => error
            .into_kind(ErrorKind::TooManyMappings)
            .with_reason("the limit on mappings is reached")
            .with_advice(FEWER_MAPPINGS),
        Errno::EMFILE => error
            .into_kind(ErrorKind::TooManyMappings)
            .with_reason("the server keeps a file descriptor for each mapping, and its limit is reached")
            .with_advice(
                "map larger ranges, or raise the server's limit: ClientLimits::files, ulimit -n",
            ),
        _ => error,
    }
}

const FEWER_MAPPINGS: &str = "unmap some, or map larger ranges: buffers share mappings (DmaSpace::buffer), and \
                              DmaBuffer::split_at makes parts";

/// The error of a mapping that a vfio-user server refused with EINVAL after it accepted `mapped` others, if the
/// server stated no limit. libvfio-user does so after 16 mappings, or as many as it is built for.
#[cfg(feature = "vfio-user")]
#[cold]
pub(crate) fn unstated_limit(error: Error, mapped: u32) -> Error {
    error
        .into_kind(ErrorKind::TooManyMappings)
        .with_reason(format!(
            "the server has {mapped} mappings and refuses another, probably because of a limit that it does \
             not state (max_dma_maps)"
        ))
        .with_advice(FEWER_MAPPINGS)
}
