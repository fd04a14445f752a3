//! Where a model acts: one call at a time, and what it does wrong stays there.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::model::Model;
use crate::error::{Error, ErrorKind};

pub(super) struct Stage {
    model: Mutex<Box<dyn Model>>,
    /// Held by whoever is next to have the model. The thread of a model that is busy gives it back and takes
    /// it again at once, for which a mutex alone lets it pass those who wait.
    next: Mutex<()>,
    /// The thread that is in the model, by its [`mark`]; 0 for none.
    inside: AtomicUsize,
    /// What the model said when it panicked.
    panic: OnceLock<String>,
}

/// Why a model was not called, or did not come to an end.
pub(super) enum Refused {
    /// The caller is the model itself.
    Reentrant,
    /// It has panicked.
    Panicked(String),
}

/// A number of this thread's own, while it lives; not 0.
fn mark() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| (mark as *const u8).addr())
}

impl Stage {
    pub(super) fn new(model: impl Model + 'static) -> Self {
        Self {
            model: Mutex::new(Box::new(model)),
            next: Mutex::new(()),
            inside: AtomicUsize::new(0),
            panic: OnceLock::new(),
        }
    }

    /// Whether the model can still be called.
    pub(super) fn check(&self) -> Result<(), Refused> {
        match self.panic.get() {
            Some(message) => Err(Refused::Panicked(message.clone())),
            None => Ok(()),
        }
    }

    pub(super) fn call<R>(&self, act: impl FnOnce(&mut dyn Model) -> R) -> Result<R, Refused> {
        // Only this thread can have put its own mark there.
        if self.inside.load(Ordering::Relaxed) == mark() {
            return Err(Refused::Reentrant);
        }
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        drop(next);
        self.check()?;
        self.inside.store(mark(), Ordering::Relaxed);
        // A model that has panicked is never called again, so nobody sees what it has left half done.
        let result = catch_unwind(AssertUnwindSafe(|| act(&mut **model)));
        self.inside.store(0, Ordering::Relaxed);
        result.map_err(|payload| {
            let said = self.panic.get_or_init(|| message(&*payload)).clone();
            // What it carries may panic again when it is dropped.
            std::mem::forget(payload);
            Refused::Panicked(said)
        })
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

impl Refused {
    pub(super) fn error(self, operation: &'static str, object: impl fmt::Display) -> Error {
        match self {
            Self::Reentrant => Error::new(ErrorKind::InUse, operation, object)
                .because("the device's model is calling its own device")
                .remedy("do it inside the model, through its Bus"),
            Self::Panicked(message) => Error::new(ErrorKind::Gone, operation, object)
                .because(format!("the device's model has panicked: {message}"))
                .remedy("fix the model, and create the device again"),
        }
    }
}
