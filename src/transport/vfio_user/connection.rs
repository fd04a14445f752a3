//! Exchanges with a server: one at a time, each within its time, and none after one that went wrong.

use std::fmt;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use nix::errno::Errno;

use super::protocol::channel::{self, Deadline, Fault, Message, Receiver, Sender};
use super::protocol::dma::DmaTable;
use super::protocol::version::Capabilities;
use super::protocol::wire::{Header, MINOR, Version, command};
use crate::error::{Error, ErrorKind, Result};
use crate::space::DmaMemory;
use crate::sys::socket;

/// A server that is connected.
pub(super) struct Connection {
    name: String,
    pub(super) time: Duration,
    pub(super) stream: Arc<UnixStream>,
    /// Held during an exchange.
    turn: Mutex<()>,
    /// An exchange waits for the listener to let go of `inner`.
    pub(super) wanted: AtomicBool,
    inner: Mutex<Inner>,
    /// Where the server sends its own commands, if it has a socket for them.
    pub(super) twin: OnceLock<Twin>,
    /// Memory is mapped for DMA that the server cannot reach but by messages.
    pub(super) unshared: AtomicBool,
    /// Why nothing can be exchanged any more.
    fault: Mutex<Option<Fault>>,
    memory: Mutex<DmaTable<DmaMemory>>,
}

pub(super) struct Inner {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    next_id: u16,
}

/// A second socket, for the server's commands and the answers to them.
pub(super) struct Twin {
    pub(super) stream: Arc<UnixStream>,
    pub(super) channel: Mutex<(Sender, Receiver)>,
}

/// A command to send: what follows its header, and the descriptors that go with it.
#[derive(Clone, Copy, Default)]
pub(super) struct Request<'a> {
    pub(super) command: u16,
    pub(super) body: [&'a [u8]; 2],
    pub(super) fds: &'a [BorrowedFd<'a>],
    /// How long the reply's body is at least.
    pub(super) reply: usize,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, name: String, time: Duration) -> Result<Self> {
        let (sender, receiver) =
            channel::split(stream, time).map_err(|error| Error::io(&error, "connect to", &name))?;
        Ok(Self {
            name,
            time,
            stream: receiver.stream().clone(),
            turn: Mutex::new(()),
            wanted: AtomicBool::new(false),
            inner: Mutex::new(Inner { sender, receiver, next_id: 0 }),
            twin: OnceLock::new(),
            unshared: AtomicBool::new(false),
            fault: Mutex::new(None),
            memory: Mutex::new(DmaTable::new(0)),
        })
    }

    /// Agrees on a version; what the server can do.
    pub(super) fn negotiate(&self) -> Result<Capabilities> {
        let body = Capabilities::proposal();
        let reply = Version::SIZE;
        let request =
            Request { command: command::VERSION, body: [&body, &[]], reply, ..Request::default() };
        let reply = self.exchange(request, "agree on a version with", &self.name)?;
        let refuse = |reason| {
            Error::new(ErrorKind::Malformed, "agree on a version with", &self.name)
                .with_reason(reason)
        };
        let Message { body, mut fds, .. } = reply;
        let agreed = Capabilities::read(&body).and_then(|capabilities| {
            let (version, _) = Version::decode(&body).unwrap_or_default();
            if version.minor > MINOR {
                let Version { major, minor } = version;
                return Err(format!(
                    "it answered version {major}.{minor}, and {major}.{MINOR} was proposed"
                ));
            }
            let twin = match (capabilities.twin_socket, capabilities.twin_fd) {
                (false, _) => None,
                (true, Some(index)) if index < fds.len() => Some(fds.swap_remove(index)),
                _ => return Err("it has a twin socket, and has not sent it".to_owned()),
            };
            Ok((capabilities, twin))
        });
        channel::discard(fds);
        let (capabilities, twin) = agreed.map_err(refuse)?;
        if let Some(twin) = twin {
            self.add_twin(twin)?;
        }
        *self.memory() = DmaTable::new(capabilities.dma_maps);
        Ok(capabilities)
    }

    fn add_twin(&self, fd: OwnedFd) -> Result<()> {
        if !socket::is_stream(&fd) {
            channel::discard(vec![fd]);
            return Err(Error::new(ErrorKind::Malformed, "agree on a version with", &self.name)
                .with_reason("its twin socket is no stream socket"));
        }
        let channel = channel::split(fd.into(), self.time)
            .map_err(|error| Error::io(&error, "connect to", &self.name))?;
        let stream = channel.1.stream().clone();
        self.twin.get_or_init(|| Twin { stream, channel: Mutex::new(channel) });
        Ok(())
    }

    /// What the server may reach by messages.
    pub(super) fn memory(&self) -> MutexGuard<'_, DmaTable<DmaMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket, from the listener: which may have a message to serve first, and the time for that is
    /// the exchange's.
    fn socket(&self, deadline: Deadline) -> (MutexGuard<'_, Inner>, Deadline) {
        match self.inner.try_lock() {
            Ok(inner) => (inner, deadline),
            Err(TryLockError::Poisoned(poisoned)) => (poisoned.into_inner(), deadline),
            Err(TryLockError::WouldBlock) => {
                self.wanted.store(true, Ordering::Relaxed);
                let inner = self.inner();
                self.wanted.store(false, Ordering::Relaxed);
                (inner, deadline.by_poll())
            }
        }
    }

    /// Sends a command and waits for its reply, serving what the server asks for meanwhile: all within
    /// the connection's time, from the end of the exchange before on. `operation` and `object` are for
    /// the error.
    pub(super) fn exchange(
        &self,
        request: Request<'_>,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Result<Message> {
        let turn = self.turn();
        let (mut inner, mut deadline) = self.socket(Deadline::new(self.time));
        if let Some(fault) = &*self.fault() {
            return Err(Error::new(ErrorKind::Gone, operation, object)
                .with_reason(format!("the connection failed earlier: {fault}"))
                .with_advice("connect again"));
        }
        let reply = self.converse(&mut inner, request, &mut deadline).map_err(|fault| {
            let error = self.error(&fault, operation, &object);
            self.fail(fault);
            error
        })?;
        drop((inner, turn));
        match reply.header.failed() {
            None => Ok(reply),
            Some(0) => Err(Error::new(ErrorKind::Os, operation, object)
                .with_reason("the server rejected it without an error number")),
            Some(errno) => Err(Error::os(Errno::from_raw(errno), operation, object)
                .with_reason("the server rejected it")),
        }
    }

    /// The server has sent a reply that makes no sense: it cannot be believed any more.
    pub(super) fn malformed(
        &self,
        reason: String,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Error {
        let fault = Fault::Malformed(reason);
        let error = self.error(&fault, operation, object);
        self.fail(fault);
        error
    }

    fn converse(
        &self,
        inner: &mut Inner,
        request: Request<'_>,
        deadline: &mut Deadline,
    ) -> std::result::Result<Message, Fault> {
        let id = inner.next_id;
        inner.next_id = id.wrapping_add(1);
        let Request { command, body, fds, reply } = request;
        let header = Header::command(id, command, body[0].len() + body[1].len());
        inner.sender.send(header, body, fds, deadline)?;
        loop {
            let mut message = inner.receiver.receive(deadline)?;
            if message.header.is_command() {
                self.serve(&mut inner.sender, &mut message, deadline)?;
                deadline.check()?;
                continue;
            }
            let Header { id: its, command: for_command, .. } = message.header;
            if !message.header.is_reply() || (its, for_command) != (id, command) {
                return Err(Fault::Malformed(format!(
                    "the server answered {} with id {its}, and {} with id {id} was asked",
                    command::name(for_command),
                    command::name(command)
                )));
            }
            if !matches!(command, command::VERSION | command::DEVICE_GET_REGION_INFO) {
                channel::discard(std::mem::take(&mut message.fds));
            }
            if message.header.failed().is_none() && message.body.len() < reply {
                return Err(Fault::Malformed(format!(
                    "the server answered {} with {} bytes, and {reply} were expected",
                    command::name(command),
                    message.body.len()
                )));
            }
            // Whatever comes of the rest, this was answered.
            if let Err(fault) = self.serve_rest(inner, deadline) {
                self.fail(fault);
            }
            return Ok(message);
        }
    }

    /// Serves the commands that have arrived with a reply: nobody will find them in the socket.
    fn serve_rest(
        &self,
        inner: &mut Inner,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Fault> {
        while let Some(message) = inner.receiver.take()? {
            self.arrived(inner, message, deadline)?;
        }
        Ok(())
    }

    /// Takes a message that no exchange waits for: a command of the server's.
    pub(super) fn arrived(
        &self,
        inner: &mut Inner,
        mut message: Message,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Fault> {
        if message.header.is_command() {
            return self.serve(&mut inner.sender, &mut message, deadline);
        }
        channel::discard(std::mem::take(&mut message.fds));
        Err(unexpected())
    }

    /// Whether it has ended: nothing is sent or received on it any more.
    pub(super) fn has_failed(&self) -> bool {
        self.fault().is_some()
    }

    /// Nothing will be exchanged any more: the socket is shut down, so that the server knows.
    pub(super) fn fail(&self, fault: Fault) {
        log::debug!("{}: {fault}", self.name);
        self.fault().get_or_insert(fault);
        self.shut_down();
    }

    pub(super) fn shut_down(&self) {
        // It fails only where the peer has done so before.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(twin) = self.twin.get() {
            let _ = twin.stream.shutdown(Shutdown::Both);
        }
    }

    fn error(&self, fault: &Fault, operation: &'static str, object: impl fmt::Display) -> Error {
        let kind = match fault {
            Fault::Malformed(_) => ErrorKind::Malformed,
            Fault::Closed { .. } | Fault::Silent(_) => ErrorKind::Gone,
            Fault::Os(errno) => return Error::os(*errno, operation, object),
        };
        Error::new(kind, operation, object).with_reason(fault.to_string())
    }

    /// How logs name the server.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

pub(super) fn unexpected() -> Fault {
    Fault::Malformed("unexpected reply from the server".to_owned())
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.name)
    }
}
