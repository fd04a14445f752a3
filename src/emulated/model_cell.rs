//! Calls a model: one call at a time, and a panic does not get out.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::model::Model;
use crate::error::{Error, ErrorKind};

pub(super) struct ModelCell {
    model: Mutex<Box<dyn Model>>,
    /// Held by the thread that gets the model next. The thread of a busy model unlocks it and locks it again at
    /// once; a single mutex would let it overtake all other threads.
    next: Mutex<()>,
    /// The [`thread_id`] of the thread that is in the model; 0 for none.
    inside: AtomicUsize,
    /// The message of the model's panic.
    panic: OnceLock<String>,
}

/// Why a model was not called, or did not return.
pub(super) enum CallError {
    /// The caller is the model itself.
    Reentrant,
    /// It has panicked.
    Panicked(String),
}

/// A number that is unique to this thread while it lives; not 0.
fn thread_id() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| (mark as *const u8).addr())
}

impl ModelCell {
    pub(super) fn new(model: impl Model + 'static) -> Self {
        Self {
            model: Mutex::new(Box::new(model)),
            next: Mutex::new(()),
            inside: AtomicUsize::new(0),
            panic: OnceLock::new(),
        }
    }

    /// Whether the model can still be called.
    pub(super) fn check(&self) -> Result<(), CallError> {
        match self.panic.get() {
            Some(message) => Err(CallError::Panicked(message.clone())),
            None => Ok(()),
        }
    }

    pub(super) fn call<R>(&self, act: impl FnOnce(&mut dyn Model) -> R) -> Result<R, CallError> {
        // Only this thread stores its own ID there.
        if self.inside.load(Ordering::Relaxed) == thread_id() {
            return Err(CallError::Reentrant);
        }
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        drop(next);
        self.check()?;
        self.inside.store(thread_id(), Ordering::Relaxed);
        // A model that has panicked is never called again, so its broken state is never seen.
        let result = catch_unwind(AssertUnwindSafe(|| act(&mut **model)));
        self.inside.store(0, Ordering::Relaxed);
        result.map_err(|payload| {
            let text = self.panic.get_or_init(|| message(&*payload)).clone();
            // The payload may panic again when it is dropped.
            std::mem::forget(payload);
            CallError::Panicked(text)
        })
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

impl CallError {
    pub(super) fn error(self, operation: &'static str, object: impl fmt::Display) -> Error {
        match self {
            Self::Reentrant => Error::new(ErrorKind::InUse, operation, object)
                .with_reason("the device's model is calling its own device")
                .with_advice("use the Bus inside the model"),
            Self::Panicked(message) => Error::new(ErrorKind::Gone, operation, object)
                .with_reason(format!("the device's model has panicked: {message}"))
                .with_advice("fix the model and create the device again"),
        }
    }
}
