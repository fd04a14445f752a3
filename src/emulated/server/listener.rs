//! Accepts clients. While one is served, the others are refused.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::write;

use super::closer::Closer;
use crate::sys::eventfd;
use crate::sys::stream::Stream;
use crate::transport::vfio_user::protocol::channel::{
    self, Deadline, Fault, Message, Receiver, Sender,
};
use crate::transport::vfio_user::protocol::wire::command;

/// How many clients may be connected that are not served. Others wait in the kernel.
const MAX_VISITORS: usize = 16;
/// How long no client is accepted after `accept(2)` has failed, or while descriptors of others cannot be closed.
const PAUSE: Duration = Duration::from_millis(100);

/// The socket that clients connect to.
pub(super) struct Listener {
    socket: UnixListener,
    closed: AtomicBool,
    waiting: Mutex<Waiting>,
    /// Happens when clients are added to `next`.
    added: Event,
}

#[derive(Default)]
struct Waiting {
    /// How many threads wait for a client to serve.
    servers: usize,
    /// Clients that are accepted and served next.
    next: VecDeque<UnixStream>,
}

/// An event that `poll(2)` can wait for.
pub(super) struct Event(OwnedFd);

impl Event {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd::new()?))
    }

    pub(super) fn happen(&self) {
        // It does not block. If it is full, it is readable.
        let _ = write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Lets an event happen when it is dropped.
pub(super) struct AtTheEnd<'a>(pub(super) &'a Event);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.happen();
    }
}

fn input(fd: &impl AsFd) -> PollFd<'_> {
    PollFd::new(fd.as_fd(), PollFlags::POLLIN)
}

fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.any().unwrap_or(false)
}

impl Listener {
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let added = Event::new()?;
        let socket = UnixListener::bind(path)?;
        let closed = AtomicBool::new(false);
        let socket = Self { socket, closed, waiting: Mutex::default(), added };
        // Several threads may wait for the same client.
        socket.socket.set_nonblocking(true).inspect_err(|_| drop(std::fs::remove_file(path)))?;
        Ok(socket)
    }

    /// Refuses clients from now on, and disconnects those that were not served.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // No client can connect after it. Those that wait in the kernel can still be accepted.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        let next = std::mem::take(&mut self.waiting().next);
        next.into_iter().for_each(|stream| drop(Stream::new(stream)));
        while let Ok((stream, _)) = self.socket.accept() {
            drop(Stream::new(stream));
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next client to serve.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.waiting().servers += 1;
        let accepted = loop {
            // A socket that was shut down is ready, and has nobody (`unix_accept`, Linux 7.3).
            if self.is_closed() {
                break Err(ErrorKind::NotConnected.into());
            }
            if let Some(stream) = self.waiting().next.pop_front() {
                break Ok(stream);
            }
            match self.socket.accept() {
                Ok((stream, _)) => break Ok(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    // The reason lasts, as a limit on descriptors does, and the client still waits: the caller
                    // tries again.
                    thread::sleep(PAUSE);
                    break Err(error);
                }
            }
            match poll(&mut [input(&self.socket), input(&self.added.0)], PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => break Err(errno.into()),
            }
            // The counter does not matter: `next` is checked.
            let _ = eventfd::take(&self.added.0);
        };
        self.waiting().servers -= 1;
        accepted
    }

    /// Refuses clients until `end` happens: replies to the first command of each with EBUSY, and disconnects those
    /// that send none within `time`. `served` is the socket of the client that is served.
    ///
    /// When that client has closed its socket, the server will be free soon. So none is refused from then on. Clients
    /// that are not refused are served next.
    pub(super) fn refuse_until(&self, served: &UnixStream, end: &Event, time: Duration) {
        let mut closer = Closer::default();
        // One of those that were next is served now.
        let next = std::mem::take(&mut self.waiting().next);
        let mut visitors = next
            .into_iter()
            .filter_map(|stream| Visitor::new(stream, time).ok())
            .collect::<VecDeque<_>>();
        let mut paused: Option<Instant> = None;
        loop {
            paused = paused.filter(|until| *until > Instant::now());
            if closer.is_full() {
                paused.get_or_insert_with(|| Instant::now() + PAUSE);
            }
            let accepts = paused.is_none() && visitors.len() < MAX_VISITORS;
            let socket = accepts.then_some(&self.socket);
            let refuses = !has_left(served);
            let heard = if refuses { &visitors } else { &VecDeque::new() };
            let (has_ended, has_come) = match wait(end, socket, heard, paused) {
                Ok(ready) => ready,
                Err(errno) => {
                    log::error!("other clients are not refused: {errno}");
                    break;
                }
            };
            if has_ended {
                break;
            }
            // Checked again after the wait: a client may have connected because the other one left.
            if refuses && !has_left(served) {
                visitors.retain_mut(|visitor| !visitor.is_done(&mut closer));
            }
            if has_come {
                match self.accept_visitor(time) {
                    Ok(visitor) => visitors.push_back(visitor),
                    Err(error) => {
                        log::debug!("a client was not accepted: {error}");
                        paused = Some(Instant::now() + PAUSE);
                    }
                }
            }
        }
        let next = visitors.into_iter().filter_map(Visitor::into_stream);
        let mut waiting = self.waiting();
        if !self.is_closed() {
            waiting.next.extend(next);
        }
        drop(waiting);
        self.added.happen();
    }

    /// Accepts a client that is not served now.
    fn accept_visitor(&self, time: Duration) -> io::Result<Visitor> {
        // If a thread waits for a client, that thread serves it.
        let waiting = self.waiting();
        if waiting.servers > 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        let (stream, _) = self.socket.accept()?;
        drop(waiting);
        Visitor::new(stream, time)
    }
}

/// Whether a client has closed its socket, even if its session does not know it yet.
fn has_left(served: &UnixStream) -> bool {
    let mut socket = [PollFd::new(served.as_fd(), PollFlags::empty())];
    let polled = poll(&mut socket, PollTimeout::ZERO);
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    polled.is_ok() && socket[0].revents().is_some_and(|events| events.intersects(gone))
}

/// Waits for the end, a client, a message of a visitor, or the next deadline. Returns whether `end` has happened, and
/// whether a client waits at `socket`.
fn wait(
    end: &Event,
    socket: Option<&UnixListener>,
    visitors: &VecDeque<Visitor>,
    paused: Option<Instant>,
) -> Result<(bool, bool), Errno> {
    let mut fds = vec![input(&end.0)];
    fds.extend(visitors.iter().map(|visitor| input(&**visitor.receiver.stream())));
    fds.extend(socket.map(|socket| input(socket)));
    let pause = paused.map(|until| until.saturating_duration_since(Instant::now()));
    let left = visitors.iter().map(|visitor| visitor.deadline.left()).chain(pause).min();
    let timeout = left.map_or(PollTimeout::NONE, |left| {
        // Rounded up, so that the last millisecond is not spent in a loop.
        let left = left.saturating_add(Duration::from_micros(999));
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, timeout) {
        Err(Errno::EINTR) => Ok((false, false)),
        Err(errno) => Err(errno),
        Ok(_) => Ok((is_ready(&fds[0]), socket.is_some() && fds.last().is_some_and(is_ready))),
    }
}

/// A client that is connected while another one is served.
struct Visitor {
    sender: Sender,
    receiver: Receiver,
    deadline: Deadline,
}

impl Visitor {
    fn new(stream: UnixStream, time: Duration) -> io::Result<Self> {
        let (sender, receiver) = channel::split(stream, time)?;
        Ok(Self { sender, receiver, deadline: Deadline::new(time).by_poll() })
    }

    /// Refuses its first command, if that has arrived. Returns whether the client is done with.
    fn is_done(&mut self, closer: &mut Closer) -> bool {
        let mut fds = Vec::new();
        match self.receiver.receive_now() {
            Ok(Some(message)) => fds.extend(self.refuse(message)),
            Ok(None) if self.deadline.check().is_ok() => return false,
            Ok(None) => log::debug!("a client sent nothing while another one was served"),
            Err(fault) => log::debug!("a client left while another one was served: {fault}"),
        }
        fds.extend(self.receiver.take_fds());
        // It is disconnected in any case.
        let _ = closer.close(fds);
        true
    }

    /// Refuses a command. Returns its descriptors.
    fn refuse(&mut self, message: Message) -> Vec<OwnedFd> {
        let Message { header, mut fds, .. } = message;
        log::debug!(
            "another client is served: {} is answered with EBUSY",
            command::name(header.command)
        );
        if header.is_command() && header.wants_reply() {
            let reply = header.failure(Errno::EBUSY);
            let sent = self.sender.send(reply, [&[], &[]], &[], &mut self.deadline);
            if let Err(fault @ (Fault::Os(_) | Fault::Silent(_))) = sent {
                log::debug!("the reply was lost: {fault}");
            }
        }
        fds.take()
    }

    /// The socket, if nothing has been received from it.
    fn into_stream(self) -> Option<UnixStream> {
        drop(self.sender);
        self.receiver.into_idle_stream()
    }
}
