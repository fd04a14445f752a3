//! The command line.

use std::path::PathBuf;

use clap::Parser;

use crate::memory::{LEAST, MOST};

/// Runs a Linux guest that drives passed-through PCI devices.
///
/// The guest's console is the serial port: standard input and output. The program ends when the guest reboots,
/// powers off or halts, or when it gets SIGTERM or SIGINT. Standard error has the reason, and the
/// report of each move of a BAR.
#[derive(Parser)]
#[command(name = "vmm", after_help = EXAMPLES)]
pub struct Options {
    /// The kernel: an uncompressed ELF file (vmlinux) or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The guest's memory, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(LEAST..=MOST))]
    pub memory: u64,
    /// The number of processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub cpus: u8,
    /// A device for the guest, any number of times: the PCI address of one that is bound to vfio-pci, vfio-user:PATH
    /// of a server's socket, emulated:nvme or emulated:edu
    #[arg(long = "device", value_name = "DEVICE")]
    pub devices: Vec<String>,
    /// Added to the kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub append: String,
}

const EXAMPLES: &str = "Examples:
  vmm --kernel vmlinux --initrd initramfs
  vmm --kernel vmlinux --initrd initramfs --cpus 2 --memory 512 \\
      --device 0000:03:00.0 --device vfio-user:/tmp/nvme.sock --device emulated:nvme

A PCI device must be bound to vfio-pci, with all others of its IOMMU group that have a driver.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }
}
