//! An HTTP server on a stack: several connections, one request on each.

use std::io::Read;
use std::time::{Duration, Instant};

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, State as Tcp};
use smoltcp::time::Duration as Period;
use vfio_remap::{Error, ErrorKind, Result};

use crate::request::{self, MAX_REQUEST, OK, Status};
use crate::stack::Stack;

/// Connections at a time; further clients are refused until one is over.
const CONNECTIONS: usize = 16;
const RECEIVE: usize = 4 << 10;
const SEND: usize = 512 << 10;
/// The size of a chunk, if the length is not known.
const CHUNK: usize = 16 << 10;
/// How long a client may take for its request, and for an answer to what is sent to it.
const REQUEST: Duration = Duration::from_secs(30);
const SILENCE: Period = Period::from_secs(30);

/// What a server has.
pub trait Content {
    /// Opens what is at a path.
    ///
    /// # Errors
    /// What the client is told.
    fn open(&self, path: &[String]) -> std::result::Result<Body, Status>;
}

/// The content of a response.
pub struct Body {
    /// How many bytes it has; it is sent in chunks if that is not known.
    pub length: Option<u64>,
    pub reader: Box<dyn Read>,
    /// Its media type.
    pub kind: &'static str,
}

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Served {
    pub client: String,
    pub path: String,
    pub status: u16,
    /// Bytes of content.
    pub bytes: u64,
    /// Whether all of it was taken over by the stack.
    pub complete: bool,
}

pub struct Server<C> {
    content: C,
    port: u16,
    connections: Vec<Connection>,
}

struct Connection {
    socket: SocketHandle,
    state: State,
}

enum State {
    /// No client.
    Free,
    Reading(Vec<u8>, Instant),
    Answering(Box<Answer>),
    /// All was said.
    Closing(Instant),
}

struct Answer {
    /// The header, or a chunk; so much of it was sent.
    staged: Vec<u8>,
    sent: usize,
    body: Option<Body>,
    served: Served,
}

impl<C: Content> Server<C> {
    /// Listens on a port.
    pub fn new(stack: &mut Stack, port: u16, content: C) -> Self {
        let connections = (0..CONNECTIONS).map(|_| {
            let mut socket = Stack::tcp(RECEIVE, SEND);
            socket.set_timeout(Some(SILENCE));
            socket.set_nagle_enabled(false);
            Connection { socket: stack.sockets.add(socket), state: State::Free }
        });
        Self { content, port, connections: connections.collect() }
    }

    /// Goes on with all connections. What was answered meanwhile.
    ///
    /// # Errors
    /// Why the stack does not listen.
    pub fn poll(&mut self, sockets: &mut SocketSet<'static>) -> Result<Vec<Served>> {
        let mut served = Vec::new();
        for connection in &mut self.connections {
            let socket = sockets.get_mut::<tcp::Socket>(connection.socket);
            served.extend(connection.poll(socket, self.port, &self.content)?);
        }
        Ok(served)
    }

    /// Whether all that was said has arrived.
    pub fn is_idle(&self, sockets: &SocketSet<'static>) -> bool {
        self.connections.iter().all(|connection| {
            let socket = sockets.get::<tcp::Socket>(connection.socket);
            matches!(connection.state, State::Free) || socket.send_queue() == 0
        })
    }
}

impl Connection {
    fn poll(
        &mut self,
        socket: &mut tcp::Socket<'static>,
        port: u16,
        content: &impl Content,
    ) -> Result<Option<Served>> {
        // Nobody else needs the wait for late packets: the next client has another port.
        let is_over = matches!(socket.state(), Tcp::Closed | Tcp::TimeWait);
        if is_over || (socket.is_listening() && !matches!(self.state, State::Free)) {
            let lost = match std::mem::replace(&mut self.state, State::Free) {
                State::Answering(answer) => Some(answer.served),
                _ => None,
            };
            socket.abort();
            socket.listen(port).map_err(|error| {
                Error::new(ErrorKind::Unsupported, "listen on", format!("port {port}"))
                    .with_reason(error.to_string())
            })?;
            return Ok(lost);
        }
        let (state, served) = match std::mem::replace(&mut self.state, State::Free) {
            State::Free if socket.may_recv() => (State::Reading(Vec::new(), Instant::now()), None),
            State::Free => (State::Free, None),
            State::Reading(bytes, since) => (read(socket, bytes, since, content), None),
            State::Answering(answer) => answer.go_on(socket),
            State::Closing(since) => {
                // What the client still says is taken from it, so that it sees the end.
                let _ = socket.recv(|bytes| (bytes.len(), ()));
                if since.elapsed() > REQUEST && socket.send_queue() == 0 {
                    socket.abort();
                }
                (State::Closing(since), None)
            }
        };
        self.state = state;
        Ok(served)
    }
}

/// Reads the request, and begins to answer it.
fn read(
    socket: &mut tcp::Socket<'static>,
    mut bytes: Vec<u8>,
    since: Instant,
    content: &impl Content,
) -> State {
    let room = MAX_REQUEST - bytes.len();
    let _ = socket.recv(|new| {
        let len = new.len().min(room);
        bytes.extend_from_slice(&new[..len]);
        (len, ())
    });
    let request = match request::parse(&bytes) {
        Ok(None) if !socket.may_recv() || since.elapsed() > REQUEST => {
            socket.abort();
            return State::Closing(since);
        }
        Ok(None) => return State::Reading(bytes, since),
        Ok(Some(request)) => Ok(request),
        Err(status) => Err(status),
    };
    let client = socket.remote_endpoint().map_or_else(String::new, |end| end.addr.to_string());
    let answer = match request {
        Ok(request) => {
            let path = request::encode(request.path.iter().map(String::as_str));
            match content.open(&request.path) {
                Ok(body) => Answer::new(client, path, body, request.head_only),
                Err(status) => Answer::refusal(client, path, status, request.head_only),
            }
        }
        Err(status) => Answer::refusal(client, String::new(), status, false),
    };
    State::Answering(Box::new(answer))
}

impl Answer {
    fn new(client: String, path: String, body: Body, head_only: bool) -> Self {
        let length = match body.length {
            Some(length) => format!("Content-Length: {length}"),
            None => "Transfer-Encoding: chunked".to_owned(),
        };
        let staged = head(OK, body.kind, &length);
        let served = Served { client, path, status: OK.0, bytes: 0, complete: false };
        let body = Some(body).filter(|_| !head_only);
        Self { staged: staged.into(), sent: 0, body, served }
    }

    fn refusal(client: String, path: String, status: Status, head_only: bool) -> Self {
        let text = format!("{} {}\n", status.0, status.1);
        let mut staged = head(status, "text/plain", &format!("Content-Length: {}", text.len()));
        if !head_only {
            staged.push_str(&text);
        }
        let served = Served { client, path, status: status.0, bytes: 0, complete: false };
        Self { staged: staged.into(), sent: 0, body: None, served }
    }

    /// Sends what there is room for.
    fn go_on(mut self: Box<Self>, socket: &mut tcp::Socket<'static>) -> (State, Option<Served>) {
        let since = Instant::now();
        if !socket.may_send() {
            socket.abort();
            return (State::Closing(since), Some(self.served));
        }
        while socket.can_send() {
            if self.sent < self.staged.len() {
                // Room was looked at: an error would be one of the state, looked at next time.
                self.sent += socket.send_slice(&self.staged[self.sent..]).unwrap_or(0);
                continue;
            }
            let Some(body) = &mut self.body else {
                socket.close();
                self.served.complete = true;
                return (State::Closing(since), Some(self.served));
            };
            let read = match body.length {
                Some(_) => socket.send(|room| {
                    let read = body.reader.read(room);
                    (*read.as_ref().unwrap_or(&0), read)
                }),
                None => Ok(stage(&mut self.staged, &mut *body.reader)),
            };
            match read {
                Ok(Ok(0)) if body.length.is_none_or(|length| length == self.served.bytes) => {
                    if body.length.is_none() {
                        self.staged = b"0\r\n\r\n".to_vec();
                        self.sent = 0;
                    }
                    self.body = None;
                }
                Ok(Ok(len)) if len > 0 => {
                    self.served.bytes += len as u64;
                    if body.length.is_none() {
                        self.sent = 0;
                    }
                }
                // It is shorter than it was, or cannot be read: the client sees that something is missing.
                _ => {
                    socket.abort();
                    return (State::Closing(since), Some(self.served));
                }
            }
        }
        (State::Answering(self), None)
    }
}

/// Makes a chunk of what is read next; how many bytes that is.
fn stage(staged: &mut Vec<u8>, reader: &mut dyn Read) -> std::io::Result<usize> {
    let mut bytes = vec![0; CHUNK];
    let len = reader.read(&mut bytes)?;
    staged.clear();
    if len > 0 {
        staged.extend_from_slice(format!("{len:x}\r\n").as_bytes());
        staged.extend_from_slice(&bytes[..len]);
        staged.extend_from_slice(b"\r\n");
    }
    Ok(len)
}

fn head(status: Status, kind: &str, length: &str) -> String {
    let Status(code, words) = status;
    let allow = if status == request::NOT_ALLOWED { "Allow: GET, HEAD\r\n" } else { "" };
    format!(
        "HTTP/1.1 {code} {words}\r\nContent-Type: {kind}\r\n{length}\r\n{allow}Connection: close\r\n\r\n"
    )
}
