//! A device that is served to other processes.

use std::fmt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::device::Emulated;
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::transport::Transport;
use crate::transport::vfio_user::channel::{Fault, within_reason};

/// How long a client may take for the rest of a message, or to take one.
const TIME: Duration = Duration::from_secs(5);

/// Serves a device to vfio-user clients, one at a time: [`VfioUser`](crate::transport::VfioUser),
/// QEMU's `vfio-user-pci` (10.1 and newer), cloud-hypervisor, or any other that speaks version 0.1 of
/// the protocol.
///
/// Clients are not trusted: what they send is checked, what they share is read and written but never
/// mapped, and one that misbehaves is disconnected. They do share the device: one finds it as another
/// has left it.
///
/// ```no_run
/// use vfio_remap::transport::{Edu, Emulated, Server};
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
}

impl Server {
    /// Listens at `path`, where nothing may be yet; it is removed when the server is dropped.
    ///
    /// # Errors
    /// What the kernel answers; EADDRINUSE where something is there.
    pub fn bind(path: impl AsRef<Path>, device: Emulated) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let listener = UnixListener::bind(&path).map_err(|error| {
            let failed = Error::io(&error, "listen at", path.display());
            match error.kind() {
                std::io::ErrorKind::AddrInUse => failed.remedy("remove it if no server uses it"),
                _ => failed,
            }
        })?;
        Ok(Self { listener, path, device })
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
        Self::serve_stream(&self.device, stream, TIME)
    }

    /// Serves a client on a socket that is connected already. It may take as long as `time` for the
    /// rest of a message that it has begun, to take an answer, and to answer for memory that it does
    /// not share.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn serve_stream(device: &Emulated, stream: UnixStream, time: Duration) -> Result<()> {
        let object = || format!("a client of {}", device.info().name);
        let time = within_reason(time);
        let mut session = Session::new(device, stream, time)
            .map_err(|error| Error::io(&error, "serve", object()))?;
        session.run().map_err(|fault| {
            let kind = match fault {
                Fault::Nonsense(_) => ErrorKind::Malformed,
                Fault::Closed { .. } | Fault::Silent(_) => ErrorKind::Gone,
                Fault::Os(errno) => return Error::os(errno, "serve", object()),
            };
            Error::new(kind, "serve", object()).because(fault.to_string())
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
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
