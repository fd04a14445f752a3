//! The error of closing a driver, which returns it.

use crate::error::{Error, gives_back};

/// An error of closing a driver of a device, with the driver if it is still in use: what a driver's `close`
/// returns, as [`Device::close`](super::Device::close) returns [`StillInUse`](super::StillInUse).
///
/// `?` converts it into its [`Error`] and drops the driver.
#[derive(Debug)]
pub struct CloseError<D> {
    error: Error,
    driver: Option<D>,
}

impl<D> CloseError<D> {
    /// The driver is still in use, and works as before.
    pub fn in_use(error: Error, driver: D) -> Self {
        Self { error, driver: Some(driver) }
    }

    /// The driver, unchanged, if it is still in use. `None` if it had let go of its device when it failed.
    pub fn into_driver(self) -> Option<D> {
        self.driver
    }
}

impl<D> From<Error> for CloseError<D> {
    /// An error after which the driver cannot be used.
    fn from(error: Error) -> Self {
        Self { error, driver: None }
    }
}

gives_back!(
    CloseError<D> { driver: Option<D> },
    "The error, and the driver as [`into_driver`](Self::into_driver) returns it."
);
