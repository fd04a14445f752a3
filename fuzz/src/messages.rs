//! Inputs that are lists of messages: a command, flags, a length, a body of that many bytes.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, sendmsg, shutdown,
    socketpair,
};

/// What of a message is not as an honest peer would have it, or comes with it.
pub mod flag {
    /// The size that the header claims is that of far more.
    pub const WRONG_SIZE: u8 = 1;
    /// The id is not the one that is awaited.
    pub const WRONG_ID: u8 = 2;
    /// A command of a server, or a reply of a client.
    pub const WRONG_TYPE: u8 = 4;
    /// Of a reply: an error. Of a command: one that wants no reply.
    pub const SPECIAL: u8 = 8;
    /// It comes with memory.
    pub const WITH_MEMORY: u8 = 16;
    /// It comes with less memory, or with an eventfd.
    pub const WITH_OTHER: u8 = 32;
    /// It is cut in two.
    pub const CUT: u8 = 64;
    /// The target's own.
    pub const CHOICE: u8 = 128;
}

/// A message of an input.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The command, low byte; there are no others.
    pub command: u8,
    /// Of [`flag`].
    pub flags: u8,
    /// What follows the header.
    pub body: &'a [u8],
}

impl Message<'_> {
    /// Whether it has a flag.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The message on the wire; `kind` and `error` are the header's flags and errno.
    pub fn encode(&self, id: u16, kind: u32, error: u32) -> Vec<u8> {
        let id = id.wrapping_add(self.has(flag::WRONG_ID).into());
        let len = self.body.len() as u32;
        let size = if self.has(flag::WRONG_SIZE) { len << 16 } else { 16 + len };
        let mut bytes = Vec::with_capacity(16 + self.body.len());
        bytes.extend(id.to_ne_bytes());
        bytes.extend(u16::from(self.command).to_ne_bytes());
        for field in [size, kind, error] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(self.body);
        bytes
    }
}

/// The messages of an input. A last one that is cut short is as long as it is.
pub fn decode(mut input: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let [command, flags, len, rest @ ..] = input else { return None };
        let body;
        (body, input) = rest.split_at((*len as usize).min(rest.len()));
        Some(Message { command: *command, flags: *flags, body })
    })
}

/// Appends a message to an input; of a body that is too long, what fits.
pub fn append(input: &mut Vec<u8>, message: Message<'_>) {
    let body = &message.body[..message.body.len().min(255)];
    input.extend([message.command, message.flags, body.len() as u8]);
    input.extend(body);
}

/// A socket, in which all that a peer will say waits already, each message to be read by itself: so no
/// second thread is needed, and the one who reads does not see an answer before it has asked.
pub struct Said(OwnedFd);

impl Said {
    /// A pair of sockets: what is said on one, and the other to read it from.
    pub fn pair() -> (Self, UnixStream) {
        let kind = SockType::SeqPacket;
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.expect("a socket pair");
        (Self(ours), theirs.into())
    }

    /// Says what the socket has room for.
    pub fn say(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    }

    /// Says a message, in two parts if it is to be cut.
    pub fn say_message(&self, message: Message<'_>, bytes: &[u8], fds: &[RawFd]) {
        let middle = if message.has(flag::CUT) { bytes.len() / 2 } else { bytes.len() };
        let (first, second) = bytes.split_at(middle);
        self.say(first, fds);
        if !second.is_empty() {
            self.say(second, &[]);
        }
    }

    /// Says no more.
    pub fn ends(&self) {
        shutdown(self.0.as_raw_fd(), Shutdown::Write).expect("a shutdown");
    }
}
