//! Conversions: errors of the standard library and of other libraries.

use std::convert::Infallible;
use std::fmt::Display;
use std::io;

use super::{Cow, Error, ErrorKind};

impl Error {
    /// Converts an error of the standard library. The kind follows from its errno or its kind. If it
    /// contains another error, [`inner`](Self::inner) returns that.
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
            io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
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
            Some(inner) => this.with_inner(inner),
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

/// The kind of the result follows from the errno, or else from the kind. It contains the [`Error`]
/// ([`get_ref`](io::Error::get_ref)), with its text; its `raw_os_error()` is `None`, since the standard library
/// has no error with both. [`Error::errno`] of the contained error returns the number.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.errno() {
            Some(errno) => io::Error::from_raw_os_error(errno).kind(),
            None => match error.kind() {
                ErrorKind::NotFound => io::ErrorKind::NotFound,
                ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
                ErrorKind::TimedOut => io::ErrorKind::TimedOut,
                ErrorKind::InUse => io::ErrorKind::ResourceBusy,
                ErrorKind::InvalidInput
                | ErrorKind::OutOfRange
                | ErrorKind::Unaligned
                | ErrorKind::UnsuitablePlacement => io::ErrorKind::InvalidInput,
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
            (io::ErrorKind::InvalidInput, ErrorKind::InvalidInput),
            (io::ErrorKind::InvalidData, ErrorKind::Malformed),
            (io::ErrorKind::Unsupported, ErrorKind::Unsupported),
        ] {
            assert_eq!(Error::from(io::Error::from(kind)).kind(), ours);
            assert_eq!(io::Error::from(Error::new(ours, "do", "it")).kind(), kind);
        }
        assert_eq!(Error::from(io::Error::from(io::ErrorKind::WriteZero)).kind(), ErrorKind::Os);
    }

    /// A chain of errors as programs print it: each one, then its source.
    fn chain(error: &dyn std::error::Error) -> Vec<String> {
        std::iter::successors(Some(error), |error| error.source())
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn a_chain_of_errors_has_each_text_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("the outer one")]
        struct Outer(#[source] std::num::ParseIntError);

        let digit = "invalid digit found in string";
        let parsing = "x".parse::<u32>().unwrap_err();
        let error = Error::from_io(io::Error::other(parsing.clone()), "read", "a number");
        assert_eq!(chain(&error), [format!("cannot read a number: {digit}")]);
        let error = Error::from_io(io::Error::other(Outer(parsing)), "read", "it");
        assert_eq!(chain(&error), ["cannot read it: the outer one", digit]);
        // What contains the error prints it as its own text.
        assert_eq!(chain(&io::Error::from(error)), ["cannot read it: the outer one", digit]);
    }

    #[test]
    fn a_number_is_in_the_error_that_an_io_error_contains() {
        let error = io::Error::from(Error::os(Errno::EACCES, "open", "it"));
        assert_eq!(error.raw_os_error(), None);
        let contained = error.get_ref().unwrap().downcast_ref::<Error>().unwrap();
        assert_eq!(contained.errno(), Some(Errno::EACCES as i32));
    }

    #[test]
    fn the_inner_error_is_that_of_another_library() {
        let parsing = "x".parse::<u32>().unwrap_err();
        let error = Error::from_io(io::Error::other(parsing.clone()), "read", "a number");
        assert_eq!(error.to_string(), "cannot read a number: invalid digit found in string");
        let inner = error.inner().unwrap().downcast_ref::<std::num::ParseIntError>().unwrap();
        assert_eq!(*inner, parsing);
        assert!(Error::new(ErrorKind::Gone, "read", "it").inner().is_none());
        let error = Error::new(ErrorKind::Gone, "read", "it").with_reason("why");
        assert_eq!(error.with_inner(parsing).to_string(), "cannot read it: why");
    }
}
