//! Gets a file by HTTP, on a stack that others may use at the same time.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{self, State as Tcp};
use smoltcp::time::Duration as Period;
use vfio_remap::{Error, ErrorKind, Result};

use crate::response::{Head, Response};
use crate::stack::Stack;
use crate::url::Url;

const SEND: usize = 4 << 10;
/// The stack adds a limit to its clock, and panics if that overflows.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// A file that is on its way.
pub struct Fetch {
    url: Url,
    server: Ipv4Addr,
    socket: SocketHandle,
    request: Vec<u8>,
    response: Response,
    digest: Sha256,
    bytes: u64,
    start: Instant,
    /// When something has come last.
    heard: Instant,
    limit: Duration,
    connected: bool,
}

/// A file that has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetched {
    pub head: Head,
    pub bytes: u64,
    pub sha256: String,
    pub elapsed: Duration,
}

impl Fetch {
    /// Begins to connect to a server. It may be silent for `limit` at most.
    pub fn new(stack: &mut Stack, url: Url, server: Ipv4Addr, limit: Duration) -> Result<Self> {
        let mut socket = Stack::tcp(stack.window(), SEND);
        socket.set_timeout(Some(Period::from(limit.clamp(Duration::from_secs(1), LONGEST))));
        let remote = (server, url.port);
        socket.connect(stack.interface.context(), remote, Stack::local_port()).map_err(
            |error| {
                Error::new(ErrorKind::InvalidInput, "connect to", format!("{server}:{}", url.port))
                    .with_reason(error.to_string())
                    .with_advice(
                        "pass the address of a station; the card needs one, too (--address)",
                    )
            },
        )?;
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: vfio-remap-nic\r\nAccept: */*\r\n\
             Connection: close\r\n\r\n",
            url.path,
            url.authority()
        );
        let now = Instant::now();
        Ok(Self {
            server,
            socket: stack.sockets.add(socket),
            request: request.into(),
            response: Response::new(),
            digest: Sha256::new(),
            bytes: 0,
            start: now,
            heard: now,
            limit,
            connected: false,
            url,
        })
    }

    /// What the server has said before the content.
    pub fn head(&self) -> Option<&Head> {
        self.response.head()
    }

    /// Goes on, and passes what has come of the content to `content`. The file, once all of it has come.
    ///
    /// # Errors
    /// `TimedOut` if the server does not answer, `Refused` if it does not listen or has no such file,
    /// `Malformed` if it answers something else; the errors of `content`.
    pub fn poll(
        &mut self,
        stack: &mut Stack,
        content: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<Option<Fetched>> {
        let socket = stack.sockets.get_mut::<tcp::Socket>(self.socket);
        self.connected |= !matches!(socket.state(), Tcp::SynSent | Tcp::Closed);
        if socket.can_send() && !self.request.is_empty() {
            let sent = socket.send_slice(&self.request).unwrap_or(0);
            self.request.drain(..sent);
        }
        while socket.can_recv() {
            self.heard = Instant::now();
            let Self { response, digest, bytes, .. } = self;
            let mut take = |part: &[u8]| {
                digest.update(part);
                *bytes += part.len() as u64;
                content(part)
            };
            let read = socket.recv(|part| (part.len(), response.read(part, &mut take)));
            read.unwrap_or(Ok(())).map_err(|error| self.about(error))?;
            self.check_status()?;
        }
        if !self.response.is_done() {
            let (may_receive, state) = (socket.may_recv(), socket.state());
            if self.connected && !may_receive {
                // A reset is no end: what it cuts off is missing.
                if state == Tcp::Closed {
                    let early = self.heard.elapsed() < self.limit;
                    return Err(if early { self.reset() } else { self.silent() });
                }
                self.response.end().map_err(|error| self.about(error))?;
            } else if !self.connected && state == Tcp::Closed {
                let early = self.start.elapsed() < self.limit;
                return Err(if early { self.refused() } else { self.silent() });
            } else if self.heard.elapsed() >= self.limit {
                return Err(self.silent());
            }
        }
        let Some(head) = self.response.head().filter(|_| self.response.is_done()) else {
            return Ok(None);
        };
        let sha256 = hex(&self.digest.finalize_reset());
        let elapsed = self.start.elapsed();
        Ok(Some(Fetched { head: head.clone(), bytes: self.bytes, sha256, elapsed }))
    }

    /// Ends the connection.
    pub fn close(self, stack: &mut Stack) {
        // A socket that is removed says nothing any more: the reset has to be sent before.
        stack.sockets.get_mut::<tcp::Socket>(self.socket).abort();
        // Its network may be gone, and the reset with it.
        let _ = stack.poll();
        stack.sockets.remove(self.socket);
    }

    fn check_status(&self) -> Result<()> {
        let Some(head) = self.head().filter(|head| !(200..300).contains(&head.status)) else {
            return Ok(());
        };
        let Head { status, reason, location, .. } = head;
        let error = Error::new(ErrorKind::Refused, "get", self.name())
            .with_reason(format!("the server answers {status} {reason}"));
        Err(match location {
            Some(location) => error.with_advice(format!("get {location} instead")),
            None => error.with_advice("look whether the path is right"),
        })
    }

    fn name(&self) -> String {
        format!("http://{}{}", self.url.authority(), self.url.path)
    }

    fn about(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Malformed {
            return error;
        }
        let reason = error.reason().to_owned();
        Error::new(ErrorKind::Malformed, "get", self.name())
            .with_reason(reason)
            .with_advice("look whether that is an HTTP server, and is well")
    }

    fn refused(&self) -> Error {
        let Self { server, url, .. } = self;
        Error::new(ErrorKind::Refused, "get", self.name())
            .with_reason(format!("{server} does not listen on port {}", url.port))
            .with_advice("start the server, or correct the port")
    }

    fn reset(&self) -> Error {
        Error::new(ErrorKind::Gone, "get", self.name())
            .with_reason(format!("{} has reset the connection", self.server))
            .with_advice("look whether the server is well, and try again")
    }

    fn silent(&self) -> Error {
        let what = if self.connected { "was silent" } else { "did not answer" };
        Error::new(ErrorKind::TimedOut, "get", self.name())
            .with_reason(format!("{} {what} for {} s", self.server, self.limit.as_secs()))
            .with_advice("look whether the address is right and the host is on (nic ping)")
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
