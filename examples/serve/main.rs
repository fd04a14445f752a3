//! Serves an emulated device to vfio-user clients, one after another, until it gets SIGTERM or SIGINT.
//!
//! `cargo run --example serve -- edu --socket /tmp/edu.sock`, then for instance
//! `qemu-system-x86_64 … -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/edu.sock"}}'`.

#[macro_use]
#[path = "../common/say.rs"]
mod say;
mod namespace;
#[path = "../common/tap.rs"]
mod tap;
#[cfg(test)]
mod tests;
mod wire;

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, exit};
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use namespace::Spec;
use tokio::runtime;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use vfio_remap::emulated::igb::{Capture, Igb};
use vfio_remap::emulated::{Edu, Emulated, Nvme, Server};
use vfio_remap::transport::Transport;
use vfio_remap::{Error, ErrorKind, Result};
use wire::{Counted, Counts, Mac, WireSpec};

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
    /// A gigabit network card, an Intel 82576. When the program ends, it prints what has passed the wire
    Igb {
        #[command(flatten)]
        common: Common,
        /// What the card is connected to: udp:OURS,THEIRS, two addresses with ports, where each datagram is a
        /// frame, as for QEMU's "-netdev dgram"; or tap:NAME, a TAP interface of this machine; or stdin, a socket
        /// that keeps packets apart. Without this there is no cable
        #[arg(long, value_name = "WIRE")]
        wire: Option<WireSpec>,
        /// The card's address
        #[arg(long, value_name = "ADDRESS", default_value = "02:00:00:00:00:01")]
        mac: Mac,
        /// Write the frames that pass the wire to this file, for Wireshark or tcpdump
        #[arg(long, value_name = "FILE.pcap", requires = "wire")]
        capture: Option<PathBuf>,
        /// Print what has passed the wire as JSON
        #[arg(long)]
        json: bool,
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
      --namespace file:debian.img,read-only
  serve igb --socket /tmp/igb.sock --wire udp:127.0.0.1:5000,127.0.0.1:5001 \\
      --capture frames.pcap";

fn main() -> ExitCode {
    let Err(error) = serve(Options::parse());
    say::end("serve", Err(error))
}

fn serve(options: Options) -> Result<Infallible> {
    let mut at_the_end: Option<AtTheEnd> = None;
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
        Device::Igb { common, wire, mac, capture, json } => {
            let counts = Arc::new(Counts::default());
            let card = connected(Igb::new(mac.0), wire, capture, &counts)?;
            at_the_end = Some(Box::new(move || {
                say!("{}", if json { counts.json() } else { counts.to_string() });
            }));
            (Emulated::new(card)?, common)
        }
    };
    let name = device.info().name;
    let server = Server::bind(&common.socket, device)?;
    let server = if common.queue { server.with_queue() } else { server };
    remove_at_the_end(&common.socket, at_the_end).map_err(|error| {
        Error::new(ErrorKind::Os, "wait for", "signals").with_reason(error.to_string())
    })?;
    say!("{name} is served at {}", common.socket.display());
    loop {
        if let Err(error) = server.serve() {
            say::aside(format_args!("serve: {error}"));
        }
    }
}

/// The card at its wire, where what passes is counted.
fn connected(
    card: Igb,
    wire: Option<WireSpec>,
    capture: Option<PathBuf>,
    counts: &Arc<Counts>,
) -> Result<Igb> {
    let Some(wire) = wire else { return Ok(card) };
    let wire = Counted::new(wire.open()?, counts.clone());
    Ok(match capture {
        Some(path) => card.with_wire(Capture::create(wire, path)?),
        None => card.with_wire(wire),
    })
}

/// What is done before the process ends.
type AtTheEnd = Box<dyn FnOnce() + Send>;

/// Has the socket removed, and this process ended, when it gets SIGTERM or SIGINT.
fn remove_at_the_end(socket: &Path, first: Option<AtTheEnd>) -> io::Result<()> {
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
        if let Some(first) = first {
            first();
        }
        let removed = std::fs::remove_file(&socket)
            .map_err(|error| Error::from_io(error, "remove", socket.display()));
        exit(i32::from(say::end("serve", removed) != ExitCode::SUCCESS));
    })?;
    Ok(())
}
