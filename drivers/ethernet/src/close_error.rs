//! The error of closing a card.

use std::sync::Arc;
use std::{fmt, io};

use vfio_remap::{Error, ErrorKind};

use super::nic::Nic;

/// The error of [`Nic::close`], with the card if it is still in use.
///
/// `?` converts it into its [`Error`] and drops the card.
#[derive(Debug)]
pub struct CloseError {
    pub(super) error: Error,
    pub(super) nic: Option<Arc<Nic>>,
}

impl CloseError {
    /// Why the card was not closed.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// The card, unchanged, if it is still in use. `None` if its device could not be closed: it is then quiet.
    pub fn into_nic(self) -> Option<Arc<Nic>> {
        self.nic
    }

    /// The card as [`into_nic`](Self::into_nic) returns it, and the error.
    pub fn into_parts(self) -> (Option<Arc<Nic>>, Error) {
        (self.nic, self.error)
    }
}

impl fmt::Display for CloseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for CloseError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<Error> for CloseError {
    /// An error after which the card cannot be used.
    fn from(error: Error) -> Self {
        Self { error, nic: None }
    }
}

impl From<CloseError> for Error {
    fn from(failed: CloseError) -> Self {
        failed.error
    }
}

impl From<CloseError> for io::Error {
    fn from(failed: CloseError) -> Self {
        failed.error.into()
    }
}
