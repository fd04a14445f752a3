//! Waiting for eventfds whose flags and counter a peer may have changed: see [`sys::eventfd`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use crate::error::{Error, ErrorKind, Result};
use crate::sys;

pub(super) fn eventfd() -> Result<OwnedFd> {
    sys::eventfd::new().map_err(|errno| Error::os(errno, "make", "an eventfd"))
}

/// Reads the counter of an eventfd and resets it to zero; `None` if it was zero.
pub(super) fn take(eventfd: impl AsFd, name: impl Fn() -> String) -> Result<Option<u64>> {
    match sys::eventfd::take(eventfd) {
        Ok(count) => Ok(Some(count).filter(|&count| count > 0)),
        Err(errno) => Err(Error::os(errno, "wait for", name())),
    }
}

/// Waits until the counter of an eventfd is not zero, reads it and resets it. `TimedOut` after the time limit.
pub(super) fn wait(
    eventfd: impl AsFd,
    timeout: Duration,
    name: impl Fn() -> String,
) -> Result<u64> {
    wait_until(eventfd.as_fd(), timeout, || take(&eventfd, &name), &name)
}

/// Waits until `ready` returns `Some`. It is called whenever `fd` is readable. `TimedOut` after the time limit.
pub(super) fn wait_until<T>(
    fd: BorrowedFd<'_>,
    timeout: Duration,
    ready: impl Fn() -> Result<Option<T>>,
    name: impl Fn() -> String,
) -> Result<T> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(Error::new(ErrorKind::TimedOut, "wait for", name())
                .with_reason(format!("timed out after {timeout:?}")));
        }
        // Rounded up, so that the last millisecond is not a busy loop.
        let left = left.unwrap_or(Duration::MAX).saturating_add(Duration::from_micros(999));
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::os(errno, "wait for", name())),
        }
    }
}

/// Adds to the counter of an eventfd, without waiting.
pub(super) fn signal(eventfd: &OwnedFd) {
    let Err(errno) = sys::eventfd::signal(eventfd) else { return };
    // A peer that shares the eventfd can make a write block. Let a thread write that holds nothing else.
    log::debug!("an eventfd is signalled by a thread: {errno}");
    let Ok(eventfd) = eventfd.try_clone() else { return };
    let thread = thread::Builder::new().name("vfio-remap signal".to_owned());
    let thread = thread.spawn(move || {
        // The counter that was read is not lost: the write signals again. A write to a zero counter does not
        // block.
        let _ = sys::eventfd::take(&eventfd);
        let _ = write(&eventfd, &1u64.to_ne_bytes());
    });
    if let Err(error) = thread {
        log::warn!("cannot signal a vector that was set up again: {error}");
    }
}
