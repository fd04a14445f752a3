//! The server's socket, shared by the thread that serves commands and a model that asks its client for
//! memory.
//!
//! A thread that waits for a message reads the socket if no other thread does, and hands on messages for others. So
//! no extra thread is between a command and its reply.
//!
//! A client may use a second socket for the server's commands (`twin_socket`). It has a `Wire` of its own, which
//! receives only replies. If one of the two fails, the other is closed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use crate::sys::stream::Stream;
use crate::transport::vfio_user::protocol::channel::{
    self, Deadline, Fault, Message, Receiver, Sender,
};
use crate::transport::vfio_user::protocol::version::MAX_TRANSFER;
use crate::transport::vfio_user::protocol::wire::{DmaAccess, Header, command};

/// How many commands a client may send ahead while a model waits for its memory.
const MAX_AHEAD: usize = 1024;
/// How many bytes they may have.
const MAX_AHEAD_BYTES: usize = 16 << 20;
/// How many file descriptors.
const MAX_AHEAD_FDS: usize = 128;

pub(in crate::emulated) struct Wire {
    time: Duration,
    stream: Arc<Stream>,
    /// For a second socket, the first one, which receives the client's commands.
    first: Option<Arc<Wire>>,
    sender: Mutex<Sender>,
    inbox: Mutex<Inbox>,
    /// Notified when a message was handed on, or no thread reads.
    changed: Condvar,
}

struct Inbox {
    /// Taken by the thread that reads.
    receiver: Option<Receiver>,
    commands: VecDeque<Message>,
    bytes: usize,
    fds: usize,
    /// The ids of replies that threads wait for, and the replies.
    awaited: HashSet<u16>,
    replies: HashMap<u16, Message>,
    /// Messages that the client must not send. Their descriptors are closed later.
    strays: Vec<Message>,
    next_id: u16,
    /// How many threads wait for another one to read.
    waiting: usize,
    /// How much data the client takes in one message.
    transfer: usize,
    fault: Option<Fault>,
}

/// What a thread waits for.
enum Wanted<'a> {
    /// Until a deadline, or without one.
    Command(Option<&'a mut Deadline>),
    Reply(u16, &'a mut Deadline),
}

impl Wire {
    pub(super) fn new(stream: UnixStream, time: Duration) -> std::io::Result<Self> {
        Self::with_first(stream, time, None)
    }

    /// A second socket for the server's commands, and the client's end of it.
    pub(super) fn twin(self: &Arc<Self>) -> std::io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self::with_first(ours, self.time, Some(self.clone()))?, theirs))
    }

    fn with_first(
        stream: UnixStream,
        time: Duration,
        first: Option<Arc<Self>>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = channel::split(stream, time)?;
        // A client may be idle. Waits that have a deadline use poll.
        receiver.stream().set_read_timeout(None)?;
        Ok(Self {
            time,
            stream: receiver.stream().clone(),
            first,
            sender: Mutex::new(sender),
            inbox: Mutex::new(Inbox {
                receiver: Some(receiver),
                commands: VecDeque::new(),
                bytes: 0,
                fds: 0,
                awaited: HashSet::new(),
                replies: HashMap::new(),
                strays: Vec::new(),
                next_id: 0,
                waiting: 0,
                transfer: MAX_TRANSFER,
                fault: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// Sets how much data the client takes in one message.
    pub(super) fn limit_transfer(&self, transfer: usize) {
        self.inbox().transfer = transfer;
    }

    /// The socket, to check whether the client is connected.
    pub(super) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Ends the connection. Threads that wait for it are woken.
    pub(super) fn close(&self) {
        self.fail(&mut self.inbox(), Fault::Closed { cut_short: false });
    }

    /// Takes the descriptors that were received and not used.
    pub(super) fn take_fds(&self) -> Vec<OwnedFd> {
        let mut inbox = self.inbox();
        let mut fds = inbox.receiver.as_mut().map(Receiver::take_fds).unwrap_or_default();
        let commands = std::mem::take(&mut inbox.commands);
        let strays = std::mem::take(&mut inbox.strays);
        fds.extend(commands.into_iter().chain(strays).flat_map(|mut message| message.fds.take()));
        fds
    }

    /// The client's first command, within the time limit.
    pub(super) fn first_command(&self) -> Result<Message, Fault> {
        self.wait(&mut Wanted::Command(Some(&mut self.deadline())))
    }

    /// The client's next command, without a time limit.
    pub(super) fn command(&self) -> Result<Message, Fault> {
        self.wait(&mut Wanted::Command(None))
    }

    /// The deadline for an exchange that begins now.
    pub(in crate::emulated) fn deadline(&self) -> Deadline {
        Deadline::new(self.time).by_poll()
    }

    pub(super) fn send(
        &self,
        header: Header,
        parts: [&[u8]; 2],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Fault> {
        self.send_by(header, parts, fds, &mut self.deadline())
    }

    fn send_by(
        &self,
        header: Header,
        parts: [&[u8]; 2],
        fds: &[BorrowedFd<'_>],
        deadline: &mut Deadline,
    ) -> Result<(), Fault> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(header, parts, fds, deadline)
    }

    /// Reads the client's memory by messages. One deadline holds for all of them.
    pub(in crate::emulated) fn dma_read(
        &self,
        address: u64,
        data: &mut [u8],
        deadline: &mut Deadline,
    ) -> Result<(), Errno> {
        let transfer = self.inbox().transfer;
        let mut address = address;
        for part in data.chunks_mut(transfer) {
            let access = DmaAccess { address, count: part.len() as u64 };
            let body = self.ask(command::DMA_READ, access, &[], deadline)?;
            part.copy_from_slice(body.get(DmaAccess::SIZE..).ok_or(Errno::EIO)?);
            // It wraps only after the last part.
            address = address.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes the client's memory by messages, as [`dma_read`](Self::dma_read) reads.
    pub(in crate::emulated) fn dma_write(
        &self,
        address: u64,
        data: &[u8],
        deadline: &mut Deadline,
    ) -> Result<(), Errno> {
        let transfer = self.inbox().transfer;
        let mut address = address;
        for part in data.chunks(transfer) {
            let access = DmaAccess { address, count: part.len() as u64 };
            self.ask(command::DMA_WRITE, access, part, deadline)?;
            // It wraps only after the last part.
            address = address.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Sends a command to the client. Returns the body of the reply, which belongs to the command.
    fn ask(
        &self,
        command: u16,
        access: DmaAccess,
        data: &[u8],
        deadline: &mut Deadline,
    ) -> Result<Vec<u8>, Errno> {
        let id = {
            let mut inbox = self.inbox();
            let id = inbox.next_id;
            inbox.next_id = id.wrapping_add(1);
            inbox.awaited.insert(id);
            id
        };
        let fields = access.encode();
        let header = Header::command(id, command, fields.len() + data.len());
        let reply = self
            .send_by(header, [&fields, data], &[], deadline)
            .and_then(|()| self.wait(&mut Wanted::Reply(id, deadline)));
        let reply = match reply {
            Ok(reply) => reply,
            Err(fault) => {
                self.fail(&mut self.inbox(), fault);
                return Err(Errno::EIO);
            }
        };
        if let Some(errno) = reply.header.failed() {
            return Err(Errno::from_raw(errno));
        }
        let read = if command == command::DMA_READ { access.count as usize } else { 0 };
        let whole = match DmaAccess::decode(&reply.body) {
            Some((echo, data)) => echo == access && data.len() == read,
            // In an older form of the protocol, the reply to a write has a count of 32 bits.
            None => read == 0,
        };
        if reply.header.command == command && whole { Ok(reply.body) } else { Err(Errno::EIO) }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, wanted: &mut Wanted<'_>) -> Result<Message, Fault> {
        let mut inbox = self.inbox();
        loop {
            if let Some(message) = inbox.take(wanted) {
                return Ok(message);
            }
            if let Some(fault) = &inbox.fault {
                return Err(fault.clone());
            }
            if let Some(mut receiver) = inbox.receiver.take() {
                drop(inbox);
                let received = match wanted {
                    Wanted::Command(None) => receiver.receive_idle(self.time),
                    Wanted::Command(Some(deadline)) | Wanted::Reply(_, deadline) => {
                        receiver.receive(deadline)
                    }
                };
                inbox = self.inbox();
                inbox.receiver = Some(receiver);
                let is_second = self.first.is_some();
                if let Err(fault) = received.and_then(|message| inbox.hand_on(message, is_second)) {
                    self.fail(&mut inbox, fault);
                }
                if inbox.waiting > 0 {
                    self.changed.notify_all();
                }
                continue;
            }
            inbox.waiting += 1;
            inbox = match wanted {
                Wanted::Command(None) => {
                    self.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner)
                }
                Wanted::Command(Some(deadline)) | Wanted::Reply(_, deadline) => {
                    if let Err(fault) = deadline.check() {
                        inbox.waiting -= 1;
                        return Err(fault);
                    }
                    let waited = self.changed.wait_timeout(inbox, deadline.left());
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            inbox.waiting -= 1;
        }
    }

    /// Nothing will be sent or received any more. Threads that wait for the socket are woken.
    fn fail(&self, inbox: &mut Inbox, fault: Fault) {
        if let Some(first) = &self.first {
            first.fail(&mut first.inbox(), fault.clone());
        }
        inbox.fault.get_or_insert(fault);
        // It fails only if the peer has done so before.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }
}

impl Inbox {
    fn take(&mut self, wanted: &Wanted<'_>) -> Option<Message> {
        match wanted {
            Wanted::Command(_) => {
                let message = self.commands.pop_front()?;
                self.bytes -= message.body.len();
                self.fds -= message.fds.len();
                Some(message)
            }
            Wanted::Reply(id, _) => self.replies.remove(id),
        }
    }

    fn hand_on(&mut self, message: Message, is_second: bool) -> Result<(), Fault> {
        let Header { id, .. } = message.header;
        let is_reply = message.header.is_reply() && self.awaited.remove(&id);
        let malformed = match message.header.is_command() {
            true if is_second => "the client sent a command by the server's socket".to_owned(),
            true => return self.queue(message),
            false if !is_reply => format!("unexpected reply id {id} from the client"),
            false if !message.fds.is_empty() => {
                "the client sent descriptors with a reply, which takes none".to_owned()
            }
            false => {
                self.replies.insert(id, message);
                return Ok(());
            }
        };
        self.strays.push(message);
        Err(Fault::Malformed(malformed))
    }

    fn queue(&mut self, command: Message) -> Result<(), Fault> {
        self.bytes += command.body.len();
        self.fds += command.fds.len();
        self.commands.push_back(command);
        if self.commands.len() > MAX_AHEAD
            || self.bytes > MAX_AHEAD_BYTES
            || self.fds > MAX_AHEAD_FDS
        {
            return Err(Fault::Malformed("the client sends too many commands ahead".to_owned()));
        }
        Ok(())
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}
