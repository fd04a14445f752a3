//! The wire of a network card as the command line has it, and the frames that pass it.

use std::fmt;
use std::io::{self, stdin};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Thread;

use serde_json::{Value, json};
use vfio_remap::emulated::igb::{Packets, Wire};
use vfio_remap::{Error, ErrorKind, Result};

/// `udp:OURS,THEIRS`, `tap:NAME` or `stdin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireSpec {
    /// Datagrams from one address to the other and back.
    Udp { ours: SocketAddr, theirs: SocketAddr },
    /// A TAP interface of this machine.
    Tap(String),
    /// The socket that is standard input.
    Stdin,
}

impl WireSpec {
    pub fn open(&self) -> Result<Packets> {
        match self {
            Self::Udp { ours, theirs } => {
                let failed = |what: &'static str, address: &SocketAddr, error: io::Error| {
                    Error::new(ErrorKind::Os, what, format!("udp:{address}"))
                        .with_reason(error.to_string())
                };
                let socket =
                    UdpSocket::bind(ours).map_err(|error| failed("listen at", ours, error))?;
                socket.connect(theirs).map_err(|error| failed("send to", theirs, error))?;
                Packets::new(socket)
            }
            Self::Tap(name) => crate::tap::open(name),
            Self::Stdin => {
                let socket = stdin().as_fd().try_clone_to_owned().map_err(|error| {
                    Error::new(ErrorKind::Os, "use", "standard input")
                        .with_reason(error.to_string())
                })?;
                Packets::new(socket)
            }
        }
    }
}

impl FromStr for WireSpec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "stdin" {
            return Ok(Self::Stdin);
        }
        match text.strip_prefix("tap:") {
            Some("") => return Err("the name of the interface is missing".to_owned()),
            Some(name) => return Ok(Self::Tap(name.to_owned())),
            None => {}
        }
        let Some(addresses) = text.strip_prefix("udp:") else {
            return Err("it is \"stdin\", or begins with \"udp:\" or \"tap:\"".to_owned());
        };
        let Some((ours, theirs)) = addresses.split_once(',') else {
            return Err("two addresses follow \"udp:\", with a comma between them".to_owned());
        };
        let address = |text: &str| {
            text.parse().map_err(|_| {
                format!("{text:?} is no address with a port, such as 127.0.0.1:5000 or [::1]:5000")
            })
        };
        Ok(Self::Udp { ours: address(ours)?, theirs: address(theirs)? })
    }
}

/// An address of Ethernet: six bytes in hexadecimal, with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text:?} is no address of Ethernet, such as 02:00:00:00:00:01");
        let byte = |byte: &str| match byte.len() {
            2 if !byte.starts_with('+') => u8::from_str_radix(byte, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)?;
        let Self([first, ..]) = Self(bytes);
        if first & 1 != 0 {
            return Err(format!("{text:?} is the address of a group, not of a card"));
        }
        Ok(Self(bytes))
    }
}

/// What has passed a wire.
#[derive(Debug, Default)]
pub struct Counts {
    sent: Direction,
    received: Direction,
}

/// Frames of one direction. Their bytes are those from the destination to the payload, without the check sequence.
#[derive(Debug, Default)]
struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    broadcast: AtomicU64,
    multicast: AtomicU64,
    longest: AtomicU64,
}

impl Direction {
    fn count(&self, frame: &[u8]) {
        let len = frame.len() as u64;
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(len, Ordering::Relaxed);
        self.longest.fetch_max(len, Ordering::Relaxed);
        match frame.first_chunk::<6>() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => {
                self.broadcast.fetch_add(1, Ordering::Relaxed);
            }
            Some([first, ..]) if first & 1 != 0 => {
                self.multicast.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn json(&self) -> Value {
        let Self { frames, bytes, broadcast, multicast, longest } = self;
        json!({
            "frames": frames.load(Ordering::Relaxed),
            "bytes": bytes.load(Ordering::Relaxed),
            "broadcast": broadcast.load(Ordering::Relaxed),
            "multicast": multicast.load(Ordering::Relaxed),
            "longest": longest.load(Ordering::Relaxed),
        })
    }
}

impl Counts {
    pub fn json(&self) -> String {
        json!({ "sent": self.sent.json(), "received": self.received.json() }).to_string()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, received } = self;
        write!(f, "{sent} sent, {received} received")
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [frames, bytes] = [&self.frames, &self.bytes].map(|n| n.load(Ordering::Relaxed));
        write!(f, "{frames} frames ({bytes} bytes)")
    }
}

/// A wire that counts what passes it.
pub struct Counted<W> {
    wire: W,
    counts: Arc<Counts>,
}

impl<W> Counted<W> {
    pub fn new(wire: W, counts: Arc<Counts>) -> Self {
        Self { wire, counts }
    }
}

impl<W: Wire> Wire for Counted<W> {
    fn send(&mut self, frame: &[u8]) {
        self.counts.sent.count(frame);
        self.wire.send(frame);
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let received = self.wire.receive(frame);
        if received {
            self.counts.received.count(frame);
        }
        received
    }

    fn is_up(&self) -> bool {
        self.wire.is_up()
    }

    fn missed(&mut self) -> u32 {
        self.wire.missed()
    }

    fn watch(&mut self, reader: Thread) {
        self.wire.watch(reader);
    }
}
