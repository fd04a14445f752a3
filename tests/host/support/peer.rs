//! A vfio-user server of a PCI device that does what the protocol and PCI say, and no more: what it is asked is
//! noted, and a test changes what it answers.

use std::collections::HashMap;
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const INFO: u16 = 4;
pub const REGION: u16 = 5;
pub const IRQ: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const READ: u16 = 9;
pub const WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const WRITE_MULTI: u16 = 15;

/// Where its capabilities are.
pub const MSI: u64 = 0x50;
pub const MSIX: u64 = 0x70;

/// What it was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub command: u16,
    pub body: Vec<u8>,
    /// How many descriptors came along.
    pub fds: usize,
}

impl Asked {
    pub fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.body[at..at + 4].try_into().unwrap())
    }

    /// Of an access to configuration space: offset and, if it is a write, the data.
    pub fn config(&self) -> Option<(u64, &[u8])> {
        let of_region_7 = matches!(self.command, READ | WRITE) && self.word(8) == 7;
        of_region_7.then(|| (self.word(0).into(), &self.body[16..]))
    }
}

/// What it answers.
pub struct Answer {
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    pub error: Option<i32>,
    /// It is sent when the test says so: [`Peer::let_go`].
    pub late: bool,
}

/// The device.
pub struct Device {
    pub version: Vec<u8>,
    pub config: Vec<u8>,
    /// The sizes of regions, by index.
    pub regions: [u64; 9],
    /// Count and flags of interrupts, by index.
    pub irqs: [(u32, u32); 5],
}

impl Default for Device {
    fn default() -> Self {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
        config[6] = 1 << 4;
        config[0x34] = MSI as u8;
        config[MSI as usize..][..4].copy_from_slice(&[5, MSIX as u8, 0x84, 0]);
        // Its table is in a BAR that nobody looks at.
        config[MSIX as usize..][..12].copy_from_slice(&[0x11, 0, 7, 0, 5, 0, 0, 0, 5, 8, 0, 0]);
        let mut regions = [0; 9];
        (regions[0], regions[7]) = (0x4000, 256);
        let irqs = [(1, 1), (4, 1), (8, 1), (0, 0), (0, 0)];
        let version = version(0, 1, r#"{"capabilities":{"max_msg_fds":8}}"#);
        Self { version, config, regions, irqs }
    }
}

/// A `VERSION`, with a final NUL.
pub fn version(major: u16, minor: u16, json: &str) -> Vec<u8> {
    [&major.to_ne_bytes()[..], &minor.to_ne_bytes(), json.as_bytes(), b"\0"].concat()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

impl Device {
    pub fn config_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.config[at as usize..][..2].try_into().unwrap())
    }

    pub fn config_u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.config[at as usize..][..4].try_into().unwrap())
    }

    pub fn set_u16(&mut self, at: u64, value: u16) {
        self.config[at as usize..][..2].copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, region: u32, offset: usize, data: &[u8]) {
        if region == 7 {
            self.config[offset..][..data.len()].copy_from_slice(data);
        }
    }

    fn answer(&mut self, asked: &Asked) -> Answer {
        let body = &asked.body;
        let body = match asked.command {
            VERSION => self.version.clone(),
            INFO => words(&[16, 3, 9, 5]),
            REGION => {
                let (index, size) = (asked.word(8), self.regions[asked.word(8) as usize]);
                let flags = if size > 0 { 3 } else { 0 };
                words(&[32, flags, index, 0, size as u32, (size >> 32) as u32, 0, 0])
            }
            IRQ => {
                let (count, flags) = self.irqs[asked.word(8) as usize];
                words(&[16, flags, asked.word(8), count])
            }
            READ => {
                let (offset, count) = (asked.word(0) as usize, asked.word(12) as usize);
                let data = match asked.word(8) {
                    7 => self.config[offset..][..count].to_vec(),
                    _ => vec![7; count],
                };
                [&body[..16], &data].concat()
            }
            WRITE => {
                self.write(asked.word(8), asked.word(0) as usize, &body[16..]);
                body[..16].to_vec()
            }
            WRITE_MULTI => {
                for write in body[8..].chunks(24) {
                    let word =
                        |at: usize| u32::from_ne_bytes(write[at..at + 4].try_into().unwrap());
                    self.write(word(8), word(0) as usize, &write[16..][..word(12) as usize]);
                }
                body[..8].to_vec()
            }
            DMA_UNMAP => body.clone(),
            _ => Vec::new(),
        };
        Answer { body, fds: Vec::new(), error: None, late: false }
    }
}

/// A server in a thread, for as long as its client is connected.
pub struct Peer {
    device: Arc<Mutex<Device>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    stream: UnixStream,
    /// Replies to its own commands: the errno or 0, and the body.
    replies: Receiver<(u32, Vec<u8>)>,
    held: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: Option<JoinHandle<()>>,
}

/// How long a reply may take.
const AMPLE: Duration = Duration::from_secs(60);

impl Peer {
    /// Serves `device`, but for what `script` makes of the answers. The client's end.
    pub fn start(
        device: Device,
        script: impl FnMut(&mut Device, &Asked, &mut Answer) + Send + 'static,
    ) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let device = Arc::new(Mutex::new(device));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let held = Arc::new(Mutex::new(Vec::new()));
        let (send, replies) = channel();
        let thread = thread::spawn({
            let (device, asked, held) = (device.clone(), asked.clone(), held.clone());
            let stream = ours.try_clone().unwrap();
            move || serve(&stream, &device, &asked, &held, &send, script)
        });
        let thread = Some(thread);
        (Self { device, asked, stream: ours, replies, held, thread }, theirs)
    }

    pub fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap()
    }

    /// What it was asked since it was looked at last.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    /// Sends what was held back.
    pub fn let_go(&self) {
        for bytes in std::mem::take(&mut *self.held.lock().unwrap()) {
            (&self.stream).write_all(&bytes).unwrap();
        }
    }

    /// Sends these bytes.
    pub fn send(&self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).unwrap();
    }

    /// Sends a byte out of band, unless the client has closed the connection. Returns whether it has.
    pub fn send_out_of_band(&self) -> bool {
        let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL;
        let sent = nix::sys::socket::send(self.stream.as_raw_fd(), b"!", flags);
        sent.is_err() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the client has closed the connection.
    pub fn ended(mut self) {
        self.thread.take().map(JoinHandle::join).unwrap().unwrap();
    }

    /// Asks the client for something, which does nothing else meanwhile.
    pub fn command(&self, command: u16, body: &[u8]) -> Result<Vec<u8>, i32> {
        (&self.stream).write_all(&message(77, command, 0, 0, body)).unwrap();
        let (errno, body) = self.replies.recv_timeout(AMPLE).expect("a reply");
        if errno == 0 { Ok(body) } else { Err(errno as i32) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// A message of this id.
pub fn message(id: u16, command: u16, flags: u32, errno: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
    bytes.extend(words(&[16 + body.len() as u32, flags, errno]));
    bytes.extend(body);
    bytes
}

/// A message of a peer's, with the count of descriptors that came with it, which are closed.
pub fn receive(mut stream: &UnixStream) -> Option<(Vec<u8>, Vec<u8>, usize)> {
    let mut header = [0; 16];
    let mut space = nix::cmsg_space!([RawFd; 64]);
    let mut parts = [std::io::IoSliceMut::new(&mut header[..1])];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let first = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
    let fds = first.cmsgs().unwrap().flat_map(|control| match control {
        nix::sys::socket::ControlMessageOwned::ScmRights(fds) => fds,
        _ => Vec::new(),
    });
    let fds: Vec<RawFd> = fds.collect();
    let count = fds.len();
    fds.into_iter().for_each(|fd| nix::unistd::close(fd).unwrap());
    if first.bytes == 0 {
        return None;
    }
    stream.read_exact(&mut header[1..]).ok()?;
    let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
    let mut body = vec![0; size - 16];
    stream.read_exact(&mut body).ok()?;
    Some((header.to_vec(), body, count))
}

fn serve(
    stream: &UnixStream,
    device: &Mutex<Device>,
    seen: &Mutex<Vec<Asked>>,
    held: &Mutex<Vec<Vec<u8>>>,
    replies: &Sender<(u32, Vec<u8>)>,
    mut script: impl FnMut(&mut Device, &Asked, &mut Answer),
) {
    while let Some((header, body, fds)) = receive(stream) {
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        if header[8] & 0xf == 1 {
            let errno = u32::from_ne_bytes(header[12..].try_into().unwrap());
            let _ = replies.send((errno, body));
            continue;
        }
        let asked = Asked { command: half(2), body, fds };
        let mut device = device.lock().unwrap();
        let mut answer = device.answer(&asked);
        script(&mut device, &asked, &mut answer);
        drop(device);
        seen.lock().unwrap().push(asked);
        let Answer { body, fds, error, late } = answer;
        let bytes = match error {
            Some(errno) => message(half(0), half(2), 0x21, errno as u32, &[]),
            None => message(half(0), half(2), 1, 0, &body),
        };
        if late {
            held.lock().unwrap().push(bytes);
            continue;
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights };
        let socket = stream.as_fd().as_raw_fd();
        let flags = MsgFlags::MSG_NOSIGNAL;
        if sendmsg::<()>(socket, &[IoSlice::new(&bytes)], control, flags, None).is_err() {
            return;
        }
    }
}

/// What the messages were about, for comparison: commands of interrupts and writes to configuration space.
pub fn of_interrupts(asked: &[Asked]) -> Vec<String> {
    let actions =
        HashMap::from([(0x24, "connect"), (0x21, "trigger"), (0x11, "unmask"), (0x09, "mask")]);
    let text = |asked: &Asked| match (asked.command, asked.config()) {
        (SET_IRQS, _) => {
            let (index, start, count) = (asked.word(8), asked.word(12), asked.word(16));
            let action = match (asked.word(4), count) {
                (0x21, 0) => "disconnect",
                (flags, _) => actions[&flags],
            };
            Some(format!("{action} {index} {start}+{count}"))
        }
        (WRITE, Some((at, data))) => {
            let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            Some(format!("{at:#x} = {value:#x}"))
        }
        _ => None,
    };
    asked.iter().filter_map(text).collect()
}
