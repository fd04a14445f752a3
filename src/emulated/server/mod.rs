//! A device that is served to other processes.

mod closer;
mod commands;
mod listener;
mod memory;
mod session;
pub(super) mod wire;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use listener::{AtTheEnd, Event, Listener};
use session::Session;

use super::device::Emulated;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::transport::Transport;
use crate::transport::vfio_user::protocol::channel::{Fault, within_reason};

/// The limits of a server for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientLimits {
    /// How long the client may take to send the rest of a message, to receive a reply, and to reply to an
    /// access to memory that it does not share.
    pub time: Duration,
    /// How many DMA mappings may come with a file. Each costs the server a file descriptor or a mapping. More are
    /// refused with EMFILE.
    pub files: u32,
}

impl Default for ClientLimits {
    /// Five seconds, and half of the file descriptors that this process may have (the soft limit RLIMIT_NOFILE,
    /// `man 2 getrlimit`), but at most 16384: a quarter of the mappings that Linux allows a process by default
    /// (`vm.max_map_count`).
    fn default() -> Self {
        const MAPPINGS: u64 = 16384;
        // If the call fails, half of the usual limit.
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let files = (descriptors / 2).min(MAPPINGS) as u32;
        Self { time: Duration::from_secs(5), files }
    }
}

impl From<Duration> for ClientLimits {
    /// The default limits with this time.
    fn from(time: Duration) -> Self {
        Self { time, ..Self::default() }
    }
}

/// Serves a device to vfio-user clients, one at a time: [`VfioUser`](crate::transport::VfioUser),
/// QEMU's `vfio-user-pci` (10.1 and newer), cloud-hypervisor, or any other that speaks version 0.1 of
/// the protocol. A client that connects while another one is served is refused with EBUSY, or waits
/// ([`with_queue`](Self::with_queue)).
///
/// Clients are not trusted: everything that they send is checked, and a client that breaks the protocol is
/// disconnected. A client cannot block the server by the sockets, memory and eventfds that they share: each wait has
/// the time limit of [`ClientLimits`].
///
/// A client shares memory for DMA by sending a file. Files on tmpfs (such as a memfd) are read and written; files on
/// hugetlbfs and on local disks (ext2, ext3, ext4, XFS, Btrfs, F2FS) are mapped. If the client truncates a mapped
/// file, transfers fail, and no signal is raised: the kernel copies. All other files are refused with EOPNOTSUPP,
/// since an access to a file in FUSE or NFS waits for another process or machine. Closing such a file waits as well.
/// A thread does that; it remains until the file is closed.
///
/// Clients share the device with each other and with the program that serves it, including its state. The DMA
/// mappings and the eventfds of a client are its own and are released when it leaves. Two users cannot map the same
/// IOVA.
///
/// ```no_run
/// use vfio_remap::emulated::{Edu, Emulated, Server};
///
/// let server = Server::bind("/run/edu.sock", Emulated::new(Edu::new())?)?;
/// // Until another thread calls `Server::stop`.
/// while !server.is_stopped() {
///     if let Err(error) = server.serve() {
///         eprintln!("{error}");
///     }
/// }
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[must_use = "it answers no client before Server::serve"]
pub struct Server {
    listener: Listener,
    path: PathBuf,
    device: Emulated,
    limits: ClientLimits,
    queues: bool,
    generation: u32,
}

impl Server {
    /// Listens at `path`, which must not exist. The socket is removed when the server is dropped, but not by a child
    /// of `fork(2)`.
    ///
    /// # Errors
    /// Errors of the kernel; EADDRINUSE if `path` exists; `InvalidInput` if it is empty.
    pub fn bind(path: impl AsRef<Path>, device: Emulated) -> Result<Self> {
        let path = path.as_ref().to_owned();
        if path.as_os_str().is_empty() {
            // The kernel would choose a name that nobody knows (`man 7 unix`, autobind).
            return Err(Error::new(ErrorKind::InvalidInput, "listen at", "a path that is empty"));
        }
        let listener = Listener::bind(&path).map_err(|error| {
            let failed = Error::io(&error, "listen at", path.display());
            match error.kind() {
                std::io::ErrorKind::AddrInUse => {
                    failed.with_advice("remove it if no server uses it")
                }
                _ => failed,
            }
        })?;
        let generation = fork::generation();
        let limits = ClientLimits::default();
        Ok(Self { listener, path, device, limits, queues: false, generation })
    }

    /// Sets the limits for each client.
    pub fn with_limits(mut self, limits: impl Into<ClientLimits>) -> Self {
        self.limits = limits.into();
        self
    }

    /// Lets clients wait while another one is served, and serves them in their order. Without this, the server
    /// replies to their first command with EBUSY and disconnects them.
    pub fn with_queue(mut self) -> Self {
        self.queues = true;
        self
    }

    /// Waits for a client without a limit, until [`stop`](Self::stop) is called; and serves it until it leaves.
    ///
    /// # Errors
    /// `Malformed` if the client broke the protocol, `Gone` if it left or stopped in the middle of a message; those of
    /// accepting a client, a tenth of a second later. The server can serve the next client, unless it
    /// [is stopped](Self::is_stopped): then it is `Gone`.
    pub fn serve(&self) -> Result<()> {
        let failed = |error| {
            if self.is_stopped() {
                return Error::new(ErrorKind::Gone, "accept a client at", self.path.display())
                    .with_reason("the server was stopped");
            }
            Error::io(&error, "accept a client at", self.path.display())
        };
        let stream = self.listener.accept().map_err(failed)?;
        if self.queues {
            return Self::serve_stream(&self.device, stream, self.limits);
        }
        let end = Event::new().map_err(failed)?;
        let session = Self::session(&self.device, stream, self.limits)?;
        let (served, time) = (session.stream(), within_reason(self.limits.time));
        thread::scope(|scope| {
            let _end = AtTheEnd(&end);
            let thread = thread::Builder::new().name("vfio-user busy".to_owned());
            let refuse_others = || self.listener.refuse_until(&served, &end, time);
            if let Err(error) = thread.spawn_scoped(scope, refuse_others) {
                log::warn!("other clients are not refused: {error}");
            }
            Self::run(&self.device, session)
        })
    }

    /// Lets no client connect any more, and disconnects those that are not served. [`serve`](Self::serve) returns in
    /// all threads; one that serves a client does so until it leaves.
    pub fn stop(&self) {
        self.listener.close();
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.listener.is_closed()
    }

    /// Serves a client on a connected socket.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn serve_stream(
        device: &Emulated,
        stream: UnixStream,
        limits: impl Into<ClientLimits>,
    ) -> Result<()> {
        Self::run(device, Self::session(device, stream, limits.into())?)
    }

    fn session(device: &Emulated, stream: UnixStream, limits: ClientLimits) -> Result<Session<'_>> {
        let limits = ClientLimits { time: within_reason(limits.time), ..limits };
        Session::new(device, stream, limits)
            .map_err(|error| Error::io(&error, "serve", client_of(device)))
    }

    fn run(device: &Emulated, mut session: Session<'_>) -> Result<()> {
        session.run().map_err(|fault| {
            let kind = match fault {
                Fault::Malformed(_) => ErrorKind::Malformed,
                Fault::Closed { .. } | Fault::Silent(_) => ErrorKind::Gone,
                Fault::Os(errno) => return Error::os(errno, "serve", client_of(device)),
            };
            Error::new(kind, "serve", client_of(device)).with_reason(fault.to_string())
        })
    }
}

fn client_of(device: &Emulated) -> String {
    format!("a client of {}", device.info().name)
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // In a child of fork(2): the parent still listens.
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
        self.listener.close();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({} at {})", self.device.info().name, self.path.display())
    }
}
