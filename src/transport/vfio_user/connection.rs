//! Exchanges with a server: one at a time, each within its time limit, and none after a failure.
//!
//! An answer that does not come in time is late. Nothing else is sent until it has come, so that it cannot be
//! taken for another.

use std::fmt;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use nix::errno::Errno;

use super::limits::TimeLimits;
use super::protocol::channel::{self, Deadline, Fault, Message, Receiver, Sender};
use super::protocol::dma::DmaTable;
use super::protocol::version::Capabilities;
use super::protocol::wire::{DmaUnmap, Header, MINOR, Version, command};
use crate::error::{Error, ErrorKind, Result};
use crate::space::DmaMemory;
use crate::sys::socket;
use crate::sys::stream::Stream;

/// A server that is connected.
pub(super) struct Connection {
    name: String,
    pub(super) limits: TimeLimits,
    pub(super) stream: Arc<Stream>,
    /// Held during an exchange.
    turn: Mutex<()>,
    /// An exchange waits for the listener to let go of `inner`.
    pub(super) wanted: AtomicBool,
    inner: Mutex<Inner>,
    /// Where the server sends its own commands, if it has a socket for them.
    pub(super) twin: OnceLock<Twin>,
    /// Memory is mapped for DMA that the server reaches only by messages.
    pub(super) unshared: AtomicBool,
    /// Why the connection has ended.
    fault: Mutex<Option<Fault>>,
    memory: Mutex<DmaTable<DmaMemory>>,
    /// Memory that the server reaches no more. Dropping it may end other mappings, by exchanges.
    freed: Mutex<Vec<DmaMemory>>,
}

pub(super) struct Inner {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    next_id: u16,
    /// The command that the server has not answered in time.
    late: Option<Late>,
    /// Mappings that the server has made too late. They are undone.
    unwanted: Vec<(u64, u64)>,
}

/// A second socket, for the server's commands and the answers to them.
pub(super) struct Twin {
    pub(super) stream: Arc<Stream>,
    pub(super) channel: Mutex<(Sender, Receiver)>,
}

/// An answer that has not come in time.
#[derive(Clone, Copy)]
struct Late {
    id: u16,
    command: u16,
    mapping: Option<(u64, u64)>,
}

/// A command to send: what follows its header, and the descriptors that go with it.
#[derive(Clone, Copy, Default)]
pub(super) struct Request<'a> {
    pub(super) command: u16,
    pub(super) body: [&'a [u8]; 2],
    pub(super) fds: &'a [BorrowedFd<'a>],
    /// The least size of the reply's body.
    pub(super) reply: usize,
    /// Address and size of the mapping for DMA that it is about.
    pub(super) mapping: Option<(u64, u64)>,
}

/// Why there is no answer.
enum Failure {
    /// The connection has ended before.
    Ended(Fault),
    /// The answer to an earlier command is late.
    Waiting(u16),
    /// The answer has not come in this time. It may yet.
    Late(Duration),
    /// The connection has ended now.
    Fault(Fault),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Connection {
    pub(super) fn new(stream: UnixStream, name: String, limits: TimeLimits) -> Result<Self> {
        let (sender, receiver) = channel::split(stream, limits.answer)
            .map_err(|error| Error::io(&error, "connect to", &name))?;
        let (late, unwanted) = (None, Vec::new());
        Ok(Self {
            name,
            limits,
            stream: receiver.stream().clone(),
            turn: Mutex::new(()),
            wanted: AtomicBool::new(false),
            inner: Mutex::new(Inner { sender, receiver, next_id: 0, late, unwanted }),
            twin: OnceLock::new(),
            unshared: AtomicBool::new(false),
            fault: Mutex::new(None),
            memory: Mutex::new(DmaTable::new(0)),
            freed: Mutex::default(),
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
        drop(fds);
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
        let channel = channel::split(fd.into(), self.limits.answer)
            .map_err(|error| Error::io(&error, "connect to", &self.name))?;
        let stream = channel.1.stream().clone();
        self.twin.get_or_init(|| Twin { stream, channel: Mutex::new(channel) });
        Ok(())
    }

    /// What the server may reach by messages.
    pub(super) fn memory(&self) -> MutexGuard<'_, DmaTable<DmaMemory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes memory out of reach of the server. It is dropped by [`drop_freed`](Self::drop_freed).
    fn free(&self, address: u64, size: u64) {
        // It was inserted before the server was asked to map it.
        if let Ok(memory) = self.memory().remove_if(address, size, |_| true) {
            self.freed().push(memory);
        }
    }

    /// Frees the memory of mappings that the server has not answered for. The connection has ended: it may hold the
    /// last of what holds the connection.
    pub(super) fn free_late(&self) {
        let mut inner = self.inner();
        let late = inner.late.take().and_then(|late| late.mapping);
        let unwanted = std::mem::take(&mut inner.unwanted);
        drop(inner);
        late.into_iter().chain(unwanted).for_each(|(address, size)| self.free(address, size));
        self.drop_freed();
    }

    fn freed(&self) -> MutexGuard<'_, Vec<DmaMemory>> {
        self.freed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops memory that was taken out of reach. The caller holds no lock.
    pub(super) fn drop_freed(&self) {
        let freed = std::mem::take(&mut *self.freed());
        drop(freed);
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

    /// Takes the socket from the listener. It may serve a message first, within the exchange's deadline.
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

    /// Sends a command and waits for its reply, and serves the server's commands meanwhile. All of it is within
    /// the command's time limit, which begins when the previous exchange ends. `operation` and `object` are for
    /// the error; an error that the server reports is one.
    pub(super) fn exchange(
        &self,
        request: Request<'_>,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Result<Message> {
        let reply = self.ask(request, operation, &object)?;
        match reply.header.failed() {
            None => Ok(reply),
            Some(0) => Err(Error::new(ErrorKind::Os, operation, object)
                .with_reason("the server rejected it without an error number")),
            Some(errno) => Err(Error::os(Errno::from_raw(errno), operation, object)
                .with_reason("the server rejected it")),
        }
    }

    /// The same, but a reply that reports an error is `Ok`.
    fn ask(
        &self,
        request: Request<'_>,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Result<Message> {
        let turn = self.turn();
        let time = self.limits.of(request.command);
        let deadline = Deadline::new(time);
        // The socket's own timeout is the limit of most answers.
        let deadline = if time == self.limits.answer { deadline } else { deadline.by_poll() };
        let (mut inner, mut deadline) = self.socket(deadline);
        let result = self.in_turn(&mut inner, request, &mut deadline);
        let made = match &result {
            Ok(reply) => reply.header.failed().is_none(),
            // The server may still make the mapping, and use it at once.
            Err(Failure::Late(_)) => true,
            Err(_) => false,
        };
        if let (command::DMA_MAP, false, Some((address, size))) =
            (request.command, made, request.mapping)
        {
            self.free(address, size);
        }
        let result = result.map_err(|failure| self.failed(failure, operation, object));
        drop((inner, turn));
        self.drop_freed();
        result
    }

    fn failed(
        &self,
        failure: Failure,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Error {
        const LATER: &str = "try again once it has answered, or allow it more time: TimeLimits";
        let (kind, reason, remedy) = match failure {
            Failure::Ended(fault) => {
                let reason = format!("the connection failed earlier: {fault}");
                (ErrorKind::Gone, reason, "connect again")
            }
            Failure::Waiting(command) => {
                let command = command::name(command);
                let reason = format!("the server has not answered {command} yet");
                (ErrorKind::TimedOut, reason, LATER)
            }
            Failure::Late(time) => (ErrorKind::TimedOut, Fault::Silent(time).to_string(), LATER),
            Failure::Fault(fault) => {
                let error = self.error(&fault, operation, object);
                self.fail(fault);
                return error;
            }
        };
        Error::new(kind, operation, object).with_reason(reason).with_advice(remedy)
    }

    /// The server has sent a malformed reply: the connection ends.
    pub(super) fn malformed(
        &self,
        reason: String,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Error {
        self.failed(Failure::Fault(Fault::Malformed(reason)), operation, object)
    }

    fn in_turn(
        &self,
        inner: &mut Inner,
        request: Request<'_>,
        deadline: &mut Deadline,
    ) -> std::result::Result<Message, Failure> {
        if let Some(fault) = &*self.fault() {
            return Err(Failure::Ended(fault.clone()));
        }
        self.catch_up(inner, deadline)?;
        self.converse(inner, request, deadline)
    }

    /// Takes the late answer, if it has come, and undoes the mapping that it confirms.
    fn catch_up(
        &self,
        inner: &mut Inner,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Failure> {
        while let Some(late) = inner.late {
            let Some(message) = inner.receiver.receive_now()? else {
                return Err(Failure::Waiting(late.command));
            };
            self.arrived(inner, message, deadline)?;
            // A server that sends commands without pause gains no time.
            if deadline.check().is_err() {
                return Err(Failure::Waiting(late.command));
            }
        }
        while let Some((address, size)) = inner.unwanted.pop() {
            let argsz = DmaUnmap::SIZE as u32;
            let unmap = DmaUnmap { argsz, flags: 0, address, size }.encode();
            let request = Request {
                command: command::DMA_UNMAP,
                body: [&unmap, &[]],
                mapping: Some((address, size)),
                ..Request::default()
            };
            let mut deadline = Deadline::new(self.limits.unmap).by_poll();
            let reply = self.converse(inner, request, &mut deadline)?;
            self.unmapped(&reply, request.mapping);
        }
        Ok(())
    }

    /// Forgets a mapping if the server has unmapped it. Otherwise the server may still ask for it.
    fn unmapped(&self, reply: &Message, mapping: Option<(u64, u64)>) {
        if let (None, Some((address, size))) = (reply.header.failed(), mapping) {
            self.free(address, size);
        }
    }

    fn converse(
        &self,
        inner: &mut Inner,
        request: Request<'_>,
        deadline: &mut Deadline,
    ) -> std::result::Result<Message, Failure> {
        let id = inner.next_id;
        inner.next_id = id.wrapping_add(1);
        let Request { command, body, fds, reply, mapping } = request;
        let header = Header::command(id, command, body[0].len() + body[1].len());
        inner.sender.send(header, body, fds, deadline)?;
        let mut served = false;
        loop {
            // Messages that had arrived before were not waited for.
            let in_time = if served { deadline.check() } else { Ok(()) };
            let mut message = match in_time.and_then(|()| inner.receiver.receive(deadline)) {
                Err(Fault::Silent(time)) => {
                    inner.late = Some(Late { id, command, mapping });
                    return Err(Failure::Late(time));
                }
                received => received?,
            };
            if message.header.is_command() {
                self.serve(&mut inner.sender, &mut message, deadline)?;
                served = true;
                continue;
            }
            let Header { id: its, command: for_command, .. } = message.header;
            if !message.header.is_reply() || (its, for_command) != (id, command) {
                return Err(Failure::Fault(Fault::Malformed(format!(
                    "the server answered {} with id {its}, and {} with id {id} was asked",
                    command::name(for_command),
                    command::name(command)
                ))));
            }
            if !matches!(command, command::VERSION | command::DEVICE_GET_REGION_INFO) {
                without_fds(&message)?;
            }
            if message.header.failed().is_none() && message.body.len() < reply {
                return Err(Failure::Fault(Fault::Malformed(format!(
                    "the server answered {} with {} bytes, and {reply} were expected",
                    command::name(command),
                    message.body.len()
                ))));
            }
            // A failure in what follows does not change this answer.
            if let Err(fault) = self.serve_rest(inner, deadline) {
                self.fail(fault);
            }
            return Ok(message);
        }
    }

    /// Serves the commands that have arrived with a reply: they are not in the socket any more.
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

    /// Takes a message that no exchange waits for: a command of the server's, or the late answer.
    pub(super) fn arrived(
        &self,
        inner: &mut Inner,
        mut message: Message,
        deadline: &mut Deadline,
    ) -> std::result::Result<(), Fault> {
        if message.header.is_command() {
            return self.serve(&mut inner.sender, &mut message, deadline);
        }
        without_fds(&message)?;
        let Header { id, command, .. } = message.header;
        let late = inner.late.filter(|late| (late.id, late.command) == (id, command));
        let Some(late) = late.filter(|_| message.header.is_reply()) else {
            return Err(unexpected());
        };
        inner.late = None;
        let failed = message.header.failed().is_some();
        log::debug!("{}: {} was answered late", self.name, command::name(command));
        match (command, late.mapping) {
            (command::DMA_UNMAP, mapping) => self.unmapped(&message, mapping),
            (command::DMA_MAP, Some((address, size))) if failed => self.free(address, size),
            (command::DMA_MAP, mapping) => inner.unwanted.extend(mapping),
            _ => {}
        }
        Ok(())
    }

    /// Whether it has ended: nothing is sent or received on it any more.
    pub(super) fn has_failed(&self) -> bool {
        self.fault().is_some()
    }

    /// Whether it has ended, or the server has closed its end.
    pub(super) fn has_ended(&self) -> bool {
        self.has_failed() || self.stream.is_hung_up()
    }

    /// Ends the connection, and shuts the socket down, so that the server notices.
    pub(super) fn fail(&self, fault: Fault) {
        log::debug!("{}: {fault}", self.name);
        self.fault().get_or_insert(fault);
        self.shut_down();
    }

    pub(super) fn shut_down(&self) {
        // It fails only if the peer has shut it down before.
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

/// `Malformed` if a message that takes no descriptors has some: a server that sends more and
/// more of them would fill this process.
pub(super) fn without_fds(message: &Message) -> std::result::Result<(), Fault> {
    if message.fds.is_empty() {
        return Ok(());
    }
    Err(Fault::Malformed(format!(
        "the server sent descriptors with {}, which takes none",
        command::name(message.header.command)
    )))
}

pub(super) fn unexpected() -> Fault {
    Fault::Malformed("unexpected reply from the server".to_owned())
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.name)
    }
}
