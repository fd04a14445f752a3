//! Conversions: errors of the standard library and of other libraries.

use std::convert::Infallible;
use std::fmt::Display;
use std::io;

use super::{Cow, Error, ErrorKind};

impl Error {
    /// Converts an error of the standard library. The kind follows from its errno or its kind. If it
    /// contains another error, that is the [`source`](std::error::Error::source).
    ///
    /// It is public for a [`Transport`](crate::Transport) of your own. `?` converts an [`io::Error`] too,
    /// but without operation and object.
    ///
    /// ```
    /// use vfio_remap::{Error, ErrorKind};
    ///
    /// let error = std::fs::File::open("/nowhere").expect_err("there is no such file");
    /// let error = Error::from_io(error, "open", "/nowhere").with_advice("look elsewhere");
    /// assert_eq!((error.kind(), error.errno()), (ErrorKind::NotFound, Some(libc::ENOENT)));
    /// ```
    pub fn from_io(
        error: io::Error,
        operation: impl Into<Cow<'static, str>>,
        object: impl Display,
    ) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            io::ErrorKind::TimedOut => ErrorKind::TimedOut,
            io::ErrorKind::ResourceBusy => ErrorKind::InUse,
            io::ErrorKind::InvalidData => ErrorKind::Malformed,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Os,
        };
        let this = Self::io(&error, operation, object);
        if this.errno().is_some() {
            return this;
        }
        let this = this.into_kind(kind);
        match error.into_inner() {
            Some(source) => this.with_source(source),
            None => this,
        }
    }
}

/// Allows a value where a fallible conversion is accepted.
impl From<Infallible> for Error {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// Converts an [`Error`] that was converted into an [`io::Error`] back unchanged.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Self>()) {
            Some(ours) => ours.clone(),
            None => Self::from_io(error, "complete", "an I/O operation"),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.errno() {
            Some(errno) => io::Error::from_raw_os_error(errno).kind(),
            None => match error.kind() {
                ErrorKind::NotFound => io::ErrorKind::NotFound,
                ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
                ErrorKind::TimedOut => io::ErrorKind::TimedOut,
                ErrorKind::InUse => io::ErrorKind::ResourceBusy,
                ErrorKind::OutOfRange | ErrorKind::Unaligned | ErrorKind::UnsuitablePlacement => {
                    io::ErrorKind::InvalidInput
                }
                ErrorKind::Malformed => io::ErrorKind::InvalidData,
                ErrorKind::Unsupported => io::ErrorKind::Unsupported,
                _ => io::ErrorKind::Other,
            },
        };
        io::Error::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use nix::errno::Errno;

    use super::*;

    /// Converts as `?` does.
    fn through<T: Into<io::Error>>(error: T) -> Error {
        fn inner<T: Into<io::Error>>(error: T) -> Result<(), Error> {
            let error: io::Error = error.into();
            Err(error)?
        }
        inner(error).unwrap_err()
    }

    #[test]
    fn an_errno_survives_io_error() {
        let error = through(io::Error::from_raw_os_error(Errno::EACCES as i32));
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::PermissionDenied, Some(Errno::EACCES as i32))
        );
        assert_eq!(
            error.to_string(),
            "cannot complete an I/O operation: EACCES (Permission denied)"
        );
        let error = Error::os(Errno::ETIMEDOUT, "wait for", "it");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn an_error_is_unchanged_after_conversion_to_io_error_and_back() {
        let error = through(
            Error::new(ErrorKind::Hazard, "relocate", "a window")
                .with_reason("why")
                .with_advice("what to do"),
        );
        assert_eq!(error.kind(), ErrorKind::Hazard);
        assert_eq!(error.to_string(), "cannot relocate a window: why; what to do");
    }

    #[test]
    fn kinds_without_an_errno_are_converted_both_ways() {
        for (kind, ours) in [
            (io::ErrorKind::NotFound, ErrorKind::NotFound),
            (io::ErrorKind::PermissionDenied, ErrorKind::PermissionDenied),
            (io::ErrorKind::TimedOut, ErrorKind::TimedOut),
            (io::ErrorKind::ResourceBusy, ErrorKind::InUse),
            (io::ErrorKind::InvalidData, ErrorKind::Malformed),
            (io::ErrorKind::Unsupported, ErrorKind::Unsupported),
        ] {
            assert_eq!(Error::from(io::Error::from(kind)).kind(), ours);
            assert_eq!(io::Error::from(Error::new(ours, "do", "it")).kind(), kind);
        }
        assert_eq!(Error::from(io::Error::from(io::ErrorKind::WriteZero)).kind(), ErrorKind::Os);
    }

    #[test]
    fn the_source_is_the_error_of_another_library() {
        let parsing = "x".parse::<u32>().unwrap_err();
        let error = Error::from_io(io::Error::other(parsing.clone()), "read", "a number");
        assert_eq!(error.to_string(), "cannot read a number: invalid digit found in string");
        let source = error.source().unwrap().downcast_ref::<std::num::ParseIntError>().unwrap();
        assert_eq!(*source, parsing);
        assert!(Error::new(ErrorKind::Gone, "read", "it").source().is_none());
        let error = Error::new(ErrorKind::Gone, "read", "it").with_source(parsing.clone());
        assert_eq!(error.source().unwrap().to_string(), parsing.to_string());
    }
}
