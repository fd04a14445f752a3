//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vfio_remap_nvme::Settings;

/// Drives an NVMe controller from user space.
///
/// The tool uses the whole controller: it resets it at the beginning and shuts it down at the end, and no other
/// driver may use it.
#[derive(Parser)]
#[command(name = "nvme")]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub task: Task,
}

/// The options of all commands. They may come before or after the command.
#[derive(Args)]
pub struct Common {
    /// emulated:nvme, vfio-user:PATH of a server's socket, or the PCI address of a controller bound to
    /// vfio-pci, such as 0000:00:03.0
    #[arg(long, global = true, value_name = "DEVICE", default_value = "emulated:nvme")]
    pub device: String,
    /// The namespace of the controller [default: 1; all of them for identify]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub namespace: Option<u32>,
    /// Print one JSON object and no progress
    #[arg(long, global = true)]
    pub json: bool,
    /// Abort a command after this time, and reset the controller if the abort fails
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Write to a device that is not emulated, or that holds a partition table or a file system
    #[arg(long, global = true)]
    pub yes_destroy_data: bool,
}

#[derive(Subcommand)]
pub enum Task {
    /// Show the controller, its namespaces, and its health.
    Identify,
    /// Copy blocks to a file.
    Read(Copy),
    /// Copy a file to blocks, and make them durable.
    Write(Copy),
    /// Write a pattern with checksums to all blocks, and check all of them.
    Verify(Verify),
    /// Measure random reads and writes, and the distribution of their latencies, for some time or until SIGINT or
    /// SIGTERM.
    ///
    /// The latency is measured for every 256th request of a thread, because reading the clock takes longer than
    /// the driver does for a request.
    Bench(Bench),
}

#[derive(Args)]
pub struct Copy {
    /// The file
    pub file: PathBuf,
    /// The start in the namespace, in bytes: a multiple of the block size
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub offset: u64,
    /// How much to copy [default: all of the namespace, or of the file]
    #[arg(long, value_name = "BYTES")]
    pub length: Option<u64>,
}

#[derive(Args)]
pub struct Verify {
    /// Save the progress in this file, and continue from it after an interruption
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// The seed of the pattern [default: the time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Args)]
pub struct Bench {
    /// Outstanding requests of each thread
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub depth: usize,
    /// The size of a request in bytes: a multiple of the namespace's block size
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    pub block_size: usize,
    /// The percentage of reads; the other requests write
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(..=100))]
    pub read_percent: u8,
    /// The duration
    #[arg(long = "seconds", value_name = "S", default_value = "3", value_parser = seconds)]
    pub time: Duration,
    /// The number of threads, each with its own pair of queues and doorbell window
    #[arg(long, value_name = "T", default_value_t = 1)]
    pub threads: u16,
    /// Wait for completions by interrupts (MSI-X) instead of polling
    #[arg(long)]
    pub interrupts: bool,
    /// With interrupts: poll for up to this many microseconds before sleeping, if completions come that fast
    #[arg(long, value_name = "US", default_value_t = Settings::DEFAULT.spin.as_micros() as u64)]
    pub spin: u64,
    /// Tell the controller after so many completions that they were taken [default: half of the queue]
    #[arg(long, value_name = "N")]
    pub acknowledge_after: Option<u16>,
    /// Keep each thread on a processor of its own, as far as there are enough
    #[arg(long)]
    pub pin: bool,
}

/// A time in seconds, which may be a fraction.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
