//! Waiting for eventfds, which whoever signals them may have spoiled: see [`sys::eventfd`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use crate::error::{Error, Result};
use crate::sys;

pub(super) fn eventfd() -> Result<OwnedFd> {
    sys::eventfd::new().map_err(|errno| Error::os(errno, "make", "an eventfd"))
}

/// The counter of an eventfd, which is zero from then on.
pub(super) fn take(eventfd: impl AsFd, name: impl Fn() -> String) -> Result<u64> {
    sys::eventfd::take(eventfd).map_err(|errno| Error::os(errno, "wait for", name()))
}

/// The counter of an eventfd, once it is not zero; 0 once the time is over.
pub(super) fn wait(
    eventfd: impl AsFd,
    timeout: Duration,
    name: impl Fn() -> String,
) -> Result<u64> {
    let ready = || Ok(Some(take(&eventfd, &name)?).filter(|&count| count > 0));
    Ok(wait_until(eventfd.as_fd(), timeout, ready, &name)?.unwrap_or(0))
}

/// What `ready` says once it says something; it is asked whenever `fd` is readable. `None` once the time
/// is over.
pub(super) fn wait_until<T>(
    fd: BorrowedFd<'_>,
    timeout: Duration,
    ready: impl Fn() -> Result<Option<T>>,
    name: impl Fn() -> String,
) -> Result<Option<T>> {
    let end = Instant::now().checked_add(timeout);
    loop {
        let said = ready()?;
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if said.is_some() || left == Some(Duration::ZERO) {
            return Ok(said);
        }
        // Rounded up, so that the last millisecond is not spent in a loop.
        let left = left.unwrap_or(Duration::MAX).saturating_add(Duration::from_micros(999));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::os(errno, "wait for", name())),
        }
    }
}

/// Adds to the counter of an eventfd, without waiting.
pub(super) fn signal(eventfd: &OwnedFd) {
    let Err(errno) = sys::eventfd::signal(eventfd) else { return };
    // Whoever else has the eventfd can make a write wait: by a thread, then, that holds nothing but it.
    log::debug!("an eventfd is signalled by a thread: {errno}");
    let Ok(eventfd) = eventfd.try_clone() else { return };
    let thread = thread::Builder::new().name("vfio-remap signal".to_owned());
    let thread = thread.spawn(move || {
        // Who reads the counter knows that it was signalled; from zero the write does not wait.
        let _ = sys::eventfd::take(&eventfd);
        let _ = write(&eventfd, &1u64.to_ne_bytes());
    });
    if let Err(error) = thread {
        log::warn!("vectors that were set up again are not signalled: {error}");
    }
}
