//! What comes back when a buffer cannot become something else.

use super::dma_buffer::DmaBuffer;
use crate::error::{Error, ErrorKind, gives_back};

/// An error of a verb that takes a [`DmaBuffer`], with the buffer.
///
/// Converts into its [`Error`] with `?`; the buffer is then dropped.
#[derive(Debug)]
pub struct BufferFailed {
    error: Error,
    buffer: DmaBuffer,
}

impl BufferFailed {
    pub(super) fn new(
        kind: ErrorKind,
        operation: &'static str,
        buffer: DmaBuffer,
        reason: String,
        remedy: &'static str,
    ) -> Self {
        let error = Error::new(kind, operation, format!("{buffer:?}"));
        Self { error: error.because(reason).remedy(remedy), buffer }
    }

    /// What went wrong.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The buffer, as it was.
    pub fn into_buffer(self) -> DmaBuffer {
        self.buffer
    }
}

gives_back!(BufferFailed);
