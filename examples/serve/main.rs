//! Serves an emulated device to vfio-user clients, one after another, until it gets SIGTERM or SIGINT.
//!
//! `cargo run --example serve -- edu --socket /tmp/edu.sock`, then for instance
//! `qemu-system-x86_64 … -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/edu.sock"}}'`.

mod namespace;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, exit};

use clap::{Args, Parser, Subcommand};
use namespace::Spec;
use tokio::runtime;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use vfio_remap::emulated::{Edu, Emulated, Nvme, Server};
use vfio_remap::transport::Transport;
use vfio_remap::{Error, ErrorKind, Result};

/// Serves an emulated device to vfio-user clients, one after another.
///
/// The socket is removed when the program gets SIGTERM or SIGINT.
#[derive(Parser)]
#[command(name = "serve", after_help = EXAMPLES)]
struct Options {
    #[command(subcommand)]
    device: Device,
}

#[derive(Subcommand)]
enum Device {
    /// QEMU's educational device: registers, interrupts, DMA
    Edu {
        #[command(flatten)]
        common: Common,
    },
    /// An NVMe controller
    Nvme {
        #[command(flatten)]
        common: Common,
        /// A namespace, numbered from 1 on in the order of these options:
        /// memory:SIZE or file:PATH, then any of ",block=512", ",block=4096", ",read-only" and, of a file,
        /// ",size=SIZE": it is made if it does not exist. A SIZE is in bytes, or ends in K, M, G or T.
        /// Blocks have 512 bytes if nothing is said [default: memory:64M memory:64M,block=4096]
        #[arg(long = "namespace", value_name = "NAMESPACE", verbatim_doc_comment)]
        namespaces: Vec<Spec>,
    },
}

#[derive(Args)]
struct Common {
    /// Where to listen; nothing may be there yet
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Have a client wait while another one is served; without this it is told that the device is busy
    #[arg(long)]
    queue: bool,
}

const EXAMPLES: &str = "Examples:
  serve edu --socket /tmp/edu.sock
  serve nvme --socket /tmp/nvme.sock --namespace file:/tmp/disk,size=1G
  serve nvme --socket /tmp/nvme.sock --namespace memory:64M,block=4096 \\
      --namespace file:debian.img,read-only";

fn main() -> ExitCode {
    let Err(error) = serve(Options::parse());
    eprintln!("serve: {error}");
    ExitCode::FAILURE
}

fn serve(options: Options) -> Result<Infallible> {
    let (device, common) = match options.device {
        Device::Edu { common } => (Emulated::new(Edu::new())?, common),
        Device::Nvme { common, namespaces } => {
            let namespaces = match namespaces.is_empty() {
                true => Spec::usual(),
                false => namespaces,
            };
            let namespaces = namespaces.iter().map(Spec::open).collect::<Result<_>>()?;
            (Emulated::new(Nvme::new(namespaces))?, common)
        }
    };
    let name = device.info().name;
    let server = Server::bind(&common.socket, device)?;
    let server = if common.queue { server.with_queue() } else { server };
    remove_at_the_end(&common.socket).map_err(|error| {
        Error::new(ErrorKind::Os, "wait for", "signals").with_reason(error.to_string())
    })?;
    println!("{name} is served at {}", common.socket.display());
    loop {
        if let Err(error) = server.serve() {
            eprintln!("serve: {error}");
        }
    }
}

/// Has the socket removed, and this process ended, when it gets SIGTERM or SIGINT.
fn remove_at_the_end(socket: &Path) -> io::Result<()> {
    let socket = socket.to_owned();
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(move || {
        runtime.block_on(async {
            select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        if let Err(error) = std::fs::remove_file(&socket) {
            eprintln!("serve: cannot remove {}: {error}", socket.display());
            exit(1);
        }
        exit(0);
    })?;
    Ok(())
}
