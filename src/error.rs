//! What went wrong, on what, and what to do about it.

mod io;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

pub(crate) use io::gives_back;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong, for programs that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such device, region or file.
    NotFound,
    /// The device is not bound to a VFIO driver.
    NotBound,
    /// Other devices of the IOMMU group are held by kernel drivers.
    GroupNotViable,
    /// The process may not do this.
    PermissionDenied,
    /// The device has no IOMMU in front of it.
    NoIommu,
    /// The VF token of an SR-IOV function is missing, wrong, or given where none is taken.
    VfToken,
    /// A hot reset would reset devices that this process does not have, or has and did not name.
    NotOwned,
    /// A range is empty, wraps around, or leaves its region or window.
    OutOfRange,
    /// An address, offset or length is not a multiple of what it must be.
    Unaligned,
    /// This part of the region cannot be mapped.
    NotMappable,
    /// The window, region or register does not allow this access.
    ReadOnly,
    /// A reservation is too small, or not congruent with the region.
    UnsuitablePlacement,
    /// Something else is mapped at that address.
    AddressTaken,
    /// Somebody still holds it.
    InUse,
    /// Every strategy that was allowed has been refused.
    Refused,
    /// A kernel hazard forbids it.
    Hazard,
    /// A failing system call cost us an address range that we had reserved.
    ReservationLost,
    /// The kernel or a peer sent something that makes no sense.
    Malformed,
    /// The process may not have more mappings (`vm.max_map_count`), or the IOMMU not (`dma_entry_limit`).
    TooManyMappings,
    /// The process may not lock more memory (RLIMIT_MEMLOCK).
    LockedMemory,
    /// The process may not have more address space (RLIMIT_AS).
    AddressSpace,
    /// The device has gone.
    Gone,
    /// What was waited for has not come in time.
    TimedOut,
    /// The transport or the kernel does not offer this.
    Unsupported,
    /// Anything else that the operating system answered: see [`Error::errno`].
    Os,
}

/// What was tried, on which object, why it failed, and what to do.
///
/// [`Display`](fmt::Display) gives all of it in one line that reads like advice.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    object: String,
    errno: Option<Errno>,
    reason: Cow<'static, str>,
    remedy: Cow<'static, str>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`: `operation` ("open", "map") failed on `object` ("bar 0 of 0000:00:03.0").
    ///
    /// Public so that a [`Transport`](crate::transport::Transport) of your own can report as ours do.
    pub fn new(
        kind: ErrorKind,
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: operation.into(),
            object: object.to_string(),
            errno: None,
            reason: Cow::Borrowed(""),
            remedy: Cow::Borrowed(""),
            source: None,
        }))
    }

    /// A system call failed, or a peer answered with an error number: the kind follows from `errno`
    /// where it can.
    pub fn from_errno(
        errno: i32,
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
    ) -> Self {
        let kind = match Errno::from_raw(errno) {
            Errno::EACCES | Errno::EPERM => ErrorKind::PermissionDenied,
            Errno::ENOENT => ErrorKind::NotFound,
            Errno::ENODEV | Errno::ENXIO => ErrorKind::Gone,
            Errno::EBUSY => ErrorKind::InUse,
            Errno::ETIMEDOUT => ErrorKind::TimedOut,
            Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS => ErrorKind::Unsupported,
            _ => ErrorKind::Os,
        };
        Self::new(kind, operation, object).with_errno(errno)
    }

    /// A system call of this process failed. Which limit was met is said, where errno tells.
    pub(crate) fn os(
        errno: Errno,
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
    ) -> Self {
        let error = Self::from_errno(errno as i32, operation, object);
        if errno == Errno::EMFILE { too_many_descriptors(error) } else { error }
    }

    /// An `io::Error` of the standard library, by its errno.
    pub(crate) fn io(
        error: &std::io::Error,
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
    ) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::os(Errno::from_raw(errno), operation, object),
            None => Self::new(ErrorKind::Os, operation, object).because(error.to_string()),
        }
    }

    /// The same error with an error number, where its kind is known and does not follow from that.
    ///
    /// ```
    /// use vfio_remap::{Error, ErrorKind};
    ///
    /// let error = Error::new(ErrorKind::LockedMemory, "map for DMA", "0x1000 bytes")
    ///     .with_errno(libc::ENOMEM)
    ///     .remedy("raise the limit: ulimit -l");
    /// assert_eq!((error.kind(), error.errno()), (ErrorKind::LockedMemory, Some(libc::ENOMEM)));
    /// ```
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.0.errno = Some(Errno::from_raw(errno));
        self
    }

    /// The same error as another kind, where the caller knows better what an errno means here.
    /// [`DmaSpace::map`](crate::device::DmaSpace::map), for one, tries another place where a transport
    /// answers `AddressTaken`, which no errno is by itself.
    ///
    /// ```
    /// use vfio_remap::{Error, ErrorKind};
    ///
    /// let error = Error::from_errno(libc::EEXIST, "map for DMA", "0x1000 bytes at 0x10000");
    /// assert_eq!(error.kind(), ErrorKind::Os);
    /// assert_eq!(error.into_kind(ErrorKind::AddressTaken).errno(), Some(libc::EEXIST));
    /// ```
    #[must_use]
    pub fn into_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Adds why it failed.
    #[must_use]
    pub fn because(mut self, reason: impl Into<Cow<'static, str>>) -> Self {
        self.0.reason = reason.into();
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<Cow<'static, str>>) -> Self {
        self.0.remedy = remedy.into();
        self
    }

    /// Adds the error of another library that it comes of: its
    /// [`source`](std::error::Error::source). What that says is to be in the reason, too.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into().into());
        self
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was tried, as a verb: "open", "map", "relocate".
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// What it was tried on: "bar 0 of 0000:00:03.0, 0x0..0x4000".
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// The error number, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno.map(|errno| errno as i32)
    }

    /// What to do about it; empty where there is nothing to say.
    pub fn advice(&self) -> &str {
        &self.0.remedy
    }
}

/// EMFILE: every descriptor below the limit is in use (`man 2 getrlimit`).
#[cold]
fn too_many_descriptors(error: Error) -> Error {
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return error };
    error
        .because(format!(
            "the process has as many descriptors open as it may: {limit} (RLIMIT_NOFILE)"
        ))
        .remedy(format!(
            "raise it: prlimit --pid {} --nofile={}, ulimit -n, or LimitNOFILE= of its unit",
            std::process::id(),
            limit.saturating_mul(2)
        ))
}

/// Names an errno as people search for it: "EINVAL (Invalid argument)".
pub(crate) fn describe(errno: Errno) -> String {
    format!("{errno:?} ({})", errno.desc())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { operation, object, errno, reason, remedy, .. } = &*self.0;
        write!(f, "cannot {operation} {object}")?;
        if let Some(errno) = errno {
            write!(f, ": {}", describe(*errno))?;
        }
        if !reason.is_empty() {
            write!(f, ": {reason}")?;
        }
        if !remedy.is_empty() {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

/// As `Display`, headed by the kind: a test or a `main` that ends with an error prints all of it.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_on_which_object_why_and_what_to_do() {
        let error = Error::os(Errno::EACCES, "open", "/dev/vfio/12").remedy("run: chown");
        assert_eq!(
            error.to_string(),
            "cannot open /dev/vfio/12: EACCES (Permission denied); run: chown"
        );
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert_eq!(error.errno(), Some(Errno::EACCES as i32));
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::PermissionDenied);
    }
}
