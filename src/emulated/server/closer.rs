//! Closes descriptors that a client sent and that are not used.
//!
//! Closing a file in FUSE waits for the process that serves the file system. So a thread closes them, and no other
//! thread waits for it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use crate::transport::vfio_user::protocol::channel::Fault;

/// How many descriptors of one client may wait to be closed.
const MAX_WAITING: usize = 256;

/// Closes the descriptors of one client.
#[derive(Default)]
pub(super) struct Closer {
    thread: Option<Sender<OwnedFd>>,
    waiting: Arc<AtomicUsize>,
}

impl Closer {
    /// Closes descriptors, without waiting. An error if too many are waiting to be closed: these are closed as well,
    /// but the client has to be disconnected.
    pub(super) fn close(&mut self, fds: Vec<OwnedFd>) -> Result<(), Fault> {
        if fds.is_empty() {
            return Ok(());
        }
        let waiting = self.waiting.fetch_add(fds.len(), Ordering::Relaxed) + fds.len();
        match self.thread() {
            Some(thread) => fds.into_iter().for_each(|fd| {
                // The thread ends only when this sender is dropped.
                let _ = thread.send(fd);
            }),
            None => drop(fds),
        }
        if waiting > MAX_WAITING {
            return Err(Fault::Malformed(format!(
                "{waiting} unused descriptors from the client are waiting to be closed"
            )));
        }
        Ok(())
    }

    /// Whether so many are waiting that no more should be received.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > MAX_WAITING
    }

    /// Returns the thread, and starts it first if necessary.
    fn thread(&mut self) -> Option<&Sender<OwnedFd>> {
        if self.thread.is_none() {
            let (sender, receiver) = channel::<OwnedFd>();
            let waiting = self.waiting.clone();
            let thread = thread::Builder::new().name("vfio-user close".to_owned());
            let started = thread.spawn(move || {
                for fd in receiver {
                    drop(fd);
                    waiting.fetch_sub(1, Ordering::Relaxed);
                }
            });
            match started {
                Ok(_) => self.thread = Some(sender),
                Err(error) => log::debug!("closing descriptors without a thread: {error}"),
            }
        }
        self.thread.as_ref()
    }
}
