//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Drives an NVMe controller from user space.
///
/// The controller is taken over whole: it is reset at the beginning and shut down at the end, and no
/// other driver may hold it.
#[derive(Parser)]
#[command(name = "nvme")]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub task: Task,
}

/// What all commands have in common; may stand before or after the command.
#[derive(Args)]
pub struct Common {
    /// emulated:nvme, vfio-user:PATH of a server's socket, or the PCI address of a controller bound to
    /// vfio-pci, such as 0000:00:03.0
    #[arg(long, global = true, value_name = "DEVICE", default_value = "emulated:nvme")]
    pub device: String,
    /// Which namespace of the controller
    #[arg(long, global = true, value_name = "N", default_value_t = 1)]
    pub namespace: u32,
    /// Print one JSON object, and no progress
    #[arg(long, global = true)]
    pub json: bool,
    /// Abort a command after this time, and reset the controller if that is in vain
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10)]
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
    /// Copy a file to blocks, and have them last.
    Write(Copy),
    /// Write a pattern with checksums to all blocks, and check that all hold it.
    Verify(Verify),
    /// Measure: random reads and writes, for a while, and the distribution of their latencies.
    ///
    /// Latency is taken of every 256th request of a thread: reading the clock costs more than a request
    /// does of this driver's time.
    Bench(Bench),
}

#[derive(Args)]
pub struct Copy {
    /// The file
    pub file: PathBuf,
    /// Where to begin in the namespace, in bytes: a multiple of its block
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub offset: u64,
    /// How much to copy [default: all of the namespace, or of the file]
    #[arg(long, value_name = "BYTES")]
    pub length: Option<u64>,
}

#[derive(Args)]
pub struct Verify {
    /// Note here how far the run has come, and go on from there if it was interrupted
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// What the pattern is made of [default: the time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Args)]
pub struct Bench {
    /// Requests that are with the controller at a time, for each thread
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub depth: usize,
    /// Bytes of a request: a multiple of the namespace's block
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    pub block_size: usize,
    /// How many of a hundred requests read; the others write
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(..=100))]
    pub read_percent: u8,
    /// For how long
    #[arg(long, value_name = "S", default_value_t = 3)]
    pub seconds: u64,
    /// Threads, each with a pair of queues and a doorbell window of its own
    #[arg(long, value_name = "T", default_value_t = 1)]
    pub threads: u16,
    /// Sleep until an interrupt (MSI-X), rather than poll for completions
    #[arg(long)]
    pub interrupts: bool,
}
