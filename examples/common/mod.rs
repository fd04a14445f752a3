//! Opens the devices of the examples: `emulated:edu`, `emulated:nvme`, `vfio-user:PATH`, or a PCI address.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Edu, Emulated, Nvme, Server};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Result};

/// The argument with which an example starts itself as the server of an emulated device.
pub const SERVE: &str = "--serve-emulated";

/// A device, and the process that emulates it, if there is one.
pub struct Opened {
    pub device: Device,
    pub process: Option<Process>,
}

/// A process that serves an emulated device to this one. Dropping this ends it.
pub struct Process {
    child: Child,
    socket: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already, because its only client has left.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
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

/// If this process was started to serve a device, serves it to one client.
pub fn served() -> Option<Result<()>> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().as_deref() != Some(OsStr::new(SERVE)) {
        return None;
    }
    let (model, socket) = (arguments.next()?, arguments.next()?);
    let device = match model.to_str() {
        Some("nvme") => Namespace::memory(64 << 20, 512)
            .and_then(|namespace| Emulated::new(Nvme::new(vec![namespace]))),
        _ => Emulated::new(Edu::new()),
    };
    Some(device.and_then(|device| Server::bind(Path::new(&socket), device)?.serve()))
}

fn emulated(model: &str) -> Result<Opened> {
    if !["edu", "nvme"].contains(&model) {
        return Err(Error::new(ErrorKind::NotFound, "emulate", model)
            .with_advice("use emulated:edu or emulated:nvme"));
    }
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Os, "emulate", model).with_reason(error.to_string())
    };
    let socket = std::env::temp_dir().join(format!("vfio-remap-{}.socket", std::process::id()));
    let program = std::env::current_exe().map_err(failed)?;
    let child = Command::new(program).args([SERVE, model]).arg(&socket).spawn().map_err(failed)?;
    let process = Process { child, socket };
    let deadline = Instant::now() + Duration::from_secs(5);
    let transport = loop {
        match VfioUser::connect(&process.socket) {
            // The server has not created the socket yet, or does not listen yet.
            Err(error)
                if [Some(libc::ENOENT), Some(libc::ECONNREFUSED)].contains(&error.errno())
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => break other?,
        }
    };
    Ok(Opened { device: Device::new(Arc::new(transport)), process: Some(process) })
}
