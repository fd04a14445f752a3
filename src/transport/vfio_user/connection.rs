//! Exchanges with a server: one at a time, each within its time, and none after one that went wrong.
//!
//! A thread that listens serves what the server asks for while nobody exchanges anything. It lets go of
//! the socket after each message, and an exchange goes first: a server that sends without pause delays
//! an exchange by one message.

use std::fmt;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::protocol::channel::{self, Deadline, Fault, Message, Receiver, Sender};
use super::protocol::dma::{self, DmaTable, Rights};
use super::protocol::version::{Capabilities, MAX_TRANSFER};
use super::protocol::wire::{DmaAccess, Header, command};
use crate::error::{Error, ErrorKind, Result};
use crate::space::DmaMemory;

/// A server that is connected.
pub(super) struct Connection {
    name: String,
    time: Duration,
    stream: Arc<UnixStream>,
    /// Held during an exchange.
    turn: Mutex<()>,
    /// An exchange waits for the listener to let go of `inner`.
    wanted: AtomicBool,
    inner: Mutex<Inner>,
    /// Why nothing can be exchanged any more.
    fault: Mutex<Option<Fault>>,
    memory: Mutex<DmaTable<DmaMemory>>,
}

struct Inner {
    sender: Sender,
    receiver: Receiver,
    next_id: u16,
}

/// A command to send: what follows its header, and the descriptors that go with it.
#[derive(Clone, Copy)]
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
            fault: Mutex::new(None),
            memory: Mutex::new(DmaTable::new(0)),
        })
    }

    /// Agrees on a version; what the server can do.
    pub(super) fn negotiate(&self) -> Result<Capabilities> {
        let body = Capabilities::ours();
        let request = Request { command: command::VERSION, body: [&body, &[]], fds: &[], reply: 4 };
        let reply = self.exchange(request, "agree on a version with", &self.name)?;
        let capabilities = Capabilities::read(&reply.body).map_err(|reason| {
            Error::new(ErrorKind::Malformed, "agree on a version with", &self.name)
                .with_reason(reason)
        })?;
        *self.memory() = DmaTable::new(capabilities.dma_maps);
        Ok(capabilities)
    }

    /// What the server may reach by messages.
    pub(super) fn memory(&self) -> MutexGuard<'_, DmaTable<DmaMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
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
            if command != command::DEVICE_GET_REGION_INFO {
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
        while let Some(mut message) = inner.receiver.take()? {
            if !message.header.is_command() {
                return Err(unasked());
            }
            self.serve(&mut inner.sender, &mut message, deadline)?;
        }
        Ok(())
    }

    /// Whether it has ended: nothing is sent or received on it any more.
    pub(super) fn has_failed(&self) -> bool {
        self.fault().is_some()
    }

    /// Nothing will be exchanged any more: the socket is shut down, so that the server knows.
    fn fail(&self, fault: Fault) {
        log::debug!("{}: {fault}", self.name);
        self.fault().get_or_insert(fault);
        self.shut_down();
    }

    pub(super) fn shut_down(&self) {
        // It fails only where the peer has done so before.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn error(&self, fault: &Fault, operation: &'static str, object: impl fmt::Display) -> Error {
        let kind = match fault {
            Fault::Malformed(_) => ErrorKind::Malformed,
            Fault::Closed { .. } | Fault::Silent(_) => ErrorKind::Gone,
            Fault::Os(errno) => return Error::os(*errno, operation, object),
        };
        Error::new(kind, operation, object).with_reason(fault.to_string())
    }

    /// Answers the server's own command.
    fn serve(
        &self,
        sender: &mut Sender,
        message: &mut Message,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Fault> {
        let Message { header, body, fds } = message;
        if !fds.is_empty() {
            channel::discard(std::mem::take(fds));
            return Err(Fault::Malformed(format!(
                "the server sent descriptors with {}, which takes none",
                command::name(header.command)
            )));
        }
        let answer = match header.command {
            command::DMA_READ => self.read_memory(body),
            command::DMA_WRITE => self.write_memory(body),
            _ => Err(Errno::EOPNOTSUPP),
        };
        if !header.wants_reply() {
            return Ok(());
        }
        match answer {
            Ok((access, data)) => {
                let access = access.encode();
                let reply = header.reply(access.len() + data.len());
                sender.send(reply, [&access, &data], &[], deadline)
            }
            Err(errno) => sender.send(header.failure(errno), [&[], &[]], &[], deadline),
        }
    }

    fn read_memory(&self, body: &[u8]) -> std::result::Result<(DmaAccess, Vec<u8>), Errno> {
        let (access, _) = DmaAccess::decode(body).ok_or(Errno::EINVAL)?;
        let count = usize::try_from(access.count).map_err(|_| Errno::E2BIG)?;
        if count > MAX_TRANSFER {
            return Err(Errno::E2BIG);
        }
        // Held while copying: what is unmapped is not reached afterwards.
        let memory = self.memory();
        let mut data = vec![0; count];
        for piece in memory.find(access.address, count, Rights::READ)? {
            dma::read(&piece.target, piece.offset, &mut data[piece.range])?;
        }
        Ok((access, data))
    }

    fn write_memory(&self, body: &[u8]) -> std::result::Result<(DmaAccess, Vec<u8>), Errno> {
        let (access, data) = DmaAccess::decode(body).ok_or(Errno::EINVAL)?;
        if access.count != data.len() as u64 {
            return Err(Errno::EINVAL);
        }
        let memory = self.memory();
        for piece in memory.find(access.address, data.len(), Rights::WRITE)? {
            dma::write(&piece.target, piece.offset, &data[piece.range])?;
        }
        Ok((access, Vec::new()))
    }

    /// Serves what the server asks for of itself, until the connection ends.
    pub(super) fn listen(&self) {
        loop {
            let mut socket = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut socket, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return log::error!("{}: {errno}", self.name),
            }
            loop {
                if self.wanted.load(Ordering::Relaxed) {
                    // Until that exchange is over; it serves what comes meanwhile.
                    drop(self.turn());
                }
                match self.serve_next() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(fault) => self.fail(fault),
                }
                if self.has_failed() {
                    return;
                }
            }
        }
    }

    /// Serves one command, if one has arrived.
    fn serve_next(&self) -> std::result::Result<bool, Fault> {
        let mut inner = self.inner();
        match inner.receiver.receive_now()? {
            None => Ok(false),
            Some(mut message) if message.header.is_command() => {
                let mut deadline = Deadline::new(self.time).by_poll();
                self.serve(&mut inner.sender, &mut message, &mut deadline)?;
                Ok(true)
            }
            Some(_) => Err(unasked()),
        }
    }
}

fn unasked() -> Fault {
    Fault::Malformed("unexpected reply from the server".to_owned())
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.name)
    }
}
