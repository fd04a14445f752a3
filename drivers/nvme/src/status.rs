//! The status of a command (NVMe Base 1.4 §4.6.1).

use std::fmt;

use vfio_remap::{Error, ErrorKind, Result};

/// A command's status: the type in bits 10:8, the code in bits 7:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u16);

impl Status {
    /// The command has succeeded.
    pub const SUCCESS: Self = Self(0);
    /// The controller does not have this command.
    pub const INVALID_OPCODE: Self = Self(0x001);
    /// A field of the command has a reserved or unsupported value.
    pub const INVALID_FIELD: Self = Self(0x002);
    /// Invalid namespace or format.
    pub const INVALID_NAMESPACE: Self = Self(0x00b);
    /// The command was aborted by an Abort command.
    pub const ABORT_REQUESTED: Self = Self(0x007);
    /// The submission queue was deleted, which is the first step of a reset.
    pub const QUEUE_DELETED: Self = Self(0x008);
    /// The driver has ended the command, because the controller was reset or removed (NVMe Base 2.0 §3.3.3.2.1,
    /// figure 100).
    pub const ABORTED_BY_HOST: Self = Self(0x371);

    /// From bits 63:49 of a completion's last two double words. Its other bits (More, Do Not Retry) are
    /// dropped.
    #[inline]
    pub(super) fn from_field(field: u16) -> Self {
        Self(field & 0x7ff)
    }

    /// The status code type (SCT) in bits 10:8, the status code (SC) in bits 7:0.
    #[inline]
    pub fn code(self) -> u16 {
        self.0
    }

    /// Whether the command has succeeded.
    #[inline]
    pub fn is_success(self) -> bool {
        self == Self::SUCCESS
    }

    /// Whether it is unknown if the command was carried out, so that it has to be submitted again.
    pub fn is_undecided(self) -> bool {
        [Self::ABORTED_BY_HOST, Self::ABORT_REQUESTED, Self::QUEUE_DELETED].contains(&self)
    }

    /// An error with this operation and object, unless the command has succeeded.
    pub fn check(self, operation: &'static str, object: impl FnOnce() -> String) -> Result<()> {
        if self.is_success() { Ok(()) } else { Err(self.error(operation, object())) }
    }

    /// An error with this operation and object. [`Error::inner`] returns the status.
    ///
    /// ```
    /// # use vfio_remap_nvme::Status;
    /// let error = Status::INVALID_NAMESPACE.error("read", "block 7");
    /// let status = error.inner().and_then(|inner| inner.downcast_ref::<Status>());
    /// assert_eq!(status.map(|status| status.code()), Some(0x00b));
    /// ```
    pub fn error(self, operation: &'static str, object: impl fmt::Display) -> Error {
        let kind = match self.0 {
            0x001 => ErrorKind::Unsupported,
            // The driver aborts a command only after its time limit.
            0x007 => ErrorKind::TimedOut,
            0x00b => ErrorKind::NotFound,
            0x080 => ErrorKind::OutOfRange,
            _ => ErrorKind::Os,
        };
        Error::new(kind, operation, object).with_inner(self)
    }

    fn text(self) -> &'static str {
        match self.0 {
            0x000 => "success",
            0x001 => "invalid command opcode",
            0x002 => "invalid field in command",
            0x004 => "data transfer error",
            0x005 => "aborted: power loss",
            0x006 => "internal error",
            0x007 => "aborted by the driver",
            0x008 => "aborted: the submission queue was deleted",
            0x00b => "invalid namespace or format",
            0x00c => "command sequence error",
            0x013 => "invalid PRP offset",
            0x01c => "sanitize failed",
            0x01d => "sanitize in progress",
            0x020 => "namespace is write-protected",
            0x080 => "block out of range",
            0x081 => "capacity exceeded",
            0x082 => "namespace not ready",
            0x100 => "invalid completion queue",
            0x101 => "invalid queue identifier",
            0x102 => "invalid queue size",
            0x103 => "abort command limit exceeded",
            0x105 => "too many asynchronous event requests",
            0x108 => "invalid interrupt vector",
            0x109 => "invalid log page",
            0x180 => "conflicting attributes",
            0x182 => "write to a read-only range",
            0x280 => "write fault",
            0x281 => "unrecovered read error",
            0x285 => "compare failure",
            0x286 => "access denied",
            0x287 => "block deallocated or never written",
            0x371 => "ended by the driver: the controller was reset or removed",
            _ => match self.0 >> 8 {
                0 => "generic error",
                1 => "error of this command",
                2 => "media error",
                3 => "path error",
                _ => "vendor-specific error",
            },
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (status {:#05x})", self.text(), self.0)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_aborted_after_its_time_limit_has_timed_out() {
        assert_eq!(Status::ABORT_REQUESTED.error("read", "a block").kind(), ErrorKind::TimedOut);
        assert_eq!(Status::QUEUE_DELETED.error("read", "a block").kind(), ErrorKind::Os);
    }
}
