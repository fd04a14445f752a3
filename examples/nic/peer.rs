//! The station at the other end of an emulated card's wire: another emulated card with a stack of its own, in a
//! thread. It has a DHCP, a DNS and an HTTP server, answers pings, and gets files on request.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use smoltcp::wire::Ipv4Cidr;
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::{Device, Error, ErrorKind, Result};
use vfio_remap_ethernet::{Nic, Settings};

use crate::card::{LOOK, emulated_address, wait_for_link};
use crate::dhcp::Dhcp;
use crate::dns::Dns;
use crate::fetch::{Fetch, Fetched};
use crate::network::Network;
use crate::pattern::{self, HOST, Pattern};
use crate::request::{NOT_FOUND, Status};
use crate::say;
use crate::server::{Body, Content, Server};
use crate::stack::Stack;
use crate::stop::Stop;
use crate::url::Url;

/// Its address, and the one that it offers, as in QEMU's user network.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const OFFERED: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const BITS: u8 = 24;

/// How long it waits for its link, and for a server that is silent.
const LONG: Duration = Duration::from_secs(30);

/// A thread with the station; it ends when this is dropped.
pub struct Peer {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    /// Has something once the station is there.
    ready: Receiver<()>,
    wanted: Sender<Url>,
    fetched: Receiver<Result<Fetched>>,
}

impl Peer {
    /// Connects a station to a wire.
    pub fn start(wire: Port, settings: Settings) -> Result<Self> {
        let address = emulated_address(0xfe);
        let device = Device::new(Arc::new(Emulated::new(Igb::new(address).with_wire(wire))?));
        let nic = Nic::new(device, settings)?;
        let stop = Stop::default();
        let (wanted, requests) = channel();
        let (answers, fetched) = channel();
        let (up, ready) = channel();
        let station = Station { nic, stop: stop.clone(), up, requests, answers };
        let thread = thread::Builder::new().name("peer".to_owned());
        let thread = thread
            .spawn(move || {
                if let Err(error) = station.run() {
                    say::aside(format_args!(
                        "nic: the station at the other end of the wire: {error}"
                    ));
                }
            })
            .map_err(|error| Error::from_io(error, "start", "a thread"))?;
        Ok(Self { stop, thread: Some(thread), ready, wanted, fetched })
    }

    /// Waits until it is there: what is said to it is lost before.
    pub fn wait(&self, stop: &Stop) -> Result<()> {
        loop {
            stop.check("the command")?;
            match self.ready.recv_timeout(LOOK) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                // It has a limit for its link, and has said why it has ended.
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::Gone, "connect to", "a station")
                        .with_reason("the one at the other end of the wire has ended"));
                }
            }
        }
    }

    /// Has it get a file.
    pub fn want(&self, url: Url) {
        // A station that has failed is noticed when the file does not come.
        let _ = self.wanted.send(url);
    }

    /// The next file that it has got, if one has come.
    pub fn fetched(&self) -> Option<Result<Fetched>> {
        self.fetched.try_recv().ok()
    }

    /// Whether it has failed.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            say::aside(format_args!("nic: the station at the other end of the wire has panicked"));
        }
    }
}

/// What the thread has.
struct Station {
    nic: Arc<Nic>,
    stop: Stop,
    up: Sender<()>,
    requests: Receiver<Url>,
    answers: Sender<Result<Fetched>>,
}

impl Station {
    fn run(self) -> Result<()> {
        let Self { nic, stop, up, requests, answers } = self;
        wait_for_link(&nic, LONG, &stop)?;
        let mut stack = Stack::new(&nic, &Stop::default())?;
        stack.apply(Network {
            address: Some(Ipv4Cidr::new(ADDRESS, BITS)),
            router: None,
            dns: Vec::new(),
        })?;
        let offer = Ipv4Cidr::new(OFFERED, BITS);
        let dhcp = Dhcp::new(&mut stack.sockets, ADDRESS, offer);
        let dns = Dns::new(&mut stack.sockets, HOST, ADDRESS);
        let mut server = Server::new(&mut stack, 80, Patterns);
        let mut fetch: Option<Fetch> = None;
        let _ = up.send(());
        stack.run(None, |stack| {
            dhcp.poll(&mut stack.sockets);
            dns.poll(&mut stack.sockets);
            server.poll(&mut stack.sockets)?;
            if fetch.is_none()
                && let Ok(url) = requests.try_recv()
            {
                fetch = begin(stack, url, &answers);
            }
            if let Some(mut going) = fetch.take() {
                match going.poll(stack, &mut |_| Ok(())).transpose() {
                    None => fetch = Some(going),
                    Some(result) => {
                        going.close(stack);
                        let _ = answers.send(result);
                    }
                }
            }
            Ok(stop.is_set().then_some(()))
        })?;
        stack.close()?;
        Ok(nic.close()?)
    }
}

/// Begins to get a file; an error is an answer, too.
fn begin(stack: &mut Stack, url: Url, answers: &Sender<Result<Fetched>>) -> Option<Fetch> {
    let server = url.host.parse().map_err(|_| {
        Error::new(ErrorKind::InvalidInput, "get", &url.host).with_reason("it is no address")
    });
    match server.and_then(|server| Fetch::new(stack, url, server, LONG)) {
        Ok(fetch) => Some(fetch),
        Err(error) => {
            let _ = answers.send(Err(error));
            None
        }
    }
}

/// Has `/SIZE` and, in chunks, `/chunked/SIZE`.
struct Patterns;

impl Content for Patterns {
    fn open(&self, path: &[String]) -> std::result::Result<Body, Status> {
        let (chunked, name) = match path {
            [name] => (false, name),
            [first, name] if first == "chunked" => (true, name),
            _ => return Err(NOT_FOUND),
        };
        let size = pattern::size(name).ok_or(NOT_FOUND)?;
        let kind = "application/octet-stream";
        let length = Some(size).filter(|_| !chunked);
        Ok(Body { length, reader: Box::new(Pattern::new(size)), kind })
    }
}
