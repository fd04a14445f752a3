//! The reply to an info query, of the kernel or a server: a structure of `linux/vfio.h` and a capability
//! chain.

use std::mem::offset_of;

use vfio_bindings::bindings::vfio::vfio_info_cap_header;

use crate::error::{Error, ErrorKind, Result};

/// The bytes of an info reply. Reads are in native byte order, and never go past the end.
pub(super) struct InfoReply<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> InfoReply<'a> {
    /// Errors call the reply `what`.
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    pub(super) fn u16(&self, at: usize) -> Result<u16> {
        Ok(u16::from_ne_bytes(self.take(at)?))
    }

    pub(super) fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.take(at)?))
    }

    pub(super) fn u64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_ne_bytes(self.take(at)?))
    }

    /// The ID and offset of each capability in the chain that begins at offset `first` (0 means none),
    /// behind a structure of `header` bytes.
    ///
    /// # Errors
    /// `Malformed` if the chain loops, or points into the structure or past the end.
    pub(super) fn capabilities(&self, first: u32, header: usize) -> Result<Vec<(u32, usize)>> {
        let mut found = Vec::new();
        let mut at = first as usize;
        while at != 0 {
            if at < header {
                return Err(
                    self.malformed(format!("a capability at {at:#x} lies within the structure"))
                );
            }
            // Each capability has a header. If the chain is longer than the headers that fit, it loops.
            if found.len() >= self.bytes.len() / size_of::<vfio_info_cap_header>() {
                return Err(self.malformed("the capability chain loops"));
            }
            found.push((u32::from(self.u16(at)?), at));
            at = self.u32(at + offset_of!(vfio_info_cap_header, next))? as usize;
        }
        Ok(found)
    }

    /// The offsets of `count` elements of `size` bytes from `at` on.
    ///
    /// # Errors
    /// `Malformed` if they do not all fit.
    pub(super) fn array(
        &self,
        at: usize,
        size: usize,
        count: usize,
    ) -> Result<impl Iterator<Item = usize> + use<>> {
        let room = self.bytes.len().saturating_sub(at) / size;
        if count > room {
            return Err(
                self.malformed(format!("it claims {count} elements, but only {room} would fit"))
            );
        }
        Ok((0..count).map(move |index| at + index * size))
    }

    pub(super) fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::new(ErrorKind::Malformed, "read", self.what).with_reason(reason.into())
    }

    fn take<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        at.checked_add(N).and_then(|end| self.bytes.get(at..end)?.try_into().ok()).ok_or_else(
            || self.malformed(format!("{} bytes end before {at:#x} + {N}", self.bytes.len())),
        )
    }
}
