//! Serves an emulated device to vfio-user clients, one after another, until it is killed.
//!
//! `cargo run --example serve -- edu --socket /tmp/edu.sock`, then, for example, `qemu-system-x86_64 … -device
//! '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/edu.sock"}}'`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vfio_remap::emulated::{Edu, Emulated, Namespace, Nvme, Server};
use vfio_remap::transport::Transport;
use vfio_remap::{Error, ErrorKind, Result};

/// Serves an emulated device to vfio-user clients, one after another.
#[derive(Parser)]
struct Options {
    /// The device
    model: Model,
    /// The socket to create; the path must not exist
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The file for the first namespace of nvme, in blocks of 512 bytes [default: 64 MiB of memory]
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    /// QEMU's educational device: registers, interrupts, DMA
    Edu,
    /// An NVMe controller with two namespaces, the second with 64 MiB in blocks of 4096 bytes
    Nvme,
}

fn main() -> ExitCode {
    let Err(error) = serve(&Options::parse());
    eprintln!("serve: {error}");
    ExitCode::FAILURE
}

fn nvme(file: Option<&Path>) -> Result<Nvme> {
    const SIZE: u64 = 64 << 20;
    let first = match file {
        None => Namespace::memory(SIZE, 512)?,
        Some(path) => {
            let file = File::options().read(true).write(true).open(path).map_err(|error| {
                let name = path.display();
                Error::new(ErrorKind::Os, "open", name).with_reason(error.to_string())
            })?;
            Namespace::file(file, 512)?
        }
    };
    Ok(Nvme::new(vec![first, Namespace::memory(SIZE, 4096)?]))
}

fn serve(options: &Options) -> Result<std::convert::Infallible> {
    let device = match options.model {
        Model::Edu => Emulated::new(Edu::new())?,
        Model::Nvme => Emulated::new(nvme(options.file.as_deref())?)?,
    };
    let name = device.info().name;
    let server = Server::bind(&options.socket, device)?;
    println!("{name} is served at {}", options.socket.display());
    loop {
        if let Err(error) = server.serve() {
            eprintln!("serve: {error}");
        }
    }
}
