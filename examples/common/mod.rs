//! Opens the devices of the examples: `emulated:edu`, `emulated:nvme`, `vfio-user:PATH`, or a PCI address.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{ClientLimits, Edu, Emulated, Nvme, Server};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Result};

/// The argument with which an example starts itself as the server of an emulated device.
pub const SERVE: &str = "--serve-emulated";

/// How long its first answer may take, for which it has to be started, and each other one.
const STARTED: Duration = Duration::from_secs(60);

/// A device, and the process that emulates it, if there is one.
pub struct Opened {
    pub device: Device,
    pub process: Option<Process>,
}

/// A process that serves an emulated device to this one. Dropping this ends it.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already, because its only client has left.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens the device that the user has named, and enables its memory decoding.
pub fn open(name: &str) -> Result<Opened> {
    if let Some(model) = name.strip_prefix("emulated:") {
        return emulated(model);
    }
    let device = match name.strip_prefix("vfio-user:") {
        Some(path) => Device::new(Arc::new(VfioUser::connect(path)?)),
        None => Device::open(name.parse::<PciAddress>()?)?,
    };
    device.config()?.set_memory_decoding(true)?;
    Ok(Opened { device, process: None })
}

/// If this process was started to serve a device, serves it to one client: the one at the other end of the socket that
/// is its standard input.
pub fn served() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().as_deref() != Some(OsStr::new(SERVE)) {
        return None;
    }
    let model = arguments.next()?;
    Some(match serve(&model) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "the server of {}: {error}", model.display());
            ExitCode::FAILURE
        }
    })
}

fn serve(model: &OsStr) -> Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = socket.map_err(|error| Error::from_io(error, "serve", model.display()))?;
    let device = match model.to_str() {
        Some("nvme") => Emulated::new(Nvme::new(vec![Namespace::memory(64 << 20, 512)?]))?,
        _ => Emulated::new(Edu::new())?,
    };
    Server::serve_stream(&device, UnixStream::from(socket), ClientLimits::default())
}

/// A device that another process serves. Nobody else reaches it: the socket has no name.
fn emulated(model: &str) -> Result<Opened> {
    if !["edu", "nvme"].contains(&model) {
        return Err(Error::new(ErrorKind::NotFound, "emulate", model)
            .with_advice("use emulated:edu or emulated:nvme"));
    }
    let failed = |error: io::Error| Error::from_io(error, "emulate", model);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let mut program = Command::new(std::env::current_exe().map_err(failed)?);
    program.args([SERVE, model]).stdin(OwnedFd::from(theirs));
    let mut process = Process(program.spawn().map_err(failed)?);
    // Its end of the socket is this process's, too, as long as there is the command.
    drop(program);
    let transport = VfioUser::from_stream(ours, STARTED);
    let transport = transport.map_err(|error| match error.kind() {
        // It has said why: its end of the socket is closed when it exits, and not before.
        ErrorKind::Gone => match process.0.wait() {
            Ok(status) => Error::new(ErrorKind::Gone, "emulate", model)
                .with_reason(format!("its server has ended: {status}")),
            Err(error) => failed(error),
        },
        _ => error,
    })?;
    Ok(Opened { device: Device::new(Arc::new(transport)), process: Some(process) })
}
