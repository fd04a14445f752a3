//! An eventfd that unmasks an INTx, for transports that watch none.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::signals::{eventfd, signal, take};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::transport::{Transport, irq_index};

/// Unmasks the INTx whenever an eventfd is written, until this is dropped.
pub(super) struct Resample {
    eventfd: OwnedFd,
    /// `None` if the transport does it.
    watcher: Option<Watcher>,
}

/// A thread that waits for the eventfd.
struct Watcher {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// The process that has the thread: see [`fork::generation`].
    generation: u32,
}

impl Resample {
    /// Has the transport watch the eventfd (Linux VFIO). For another transport a thread does it.
    pub(super) fn new(transport: &Arc<dyn Transport>, eventfd: OwnedFd) -> Result<Self> {
        match transport.unmask_irq_by(irq_index::INTX, 0, Some(eventfd.as_fd())) {
            Ok(()) => Ok(Self { eventfd, watcher: None }),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let watcher = Watcher::start(transport.clone(), &eventfd)?;
                Ok(Self { eventfd, watcher: Some(watcher) })
            }
            Err(error) => Err(error),
        }
    }

    /// Stops unmasking, so that another eventfd can be watched: Linux watches one (EBUSY).
    pub(super) fn stop(&mut self, transport: &Arc<dyn Transport>) -> Result<()> {
        match self.watcher.take() {
            Some(watcher) => drop(watcher),
            None => transport.unmask_irq_by(irq_index::INTX, 0, None)?,
        }
        Ok(())
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.eventfd
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl Watcher {
    fn start(transport: Arc<dyn Transport>, watched: &OwnedFd) -> Result<Self> {
        let failed = |error: &std::io::Error| Error::io(error, "watch", "an eventfd");
        let watched = watched.try_clone().map_err(|error| failed(&error))?;
        let stop = Arc::new(eventfd()?);
        let stopped = stop.clone();
        let work = move || while step(&*transport, &watched, &stopped).is_continue() {};
        let thread = thread::Builder::new().name("vfio-remap INTx".to_owned()).spawn(work);
        let thread = Some(thread.map_err(|error| failed(&error))?);
        Ok(Self { stop, thread, generation: fork::generation() })
    }
}

/// Waits, and unmasks the INTx once.
fn step(transport: &dyn Transport, watched: &OwnedFd, stop: &OwnedFd) -> ControlFlow<()> {
    let mut polled = [watched, stop].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    match poll(&mut polled, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => {
            log::error!("INTx of {} stays masked: {errno}", transport.info().name);
            return ControlFlow::Break(());
        }
    }
    if polled[1].any() == Some(true) {
        return ControlFlow::Break(());
    }
    if matches!(take(watched, || "an eventfd".to_owned()), Ok(Some(_)))
        && let Err(error) = transport.mask_irqs(irq_index::INTX, 0..1, false)
    {
        log::warn!("{error}");
    }
    ControlFlow::Continue(())
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // A child of fork does not have the thread.
        if self.generation != fork::generation() {
            return;
        }
        signal(&self.stop);
        if let Some(thread) = self.thread.take() {
            // A panic of a transport has been printed.
            let _ = thread.join();
        }
    }
}
