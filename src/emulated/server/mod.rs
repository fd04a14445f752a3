//! A device that is served to other processes.

mod session;
pub(super) mod wire;

use std::fmt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use session::Session;

use super::device::Emulated;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::transport::Transport;
use crate::transport::vfio_user::protocol::channel::{Fault, within_reason};

/// What a server grants a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientLimits {
    /// How long the client may take for the rest of a message that it has begun, to take an answer, and
    /// to answer for memory that it does not share.
    pub time: Duration,
    /// How many mappings for DMA may come with a file, which costs the server a file descriptor each.
    /// One more is refused with EMFILE.
    pub files: u32,
}

impl Default for ClientLimits {
    /// Five seconds, and half of the file descriptors that this process may have (the soft limit
    /// RLIMIT_NOFILE, `man 2 getrlimit`).
    fn default() -> Self {
        // Without an answer, half of what processes usually may have.
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let files = u32::try_from(descriptors / 2).unwrap_or(u32::MAX);
        Self { time: Duration::from_secs(5), files }
    }
}

impl From<Duration> for ClientLimits {
    /// The default, but for the time.
    fn from(time: Duration) -> Self {
        Self { time, ..Self::default() }
    }
}

/// Serves a device to vfio-user clients, one at a time: [`VfioUser`](crate::transport::VfioUser),
/// QEMU's `vfio-user-pci` (10.1 and newer), cloud-hypervisor, or any other that speaks version 0.1 of
/// the protocol.
///
/// Clients are not trusted: what they send is checked, what they share is read and written but never
/// mapped, and one that misbehaves is disconnected. A client cannot hold up the server, whatever it does
/// with the sockets, memory and eventfds that both have: each wait has the time of its [`ClientLimits`]. One
/// wait has none: a descriptor that is neither memory nor an eventfd is closed in the thread that serves
/// this client, and where the client itself serves the file system behind it (FUSE), that ends when the
/// client answers or leaves. Nobody else waits for it.
///
/// Clients do share the device, with each other and with the program that it is in: one finds it as
/// another has left it. What a client has mapped for DMA and which eventfds it has connected is its own,
/// and goes with it; an I/O address that one has mapped, no other can map.
///
/// ```no_run
/// use vfio_remap::emulated::{Edu, Emulated, Server};
///
/// let server = Server::bind("/run/edu.sock", Emulated::new(Edu::new())?)?;
/// loop {
///     if let Err(error) = server.serve() {
///         eprintln!("{error}");
///     }
/// }
/// # #[allow(unreachable_code)]
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    device: Emulated,
    limits: ClientLimits,
    generation: u32,
}

impl Server {
    /// Listens at `path`, where nothing may be yet; it is removed when the server is dropped, but not by
    /// a child of `fork(2)`.
    ///
    /// # Errors
    /// What the kernel answers; EADDRINUSE where something is there.
    pub fn bind(path: impl AsRef<Path>, device: Emulated) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let listener = UnixListener::bind(&path).map_err(|error| {
            let failed = Error::io(&error, "listen at", path.display());
            match error.kind() {
                std::io::ErrorKind::AddrInUse => {
                    failed.with_advice("remove it if no server uses it")
                }
                _ => failed,
            }
        })?;
        let generation = fork::generation();
        Ok(Self { listener, path, device, limits: ClientLimits::default(), generation })
    }

    /// Grants each client this, and not the default.
    #[must_use]
    pub fn with_limits(mut self, limits: impl Into<ClientLimits>) -> Self {
        self.limits = limits.into();
        self
    }

    /// Waits for a client, and serves it until it leaves.
    ///
    /// # Errors
    /// `Malformed` where it was disconnected because it sent what makes no sense, `Gone` where it died
    /// in the middle of a message or was silent there. The server can serve the next.
    pub fn serve(&self) -> Result<()> {
        let (stream, _) = self
            .listener
            .accept()
            .map_err(|error| Error::io(&error, "accept a client at", self.path.display()))?;
        Self::serve_stream(&self.device, stream, self.limits)
    }

    /// Serves a client on a socket that is connected already.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn serve_stream(
        device: &Emulated,
        stream: UnixStream,
        limits: impl Into<ClientLimits>,
    ) -> Result<()> {
        let object = || format!("a client of {}", device.info().name);
        let limits = limits.into();
        let limits = ClientLimits { time: within_reason(limits.time), ..limits };
        let mut session = Session::new(device, stream, limits)
            .map_err(|error| Error::io(&error, "serve", object()))?;
        session.run().map_err(|fault| {
            let kind = match fault {
                Fault::Malformed(_) => ErrorKind::Malformed,
                Fault::Closed { .. } | Fault::Silent(_) => ErrorKind::Gone,
                Fault::Os(errno) => return Error::os(errno, "serve", object()),
            };
            Error::new(kind, "serve", object()).with_reason(fault.to_string())
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // A child's copy: the parent listens on.
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({} at {})", self.device.info().name, self.path.display())
    }
}
