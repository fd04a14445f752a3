//! A vfio-user server that answers as it is told: honestly, but for what a test makes of the replies.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

pub const VERSION: u16 = 1;
pub const INFO: u16 = 4;
pub const REGION: u16 = 5;
pub const IRQ: u16 = 7;
pub const READ: u16 = 9;
pub const WRITE: u16 = 10;
/// Whatever the command is.
pub const EVERY: u16 = u16::MAX;

/// A reply to be sent: the whole of it, header included.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// Nothing is sent, and the connection stays open.
    pub silent: bool,
}

impl Reply {
    pub fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    pub fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    /// Another body, and the size that goes with it.
    pub fn set_body(&mut self, body: &[u8]) {
        self.bytes.truncate(16);
        self.bytes.extend(body);
        self.set_u32(4, self.bytes.len() as u32);
    }
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// What a server of one region of 16 KiB, mappable whole, and one interrupt would answer.
fn honest(command: u16, request: &[u8]) -> Vec<u8> {
    match command {
        VERSION => [&[0, 0, 1, 0][..], b"{\"capabilities\":{\"max_msg_fds\":8}}\0"].concat(),
        INFO => [16u32, 1, 1, 1].iter().flat_map(|word| word.to_ne_bytes()).collect(),
        REGION => words(&[32 | 7 << 32, 0, 0x4000, 0]),
        IRQ => [16u32, 1, 0, 4].iter().flat_map(|word| word.to_ne_bytes()).collect(),
        READ => [&request[..16], &vec![7; request[12] as usize]].concat(),
        WRITE => request[..16].to_vec(),
        3 => request[..24].to_vec(),
        _ => Vec::new(),
    }
}

pub fn memory(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("vfio-remap-hostile", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file.into()
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> nix::Result<usize> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
}

/// Answers as an honest server does, but for what `spoil` makes of the replies to `command`. How often
/// the client has answered a command of the server's own.
pub fn serve(stream: UnixStream, command: u16, spoil: impl Fn(&mut Reply)) -> u32 {
    serve_among(stream, &Mutex::new(()), command, spoil)
}

/// The same beside others who send: whoever does holds the lock, so that messages stay whole.
pub fn serve_among(
    mut stream: UnixStream,
    lock: &Mutex<()>,
    command: u16,
    spoil: impl Fn(&mut Reply),
) -> u32 {
    let (mut header, mut answers) = ([0; 16], 0);
    while stream.read_exact(&mut header).is_ok() {
        let field = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
        let mut request = vec![0; size - 16];
        stream.read_exact(&mut request).unwrap();
        if header[8] & 1 == 1 {
            answers += 1;
            continue;
        }
        let mut reply = Reply { bytes: header.to_vec(), fds: Vec::new(), silent: false };
        reply.set_u32(8, 1);
        reply.set_body(&honest(field(2), &request));
        if field(2) == REGION {
            reply.fds.push(memory(0x4000));
        }
        if [field(2), EVERY].contains(&command) {
            spoil(&mut reply);
        }
        if reply.silent {
            continue;
        }
        let _whole = lock.lock().unwrap();
        if reply.bytes.is_empty() || send(&stream, &reply.bytes, &reply.fds).is_err() {
            break;
        }
    }
    answers
}
