//! The error type: what failed, on which object, why, and what to do.

mod gives_back;
mod io;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

pub(crate) use gives_back::gives_back;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong, for programs that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument of the caller is not what it must be: text that is no PCI address or no VF token, a device
    /// name with a NUL. For ranges and alignments there are [`OutOfRange`](Self::OutOfRange) and
    /// [`Unaligned`](Self::Unaligned).
    InvalidInput,
    /// There is no such device, region or file.
    NotFound,
    /// The device is not bound to a VFIO driver.
    NotBound,
    /// Other devices of the IOMMU group are bound to kernel drivers.
    GroupNotViable,
    /// The process lacks a permission.
    PermissionDenied,
    /// No IOMMU confines the device.
    NoIommu,
    /// The VF token of an SR-IOV function is missing, wrong, or given although the function takes none.
    VfToken,
    /// A hot reset would reset devices that this process has not opened, or has opened but did not name.
    NotOwned,
    /// A range is empty, wraps around, or leaves its region or window.
    OutOfRange,
    /// An address, offset or length is not a multiple of the required alignment.
    Unaligned,
    /// This part of the region cannot be mapped.
    NotMappable,
    /// The window, region or register does not allow this access.
    ReadOnly,
    /// A reservation is too small, or not congruent with the region.
    UnsuitablePlacement,
    /// Something else is mapped at that address.
    AddressTaken,
    /// It is still in use.
    InUse,
    /// The window is revoked.
    Revoked,
    /// The window is sealed: nothing changes it until the process ends.
    Sealed,
    /// The kernel refused every strategy that was allowed.
    Refused,
    /// A kernel hazard forbids it.
    Hazard,
    /// A reserved address range was lost in a failing system call.
    ReservationLost,
    /// The kernel or a peer sent a malformed message or reply.
    Malformed,
    /// A limit on mappings is reached: of the process (`vm.max_map_count`), of the IOMMU (`dma_entry_limit`), or
    /// of a vfio-user server.
    TooManyMappings,
    /// The limit on locked memory is reached (RLIMIT_MEMLOCK).
    LockedMemory,
    /// The limit on address space is reached (RLIMIT_AS).
    AddressSpace,
    /// The device is gone.
    Gone,
    /// A time limit has passed.
    TimedOut,
    /// The transport or the kernel does not support this.
    Unsupported,
    /// Any other error of the operating system: see [`Error::errno`].
    Os,
}

impl ErrorKind {
    fn text(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid argument",
            Self::NotFound => "not found",
            Self::NotBound => "not bound to a VFIO driver",
            Self::GroupNotViable => "IOMMU group not viable",
            Self::PermissionDenied => "permission denied",
            Self::NoIommu => "no IOMMU",
            Self::VfToken => "VF token missing or wrong",
            Self::NotOwned => "other devices would be reset",
            Self::OutOfRange => "out of range",
            Self::Unaligned => "unaligned",
            Self::NotMappable => "not mappable",
            Self::ReadOnly => "access not allowed",
            Self::UnsuitablePlacement => "unsuitable placement",
            Self::AddressTaken => "address taken",
            Self::InUse => "in use",
            Self::Revoked => "window revoked",
            Self::Sealed => "window sealed",
            Self::Refused => "refused by the kernel",
            Self::Hazard => "kernel hazard",
            Self::ReservationLost => "reservation lost",
            Self::Malformed => "malformed message or reply",
            Self::TooManyMappings => "too many mappings",
            Self::LockedMemory => "limit on locked memory reached",
            Self::AddressSpace => "limit on address space reached",
            Self::Gone => "device gone",
            Self::TimedOut => "timed out",
            Self::Unsupported => "not supported",
            Self::Os => "error of the operating system",
        }
    }
}

/// A few words: "in use".
impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

/// What failed, on which object, why, and what to do.
///
/// [`Display`](fmt::Display) shows all of it in one line: "cannot map bar 0 of 0000:00:03.0: EINVAL
/// (Invalid argument): why; what to do".
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    object: String,
    errno: Option<Errno>,
    reason: Cow<'static, str>,
    advice: Cow<'static, str>,
    inner: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`: `operation` ("open", "map") failed on `object` ("bar 0 of 0000:00:03.0").
    ///
    /// It is public for a [`Transport`](crate::transport::Transport) of your own.
    #[cold]
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
            advice: Cow::Borrowed(""),
            inner: None,
        }))
    }

    /// The error of a system call or a peer. Its kind follows from `errno`; it is `Os` for an `errno`
    /// that has no kind.
    #[cold]
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

    /// The error of a system call of this process. For EMFILE it names the limit.
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
            None => Self::new(ErrorKind::Os, operation, object).with_reason(error.to_string()),
        }
    }

    /// Adds an error number and keeps the kind.
    ///
    /// ```
    /// use vfio_remap::{Error, ErrorKind};
    ///
    /// let error = Error::new(ErrorKind::LockedMemory, "map for DMA", "0x1000 bytes")
    ///     .with_errno(libc::ENOMEM)
    ///     .with_advice("raise the limit: ulimit -l");
    /// assert_eq!((error.kind(), error.errno()), (ErrorKind::LockedMemory, Some(libc::ENOMEM)));
    /// ```
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.0.errno = Some(Errno::from_raw(errno));
        self
    }

    /// Changes the kind, for callers that know better what an errno means. For example,
    /// [`DmaSpace::map`](crate::device::DmaSpace::map) tries another IOVA if the transport returns
    /// `AddressTaken`, a kind that follows from no errno.
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

    /// Adds the reason.
    #[must_use]
    pub fn with_reason(mut self, reason: impl Into<Cow<'static, str>>) -> Self {
        self.0.reason = reason.into();
        self
    }

    /// Adds what to do.
    #[must_use]
    pub fn with_advice(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.0.advice = advice.into();
        self
    }

    /// Adds the error of another library that caused this one. If this error has no reason yet, the text of
    /// that error becomes its reason.
    ///
    /// As with an [`io::Error`](std::io::Error), [`inner`](Self::inner) returns the other error, and
    /// [`source`](std::error::Error::source) the source of the other error. So a program that prints a chain of
    /// errors prints no text twice.
    ///
    /// ```
    /// use vfio_remap::{Error, ErrorKind};
    ///
    /// let parsing = "x".parse::<u32>().expect_err("it is not a number");
    /// let error = Error::new(ErrorKind::Malformed, "read", "a number").with_inner(parsing);
    /// assert_eq!(error.to_string(), "cannot read a number: invalid digit found in string");
    /// assert!(error.inner().is_some_and(|inner| inner.is::<std::num::ParseIntError>()));
    /// ```
    #[must_use]
    pub fn with_inner(
        mut self,
        inner: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let inner = inner.into();
        if self.0.reason.is_empty() {
            self.0.reason = inner.to_string().into();
        }
        self.0.inner = Some(inner.into());
        self
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The operation that failed, as a verb: "open", "map", "relocate".
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// The object of the operation: "bar 0 of 0000:00:03.0, 0x0..0x4000".
    pub fn object(&self) -> &str {
        &self.0.object
    }

    /// The error number of a system call or a peer, if there is one.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno.map(|errno| errno as i32)
    }

    /// Why it failed, in one sentence. May be empty.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// The error of another library that caused this one: see [`with_inner`](Self::with_inner).
    pub fn inner(&self) -> Option<&(dyn std::error::Error + Send + Sync + 'static)> {
        self.0.inner.as_deref()
    }

    /// What to do. May be empty.
    pub fn advice(&self) -> &str {
        &self.0.advice
    }
}

/// Explains EMFILE: the process has reached its limit on descriptors (`man 2 getrlimit`).
#[cold]
fn too_many_descriptors(error: Error) -> Error {
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else { return error };
    error
        .with_reason(format!(
            "the process has reached its limit of {limit} open descriptors (RLIMIT_NOFILE)"
        ))
        .with_advice(format!(
            "raise it: prlimit --pid {} --nofile={}, ulimit -n, or LimitNOFILE= of its unit",
            std::process::id(),
            limit.saturating_mul(2)
        ))
}

/// Formats an errno with its name and its description: "EINVAL (Invalid argument)".
pub(crate) fn describe(errno: Errno) -> String {
    format!("{errno:?} ({})", errno.desc())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { operation, object, errno, reason, advice, .. } = &*self.0;
        write!(f, "cannot {operation} {object}")?;
        if let Some(errno) = errno {
            write!(f, ": {}", describe(*errno))?;
        }
        if !reason.is_empty() {
            write!(f, ": {reason}")?;
        }
        if !advice.is_empty() {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

/// As `Display`, preceded by the kind: a test or a `main` that returns an error prints all of it.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The text of `inner` is part of this error's text.
        self.0.inner.as_ref()?.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_on_which_object_why_and_what_to_do() {
        let error = Error::os(Errno::EACCES, "open", "/dev/vfio/12").with_advice("run: chown");
        assert_eq!(
            error.to_string(),
            "cannot open /dev/vfio/12: EACCES (Permission denied); run: chown"
        );
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert_eq!(error.errno(), Some(Errno::EACCES as i32));
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_kind_is_shown_in_words() {
        assert_eq!(format!("[{:>8}]", ErrorKind::InUse), "[  in use]");
        assert_eq!(ErrorKind::TimedOut.to_string(), "timed out");
    }
}
