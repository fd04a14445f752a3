//! The error of methods that take a buffer: it returns the buffer.

use super::dma_buffer::DmaBuffer;
use crate::error::{Error, ErrorKind, gives_back};

/// An error of a method that takes a [`DmaBuffer`], with the buffer.
///
/// `?` converts it into its [`Error`] and drops the buffer.
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
        advice: &'static str,
    ) -> Self {
        let error = Error::new(kind, operation, format!("{buffer:?}"));
        Self { error: error.with_reason(reason).with_advice(advice), buffer }
    }

    /// The buffer, unchanged.
    pub fn into_buffer(self) -> DmaBuffer {
        self.buffer
    }
}

gives_back!(BufferFailed { buffer: DmaBuffer }, "The error, and the buffer, unchanged.");
