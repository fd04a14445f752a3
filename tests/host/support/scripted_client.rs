//! A vfio-user client that sends what it is told to, and reads what comes.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vfio_remap::Result;
use vfio_remap::emulated::{Edu, Emulated, Server};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const REGION_WRITE_MULTI: u16 = 15;

/// Far more than anything here takes.
pub const AMPLE: Duration = Duration::from_secs(60);

/// A message that came.
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub is_reply: bool,
    /// What the reply says went wrong.
    pub error: Option<i32>,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.body[at..at + 4].try_into().unwrap())
    }
}

pub struct Client {
    pub stream: UnixStream,
    next_id: u16,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(AMPLE)).unwrap();
        Self { stream, next_id: 0x100 }
    }

    pub fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    pub fn send(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.next_id += 1;
        self.send_message(self.next_id, command, 0, body, fds);
        self.next_id
    }

    pub fn send_message(
        &mut self,
        id: u16,
        command: u16,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) {
        let mut bytes = [id, command].map(u16::to_ne_bytes).concat();
        bytes.extend([16 + body.len() as u32, flags, 0].map(u32::to_ne_bytes).concat());
        bytes.extend(body);
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let (socket, parts) = (self.stream.as_raw_fd(), [IoSlice::new(&bytes)]);
        let sent = sendmsg::<()>(socket, &parts, control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// The next message, whatever it is.
    pub fn receive(&mut self) -> Message {
        let mut header = [0; 16];
        let mut space = cmsg_space!([RawFd; 64]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags).unwrap();
        let mut fds = Vec::new();
        for message in received.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made them, and nobody else has them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        assert_eq!(received.bytes, 16, "the server has closed the connection");
        let half = |at: usize| u16::from_ne_bytes(header[at..at + 2].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut body).unwrap();
        Message {
            id: half(0),
            command: half(2),
            is_reply: word(8) & 0xf == 1,
            error: (word(8) & 0x20 != 0).then(|| word(12) as i32),
            body,
            fds,
        }
    }

    /// Whether nothing more comes: the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0))
    }

    /// Whether something has come.
    pub fn has_message(&mut self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let mut byte = [0; 1];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let peeked = nix::sys::socket::recv(self.stream.as_raw_fd(), &mut byte, flags);
        self.stream.set_nonblocking(false).unwrap();
        peeked.is_ok()
    }

    /// The reply to a command, or its errno.
    #[track_caller]
    pub fn ask(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<Message, i32> {
        let id = self.send(command, body, fds);
        let reply = self.receive();
        assert!(reply.is_reply, "the server asks by command {}", reply.command);
        assert_eq!((reply.id, reply.command), (id, command));
        match reply.error {
            Some(errno) => {
                assert!(reply.body.is_empty() && reply.fds.is_empty());
                Err(errno)
            }
            None => Ok(reply),
        }
    }

    /// Agrees on a version, with these capabilities in JSON; what the server has, and what came with it.
    #[track_caller]
    pub fn greet(&mut self, capabilities: &str) -> (serde_json::Value, Vec<OwnedFd>) {
        let reply =
            self.ask(VERSION, &version(&format!("{{\"capabilities\":{capabilities}}}\0")), &[]);
        let mut reply = reply.unwrap();
        assert_eq!(reply.body.pop(), Some(0));
        let data = serde_json::from_slice::<serde_json::Value>(&reply.body[4..]).unwrap();
        (data["capabilities"].clone(), reply.fds)
    }

    /// Reads a region.
    #[track_caller]
    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        self.ask(REGION_READ, &access(offset, region, count, &[]), &[]).unwrap().body[16..].to_vec()
    }

    /// Writes a region.
    #[track_caller]
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let access = access(offset, region, data.len() as u32, data);
        self.ask(REGION_WRITE, &access, &[]).unwrap();
    }

    /// Has edu copy memory at `address` to its buffer, or its buffer there, and waits for the end.
    #[track_caller]
    pub fn edu_copies(&mut self, address: u64, count: u64, to_memory: bool) {
        self.write(7, 4, &6u16.to_ne_bytes());
        let ends = if to_memory { [0x4_0000, address] } else { [address, 0x4_0000] };
        let command = 1 | u64::from(to_memory) << 1;
        for (offset, value) in [(0x80, ends[0]), (0x88, ends[1]), (0x90, count), (0x98, command)] {
            self.write(0, offset, &value.to_ne_bytes());
        }
        while self.read(0, 0x98, 4)[0] & 1 != 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The body of `VERSION` 0.1, with this data.
pub fn version(data: &str) -> Vec<u8> {
    [&[0, 0, 1, 0], data.as_bytes()].concat()
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn access(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &words(&[region, count]), data].concat()
}

/// The body of `DMA_MAP`, for reading and writing.
pub fn map(offset: u64, address: u64, size: u64) -> Vec<u8> {
    let rest = [offset, address, size].into_iter().flat_map(u64::to_ne_bytes);
    words(&[32, 3]).into_iter().chain(rest).collect()
}

/// Runs `script` with a client of a server of edu, which must have nothing to complain of.
pub fn with_edu(script: impl FnOnce(&mut Client)) {
    served(AMPLE, script).unwrap();
}

/// Runs `script` with a client of a server of edu; what the server says of it.
pub fn served(time: Duration, script: impl FnOnce(&mut Client)) -> Result<()> {
    let device = Emulated::new(Edu::new()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| Server::serve_stream(&device, theirs, time));
        let mut client = Client::new(ours);
        script(&mut client);
        drop(client);
        server.join().unwrap()
    })
}
