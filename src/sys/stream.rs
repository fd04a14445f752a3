//! A connected stream socket whose end nobody waits for.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::fork;

/// A stream socket that is connected to a peer that is not trusted.
///
/// Closing a socket closes the descriptors that the peer has sent and nobody has received. Each may wait as long as
/// the peer likes: a TCP socket with `SO_LINGER`, a file in FUSE. So a thread closes a socket in which something is
/// left.
#[derive(Debug)]
pub(crate) struct Stream {
    stream: ManuallyDrop<UnixStream>,
    /// The process that made it: see [`fork::generation`].
    generation: u32,
}

impl Stream {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream: ManuallyDrop::new(stream), generation: fork::generation() }
    }

    /// `poll(2)` without waiting: whether the peer has closed its end, or either side has shut both directions
    /// down.
    pub(crate) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|_| {
            let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
            fds[0].revents().is_some_and(|events| events.intersects(ended))
        })
    }

    /// The socket, open.
    #[cfg(feature = "emulated")]
    pub(crate) fn into_inner(self) -> UnixStream {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used or dropped afterwards.
        unsafe { ManuallyDrop::take(&mut this.stream) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the field is not used afterwards.
        let stream = unsafe { ManuallyDrop::take(&mut self.stream) };
        // A child of fork(2) has a copy of the descriptor, and closes nothing by closing it.
        if self.generation != fork::generation() {
            return;
        }
        // The peer can send nothing more. It fails only if the peer has shut it down before.
        let _ = stream.shutdown(Shutdown::Both);
        if unread(&stream) == Ok(0) {
            return;
        }
        let thread = thread::Builder::new().name("vfio-user close".to_owned());
        if let Err(error) = thread.spawn(move || drop(stream)) {
            log::debug!("a socket was closed here: {error}");
        }
    }
}

/// `ioctl(FIONREAD)`: how many bytes have come and are not received. EINVAL for a socket that listens.
fn unread(stream: &UnixStream) -> Result<libc::c_int, Errno> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one int.
    let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &mut bytes) };
    Errno::result(done).map(|_| bytes)
}

impl Deref for Stream {
    type Target = UnixStream;

    fn deref(&self) -> &UnixStream {
        &self.stream
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
