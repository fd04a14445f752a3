//! The end of a command, by SIGINT or SIGTERM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, process, thread};

use tokio::runtime;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use vfio_remap::{Error, Result};

/// Whether a command should end. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Is set by SIGINT and SIGTERM. A second signal ends the process at once.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let set = stop.clone();
        watch(move || set.set())
            .map_err(|error| Error::from_io(error, "wait for", "SIGINT and SIGTERM"))?;
        Ok(stop)
    }

    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// An error if `what` has to be given up.
    pub fn check(&self, what: &'static str) -> Result<()> {
        if !self.is_set() {
            return Ok(());
        }
        Err(Error::from_errno(libc::EINTR, "finish", what).with_reason("a signal has ended it"))
    }
}

/// Calls `ended` after the first signal.
fn watch(ended: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let mut wait = move || {
        runtime.block_on(async {
            select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        wait();
        ended();
        wait();
        process::exit(1);
    })?;
    Ok(())
}
