//! One client of a server: its commands, served.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;

use super::ClientLimits;
use super::closer::Closer;
use super::wire::Wire;
use crate::emulated::device::Emulated;
use crate::emulated::user::User;
use crate::sys::stream::Stream;
use crate::transport::RegionFile;
use crate::transport::vfio_user::protocol::channel::{Fault, Message};
use crate::transport::vfio_user::protocol::version::Capabilities;
use crate::transport::vfio_user::protocol::wire::{Version, command};

/// A client that is connected.
pub(super) struct Session<'a> {
    pub(super) device: &'a Emulated,
    pub(super) user: Arc<User>,
    wire: Arc<Wire>,
    /// The socket by which the client is asked for its memory: `wire`, or a second one.
    pub(super) asking: Arc<Wire>,
    /// What the client has sent in VERSION, after that.
    client: Option<Capabilities>,
    closer: Closer,
}

/// The reply to a command.
#[derive(Default)]
pub(super) struct Reply {
    body: Vec<u8>,
    file: Option<RegionFile>,
    /// The client's end of the second socket.
    twin: Option<OwnedFd>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self { body, ..Self::default() }
    }
}

impl Reply {
    pub(super) fn with_file(body: Vec<u8>, file: Option<RegionFile>) -> Self {
        Self { body, file, twin: None }
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let twin = self.twin.iter().map(AsFd::as_fd);
        self.file.iter().map(RegionFile::fd).chain(twin).collect()
    }
}

pub(super) type Served = Result<Reply, Errno>;

impl<'a> Session<'a> {
    pub(super) fn new(
        device: &'a Emulated,
        stream: UnixStream,
        limits: ClientLimits,
    ) -> std::io::Result<Self> {
        let ClientLimits { time, files } = limits;
        let wire = Arc::new(Wire::new(stream, time)?);
        let asking = wire.clone();
        let closer = Closer::default();
        Ok(Self { device, user: User::new(files), wire, asking, client: None, closer })
    }

    /// The client's socket.
    pub(super) fn stream(&self) -> Arc<Stream> {
        self.wire.stream().clone()
    }

    /// Serves commands until the client leaves.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        loop {
            let is_first = self.client.is_none();
            let next = if is_first { self.wire.first_command() } else { self.wire.command() };
            let Message { header, body, mut fds } = match next {
                Ok(message) => message,
                Err(Fault::Closed { cut_short: false }) => return Ok(()),
                Err(fault) => return Err(fault),
            };
            let served = self.serve(header.command, &body, &mut fds);
            if let Err(errno) = &served {
                log::debug!("{} failed: {errno}", command::name(header.command));
            }
            // Before the reply, since sending that may fail.
            let closed = self.closer.close(fds.take());
            if header.wants_reply() {
                match &served {
                    Ok(reply) => {
                        let body = &reply.body;
                        self.wire.send(header.reply(body.len()), [body, &[]], &reply.fds())?;
                    }
                    Err(errno) => self.wire.send(header.failure(*errno), [&[], &[]], &[])?,
                }
            }
            closed?;
            if is_first && served.is_err() {
                return Err(Fault::Malformed("the client has not agreed on a version".to_owned()));
            }
        }
    }

    /// Serves a command. It takes the descriptors that it uses; the caller closes the rest.
    fn serve(&mut self, command: u16, body: &[u8], fds: &mut Vec<OwnedFd>) -> Served {
        if self.client.is_some() == (command == command::VERSION) {
            return Err(Errno::EINVAL);
        }
        match command {
            command::VERSION => self.version(body),
            command::DMA_MAP => self.dma_map(body, fds),
            command::DMA_UNMAP => self.dma_unmap(body),
            command::DEVICE_GET_INFO => self.device_info(body),
            command::DEVICE_GET_REGION_INFO => self.region_info(body),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(body),
            command::DEVICE_SET_IRQS => self.set_irqs(body, fds),
            command::REGION_READ => self.region_read(body),
            command::REGION_WRITE => self.region_write(body),
            command::REGION_WRITE_MULTI => self.region_write_multi(body),
            command::DEVICE_RESET => self.reset(),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    /// How many descriptors the client takes with one message.
    pub(super) fn max_fds(&self) -> usize {
        self.client.map_or(0, |client| client.fds)
    }

    fn version(&mut self, body: &[u8]) -> Served {
        let refused = |reason: String| {
            log::debug!("a client was refused: {reason}");
            Errno::EINVAL
        };
        let client = Capabilities::read(body).map_err(refused)?;
        let minor = Version::decode(body).map_or(0, |(version, _)| version.minor);
        self.wire.limit_transfer(client.transfer);
        let twin = match client.twin_socket && client.fds > 0 {
            true => self.twin(client.transfer),
            false => None,
        };
        self.client = Some(client);
        Ok(Reply { body: client.reply(minor, twin.is_some()), file: None, twin })
    }

    /// Creates a second socket for the server's commands, and returns the client's end. If that fails, one socket
    /// serves both directions.
    fn twin(&mut self, transfer: usize) -> Option<OwnedFd> {
        let (wire, theirs) = self
            .wire
            .twin()
            .inspect_err(|error| log::debug!("a client gets no second socket: {error}"))
            .ok()?;
        wire.limit_transfer(transfer);
        self.asking = Arc::new(wire);
        Some(theirs.into())
    }
}

impl Drop for Session<'_> {
    /// Releases what the client has mapped and connected. The device keeps its state, but ends work that only this
    /// client waits for.
    fn drop(&mut self) {
        // First, so that a model that waits for the client's memory continues: `detach` waits for the model.
        self.asking.close();
        self.wire.close();
        self.device.core.bus.detach(&self.user);
        self.device.core.client_left();
        let unused = [&self.asking, &self.wire].into_iter().flat_map(|wire| wire.take_fds());
        let unused = unused.collect();
        // The client is disconnected in any case.
        let _ = self.closer.close(unused);
    }
}
