//! The command line.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use smoltcp::wire::Ipv4Cidr;
use vfio_remap_ethernet::MacAddress;

use crate::network::{NO_STATION, is_station};

/// Drives an Intel 82576 or 82574L network card from user space.
///
/// The tool uses the whole card: it resets it at the beginning and stops it at the end. A card that is bound to a
/// network driver of the kernel is bound to vfio-pci meanwhile, which requires root.
#[derive(Parser)]
#[command(name = "nic")]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub task: Task,
}

/// The options of all commands. They may come before or after the command.
#[derive(Args)]
pub struct Common {
    /// emulated:igb, vfio-user:PATH of a server's socket, or the PCI address of a card, such as 0000:00:03.0
    #[arg(long, global = true, value_name = "DEVICE", default_value = "emulated:igb")]
    pub device: String,
    /// Connect the emulated card to this TAP interface of this machine
    #[arg(long, global = true, value_name = "NAME")]
    pub tap: Option<String>,
    /// Print one JSON object, and no progress
    #[arg(long, global = true)]
    pub json: bool,
    /// The address of the card, such as 10.0.2.15/24 [default: ask by DHCP]
    #[arg(long, global = true, value_name = "ADDRESS/BITS", value_parser = network)]
    pub address: Option<Ipv4Cidr>,
    /// The router to other networks [default: as DHCP says]
    #[arg(long, global = true, value_name = "ADDRESS", requires = "address", value_parser = station)]
    pub gateway: Option<Ipv4Addr>,
    /// The DNS server [default: as DHCP says]
    #[arg(long, global = true, value_name = "ADDRESS", value_parser = station)]
    pub dns: Option<Ipv4Addr>,
    /// The longest packet in bytes, without the Ethernet header
    #[arg(long, global = true, value_name = "BYTES", default_value_t = 1500)]
    pub mtu: usize,
    /// How long to wait for the link, and then for an address by DHCP
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10)]
    pub link_timeout: u64,
    /// How long to wait for a station that does not answer
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// Use a card that carries traffic of this machine
    #[arg(long, global = true)]
    pub yes_take_it: bool,
}

#[derive(Subcommand)]
pub enum Task {
    /// Show the card, its link, and what it has counted.
    Info,
    /// Ping a station.
    Ping(Ping),
    /// Get a file by HTTP.
    Get(Get),
    /// Serve the files of a directory by HTTP.
    ///
    /// An emulated card has a client at the other end of its wire, which gets each file once.
    Serve(Serve),
    /// Pass frames between two cards, in both directions.
    ///
    /// Two emulated cards have a station at each end, and frames between them.
    Forward(Forward),
    /// Send frames, and measure how many a second.
    Generate(Generate),
    /// Write the frames that arrive to a file for Wireshark, whoever they are for.
    Capture(Capture),
}

#[derive(Args)]
pub struct Ping {
    /// An address or a host name [default: the router]
    pub host: Option<String>,
    /// How many pings to send
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    pub count: u16,
    /// How many bytes of data each has, at most 4000
    #[arg(long, short, value_name = "BYTES", default_value_t = 56)]
    pub size: usize,
    /// The time from one to the next
    #[arg(long, value_name = "MS", default_value_t = 200)]
    pub interval: u64,
}

#[derive(Args)]
pub struct Get {
    /// http://HOST[:PORT]/PATH [default: 16 MiB from the other end of the emulated card's wire]
    pub url: Option<String>,
    /// Write the content to this file
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Fail unless the content has this SHA-256 checksum
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
}

#[derive(Args)]
pub struct Serve {
    /// The directory
    pub directory: PathBuf,
    /// The TCP port
    #[arg(long, value_name = "PORT", default_value_t = 80, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// Stop after this many requests [default: serve until SIGINT or SIGTERM]
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,
}

#[derive(Args)]
pub struct Forward {
    /// Two cards, named as for --device [default: two emulated ones]
    #[arg(value_names = ["A", "B"], num_args = 2)]
    pub cards: Vec<String>,
    /// Stop after this time [default: 2 between emulated cards, else forward until SIGINT or SIGTERM]
    #[arg(long, value_name = "S")]
    pub seconds: Option<u64>,
    /// Frames that are received and sent at a time
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub burst: u16,
}

#[derive(Args)]
pub struct Generate {
    /// Sizes of frames in bytes, with the four bytes of Ethernet's checksum
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_values_t = [64, 256, 1518])]
    pub sizes: Vec<usize>,
    /// How many frames are given to the card at a time
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 4, 32])]
    pub bursts: Vec<u16>,
    /// The time for each size and burst
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub milliseconds: u64,
    /// Transmit queues, with a thread each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: u16,
    /// The Ethernet address that the frames are for
    #[arg(long, value_name = "MAC", default_value = "02:00:00:00:00:fe")]
    pub to: MacAddress,
}

#[derive(Args)]
pub struct Capture {
    /// The file; an existing one is replaced
    pub file: PathBuf,
    /// Stop after this many frames [default: capture until SIGINT or SIGTERM]
    #[arg(long, short, value_name = "N")]
    pub count: Option<u64>,
    /// Stop after this time
    #[arg(long, value_name = "S")]
    pub seconds: Option<u64>,
    /// How many bytes of a frame are written at most
    #[arg(long, value_name = "BYTES", default_value_t = 65_535)]
    #[arg(value_parser = clap::value_parser!(u32).range(14..=65_535))]
    pub snapshot_length: u32,
}

fn network(text: &str) -> Result<Ipv4Cidr, &'static str> {
    let network: Ipv4Cidr = text
        .parse()
        .map_err(|()| "an address and the length of its network, such as 10.0.2.15/24")?;
    if is_station(network.address()) { Ok(network) } else { Err(NO_STATION) }
}

fn station(text: &str) -> Result<Ipv4Addr, &'static str> {
    let address: Ipv4Addr = text.parse().map_err(|_| "an address such as 10.0.2.2")?;
    if is_station(address) { Ok(address) } else { Err(NO_STATION) }
}
