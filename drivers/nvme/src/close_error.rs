//! The error of closing a controller, which returns it.

use std::fmt;
use std::io;
use std::sync::Arc;

use vfio_remap::{Error, ErrorKind};

use super::controller::Controller;

/// The error of [`Controller::close`], with the controller if it is still in use.
///
/// `?` converts it into its [`Error`] and drops the controller.
#[derive(Debug)]
pub struct CloseError {
    pub(super) error: Error,
    pub(super) controller: Option<Arc<Controller>>,
}

impl CloseError {
    /// Why the controller was not closed.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// The controller, unchanged, if it is still in use. `None` if its shutdown or the closing of its device
    /// failed: it is then disabled.
    pub fn into_controller(self) -> Option<Arc<Controller>> {
        self.controller
    }

    /// The controller as [`into_controller`](Self::into_controller) returns it, and the error.
    pub fn into_parts(self) -> (Option<Arc<Controller>>, Error) {
        (self.controller, self.error)
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
    /// An error after which the controller cannot be used.
    fn from(error: Error) -> Self {
        Self { error, controller: None }
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
