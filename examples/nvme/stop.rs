//! Ends a measurement early.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use vfio_remap::{Error, ErrorKind, Result};

/// A flag that is set when the process gets SIGTERM or SIGINT.
pub fn flag() -> Result<Arc<AtomicBool>> {
    set_by_signals().map_err(|error| {
        Error::new(ErrorKind::Os, "wait for", "signals").with_reason(error.to_string())
    })
}

fn set_by_signals() -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let set = flag.clone();
    thread.spawn(move || {
        runtime.block_on(async {
            select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        set.store(true, Ordering::Relaxed);
    })?;
    Ok(flag)
}
