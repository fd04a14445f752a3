//! `cargo lab`: boots real kernels with real VFIO in QEMU and runs the
//! crate's tests, examples and benchmarks in them.
//!
//! The commands are [`mod@test`], [`vfio_user`], [`vmm`], [`mod@fuzz`], [`sanitize`], [`soak`], [`hazard`],
//! [`matrix`], [`mutants`], [`targets`], [`release`], [`performance`], [`ethernet`] and this file. [`boot`] makes one
//! boot of one kernel, with its [`heartbeat`]; [`side_by_side`] makes several. [`kernels`],
//! [`patched`], [`busybox`], [`mod@program`], [`payload`], [`compiler`] and [`guest`] provide the software of
//! a guest, [`machine`] and [`root`] its machine. [`huge_pages`] reserves memory for one. [`klog`], [`libtest`] and [`report`]
//! evaluate the result.

#![forbid(unsafe_code)]

mod apt;
mod block_stats;
mod boot;
mod busybox;
mod cache;
mod cards;
mod chart;
mod command;
mod compiler;
mod cpio;
mod decompress;
mod estimate;
mod ethernet;
mod fuzz;
mod guest;
mod hazard;
mod heartbeat;
mod host;
mod huge_pages;
mod kernels;
mod klog;
mod libtest;
mod machine;
mod matrix;
mod modules;
mod mutants;
mod patched;
mod payload;
mod performance;
mod processors;
mod program;
mod qemu;
mod release;
mod report;
mod root;
mod samples;
mod sanitize;
mod side_by_side;
mod soak;
mod targets;
mod test;
mod tools;
mod turns;
mod ui;
mod vfio_user;
mod vmm;

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use clap::{Args, Parser, Subcommand};

use boot::{Ending, Lab, Show};
use cache::Store;
use guest::Payload;
use hazard::Hazard;
use kernels::{Kernel, NEWEST};
use machine::Variant;
use mutants::{MUTANTS, Mutant};
use root::Root;
use tools::Need;
use vmm::Extent;

/// Boots stock kernels and a patched one with VFIO and an IOMMU in QEMU, and
/// runs vfio-remap's tests, examples and benchmarks in them.
#[derive(Parser)]
#[command(bin_name = "cargo lab", after_help = after_help())]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run the tests: those of the host, then those that need a kernel with
    /// VFIO, in each kernel.
    ///
    /// Some tests run in additional boots. Those with `without_iommu` in their names run
    /// in the newest and the patched kernel, on a machine without an IOMMU; those with
    /// `acpi_hotplug` in each kernel, on a machine with hotplug by ACPI instead of pciehp;
    /// those with `without_intremap` in the newest kernel, on a machine whose IOMMU does
    /// not remap interrupts; the tests of the kernel patches in the patched kernel. In
    /// the newest kernel the examples tour, edu, unplug, nvme and nic run on devices of the machine.
    /// The commands `vfio-user` and `vmm` run too; of `vmm` what is brief, on 6.12 and patched.
    ///
    /// Two guests run at the same time, while other kernels are fetched or built. The
    /// output of a guest is shown when it has ended. Fails if a test fails, or if a kernel
    /// logs a warning or an error while the tests run.
    Test {
        /// Only the guest tests, in this kernel; may be given several times.
        #[arg(long = "kernel", value_name = "NAME", value_parser = kernels::by_name)]
        kernels: Vec<&'static Kernel>,
        /// Only the tests that need no guest.
        #[arg(long, conflicts_with = "kernels")]
        host_only: bool,
        #[command(flatten)]
        common: Common,
        /// Arguments for the guest tests, for example a part of a test's name.
        #[arg(last = true, value_name = "LIBTEST-ARGS")]
        libtest: Vec<String>,
    },
    /// Test the emulated NVMe controller and network card with the kernel's own drivers, through
    /// QEMU's vfio-user-pci. Part of `test`.
    ///
    /// Its igb driver pings, gets and echoes, and its statistics have to be those of the wire. Its
    /// nvme driver makes, writes and checks file systems. That guest's memory is first a memfd,
    /// then a memfd of huge pages, then a file on a disk. For the second, 256 pages of 2 MiB are
    /// reserved and given back.
    VfioUser {
        /// Boot so many guests with a disk instead, one after another, with the same server.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        starts: Option<u32>,
        /// The kernel with the driver.
        #[arg(long, value_name = "NAME", default_value = NEWEST, value_parser = kernels::by_name)]
        kernel: &'static Kernel,
        #[command(flatten)]
        common: Common,
    },
    /// Test the example `vmm`: guests inside a guest use devices that are passed through, and
    /// move their BARs. In part in `test`.
    ///
    /// The guests run Linux 6.12 with its own drivers for an NVMe controller and an e1000e, on
    /// one processor and on two. The lab guests, which are their hosts, run 6.12, newest and
    /// patched. The KVM of this machine is not used, and need not exist: the emulator has its own.
    Vmm {
        /// Only on this kernel; may be given several times.
        #[arg(long = "kernel", value_name = "NAME", value_parser = kernels::by_name)]
        kernels: Vec<&'static Kernel>,
        /// Only the guests with two processors, and fewer moves of most BARs, as in `test`.
        #[arg(long)]
        brief: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Fuzz what is not trusted: messages of vfio-user, a guest's accesses to a device, a network
    /// card under its driver, and a driver of the card's model. Part of `test`.
    Fuzz {
        /// How long to fuzz.
        #[arg(long, value_name = "SECONDS", default_value_t = fuzz::SECONDS,
              value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
    },
    /// Run what takes too long for `test`: a minute each of races of moves and of duplicates with
    /// revocation in the patched kernel, twenty guests one after another at one vfio-user server, all of
    /// `vmm`, two thousand faults of network cards, a million rounds of handlers of SIGBUS
    /// against verbs, devices that are taken away a thousand times and removed forty times in
    /// each kernel, `sanitize`, and ten million runs of each fuzz target.
    Soak {
        /// Only the devices that are taken away and removed, in this kernel; may be given several
        /// times.
        #[arg(long = "kernel", value_name = "NAME", value_parser = kernels::by_name)]
        kernels: Vec<&'static Kernel>,
        #[command(flatten)]
        common: Common,
    },
    /// Run the tests of revocation and of the handler of SIGBUS with AddressSanitizer and with
    /// ThreadSanitizer. Part of `soak`.
    Sanitize,
    /// Check that tests can fail: apply one mutation at a time to a copy of the repository,
    /// and check that a named test fails. Without a name, all mutations.
    ///
    /// Fails if a mutant survives, or if its test fails without it.
    Mutants {
        /// A mutant of lab/src/mutants/list.rs.
        #[arg(value_parser = mutants::by_name)]
        names: Vec<&'static Mutant>,
        #[command(flatten)]
        common: Common,
    },
    /// Check that the crate compiles with musl and for aarch64, with and without its
    /// features, and that it fails with one clear error for other targets.
    ///
    /// Fetches Debian's compiler and its sources once (150 MB), and builds the standard
    /// library of each target, which takes some minutes the first time.
    Targets {
        #[command(flatten)]
        mirror: Mirror,
    },
    /// Check that the packages can be published: each is packed and built from that, and built with
    /// the oldest dependencies that its manifest allows.
    Release {
        /// Report, too, how the API differs from that of this commit. Needs cargo-semver-checks.
        #[arg(long, value_name = "COMMIT")]
        baseline: Option<String>,
    },
    /// Run an example in a guest; its exit status becomes the lab's.
    Run {
        /// The kernel to run it in.
        #[arg(long, value_name = "NAME", default_value = NEWEST, value_parser = kernels::by_name)]
        kernel: &'static Kernel,
        #[command(flatten)]
        common: Common,
        /// The example and its arguments. @DEVICE is replaced by the device's PCI
        /// address.
        #[arg(last = true, required = true, value_names = ["EXAMPLE", "ARGS"])]
        command: Vec<String>,
    },
    /// Show a hazard of a kernel: run its reproducer, and print what it saw and what the
    /// kernel logged. Without a name, list all hazards.
    ///
    /// Fails if the hazard is not observed.
    Hazard {
        /// The hazard.
        #[arg(value_parser = hazard::by_name)]
        name: Option<&'static Hazard>,
        /// The kernel to show it on. By default the last one in the list of the hazard.
        #[arg(long, value_name = "NAME", value_parser = kernels::by_name, requires = "name")]
        kernel: Option<&'static Kernel>,
        #[command(flatten)]
        common: Common,
    },
    /// Find out which strategy each verb uses on each kernel, and write
    /// docs/kernel-matrix.md.
    Matrix {
        #[command(flatten)]
        common: Common,
    },
    /// Run a benchmark in a guest.
    ///
    /// `nvme` compares the example `nvme` with the kernel's driver under fio, and writes
    /// docs/performance.md. It fails if the example does not reach its targets: processor
    /// time per command as a multiple of the kernel's. It takes less than eight minutes.
    ///
    /// `nic` compares the Ethernet driver with DPDK and with the kernel, and writes
    /// docs/ethernet.md. It fails if the driver needs more processor time for a frame than
    /// DPDK does, or sends fewer. It takes less than eight minutes.
    Bench {
        /// The benchmark.
        name: String,
        /// The kernel to run it in. By default newest, and for nvme and nic 6.1.
        #[arg(long, value_name = "NAME", value_parser = kernels::by_name)]
        kernel: Option<&'static Kernel>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Args)]
struct Mirror {
    /// Fetch packages from this mirror, not from that of the machine's apt
    /// configuration.
    #[arg(long = "mirror", value_name = "URL", env = "LAB_MIRROR")]
    url: Option<String>,
}

#[derive(Args)]
struct Common {
    #[command(flatten)]
    mirror: Mirror,
    /// The time limit of a boot.
    #[arg(long, value_name = "MINUTES", default_value_t = 20)]
    timeout: u64,
}

fn after_help() -> String {
    let mut help = "Kernels:\n".to_owned();
    for kernel in kernels::all() {
        help += &format!("  {:<11} {}\n", kernel.name, kernel.about);
    }
    help += "\nDevices:\n";
    for device in &machine::DEVICES {
        help += &format!("  {:<11} {} ({})\n", device.name, device.about, device.driver);
    }
    help += &format!(
        "\nExamples:
  cargo lab test
  cargo lab test --kernel 6.12 -- relocate
  cargo lab run --kernel 5.10 -- tour --device @ivshmem64m
  cargo lab hazard gib_entry_corruption --kernel 6.12

A program in a guest runs as root. It finds the devices' addresses in
LAB_DEVICES (\"nvme=0000:00:03.0 e1000e=...\"), the kernel's name in LAB_KERNEL,
and in LAB_IOMMU whether there is an IOMMU: 1 or 0.

QEMU and kernels are fetched or built once and kept in {}.
Kernel logs and outputs of the last boots are in target/lab/logs.",
        cache::LOCATION
    );
    help
}

fn main() -> ExitCode {
    // Returning the error from `main` would print a backtrace of the lab, which does not
    // help: errors are about the machine or the user's code.
    perform(Cli::parse().command).unwrap_or_else(|error| {
        ui::error(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Test { kernels, host_only, common, libtest } => {
            // All needs are checked first: a missing program that is found later would
            // waste the time until then.
            tools::ensure(&test::needs(&kernels, host_only, common.mirror.url.clone())?)?;
            let guests = if host_only { Vec::new() } else { test::selected(&kernels) };
            let store = Store::open(common.mirror.url.clone())?;
            estimate::print(&store, &guests, kernels.is_empty())?;
            if kernels.is_empty() {
                // The longest job begins first.
                kernels::build_ahead(&store, &guests)?;
                host::test()?;
                fuzz::briefly()?;
            }
            if host_only {
                return Ok(ExitCode::SUCCESS);
            }
            let (lab, store) = ready(common)?;
            let all = kernels.is_empty() && libtest.is_empty();
            let passed = test::guest(&lab, &store, &guests, &libtest, all)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::VfioUser { starts, kernel, common } => {
            kernel.must_have_nvme("vfio-user")?;
            let (lab, store) = ready(common)?;
            let passed = match starts {
                None => vfio_user::test(&lab, &store, kernel)?,
                Some(count) => vfio_user::starts(&lab, &store, kernel, count)?,
            };
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Vmm { kernels, brief, common } => {
            let (lab, store) = ready(common)?;
            let extent = if brief { Extent::Brief } else { Extent::Long };
            let passed = vmm::run(&lab, &store, &kernels, extent)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Fuzz { seconds } => {
            let passed = fuzz::run(fuzz::Limit::Time(Duration::from_secs(seconds)))?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Soak { kernels, common } => {
            let (lab, store) = ready(common)?;
            let passed = match kernels.as_slice() {
                [] => soak::run(&lab, &store)?,
                some => soak::outages(&lab, &store, some)?,
            };
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Sanitize => {
            let passed = sanitize::run()?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Mutants { names, common } => {
            let chosen = if names.is_empty() { MUTANTS.iter().collect() } else { names };
            let guests = match mutants::need_guests(&chosen) {
                true => {
                    let (lab, store) = ready(common)?;
                    Some((Lab { show: Show::Never, ..lab }, store))
                }
                false => None,
            };
            let killed = mutants::run(&chosen, guests.as_ref())?;
            Ok(if killed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Release { baseline } => {
            let passed = release::run(baseline.as_deref())?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Targets { mirror } => {
            let passed = targets::run(&Store::open(mirror.url)?)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Run { kernel, common, command } => {
            let (name, arguments) = command.split_first().context("clap wants an example")?;
            let arguments = arguments
                .iter()
                .map(|argument| machine::with_addresses(argument))
                .collect::<Result<Vec<_>>>()?;
            run(kernel, common, &payload::example(name)?, &arguments, name)
        }
        Task::Hazard { name: None, .. } => {
            print!("{}", hazard::list());
            Ok(ExitCode::SUCCESS)
        }
        Task::Hazard { name: Some(hazard), kernel, common } => {
            let (lab, store) = ready(common)?;
            let last = hazard.kernels.last().context("a hazard concerns some kernel")?;
            let kernel = kernel.map_or_else(|| kernels::by_name(last), Ok);
            let shown = hazard::show(&lab, &store, hazard, kernel.map_err(Error::msg)?)?;
            Ok(if shown { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Matrix { common } => {
            let (lab, store) = ready(common)?;
            matrix::write(&lab, &store)?;
            Ok(ExitCode::SUCCESS)
        }
        Task::Bench { name, kernel, common } if name == "nvme" => {
            let kernel = kernel.map_or_else(|| kernels::by_name(performance::KERNEL), Ok);
            let kernel = kernel.map_err(Error::msg)?;
            kernel.must_have_nvme("bench nvme")?;
            let (lab, store) = ready(common)?;
            let reached = performance::write(&lab, &store, kernel)?;
            Ok(if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Bench { name, kernel, common } if name == "nic" => {
            let kernel = kernel.map_or_else(|| kernels::by_name(ethernet::KERNEL), Ok);
            let (lab, store) = ready(common)?;
            let reached = ethernet::write(&lab, &store, kernel.map_err(Error::msg)?)?;
            Ok(if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Bench { name, kernel, common } => {
            let kernel = kernel.map_or_else(|| kernels::by_name(NEWEST), Ok);
            let kernel = kernel.map_err(Error::msg)?;
            let program = payload::benchmark(&name)?;
            run(kernel, common, &program, &["--bench".to_owned()], &name)
        }
    }
}

/// Prepares what all boots need.
fn ready(common: Common) -> Result<(Lab, Store)> {
    let store = Store::open(common.mirror.url)?;
    tools::ensure(&[Need::Booting])?;
    let lab = Lab {
        root: Root::ensure(&store)?,
        busybox: busybox::path(&store)?,
        logs: payload::logs(),
        timeout: Duration::from_secs(common.timeout * 60),
        show: Show::AtOnce,
        rounds: rounds()?,
    };
    Ok((lab, store))
}

/// What the environment says of rounds in guests: see [`guest::ROUNDS`].
fn rounds() -> Result<u32> {
    match env::var(guest::ROUNDS) {
        Ok(rounds) => rounds.parse().with_context(|| format!("{} is no number", guest::ROUNDS)),
        Err(_) => Ok(1),
    }
}

/// Runs one program in one guest, and returns its exit status.
fn run(
    kernel: &'static Kernel,
    common: Common,
    program: &Path,
    arguments: &[String],
    name: &str,
) -> Result<ExitCode> {
    let (lab, store) = ready(common)?;
    let Some(image) = kernel.image(&store)? else {
        bail!("the mirror does not have kernel {} any more", kernel.name);
    };
    let payload = Payload { program, arguments, files: &[] };
    let outcome = lab.boot(&image, Variant::Usual, &payload, &format!("{}-{name}", kernel.name))?;
    let complaints = outcome.complaints();
    let log = format!("the kernel log is {}", outcome.log_path.display());
    let Ending::Exited(status) = outcome.ending else {
        bail!("{complaints}{log}");
    };
    if !complaints.is_empty() {
        ui::warning(&format!("{complaints}{log}"));
    }
    Ok(ExitCode::from(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_help_are_valid() {
        let help = after_help();
        let examples: Vec<_> =
            help.lines().filter_map(|line| line.strip_prefix("  cargo lab ")).collect();
        assert!(examples.len() >= 4, "{examples:?}");
        for example in examples {
            let words = ["cargo lab"].into_iter().chain(example.split(' '));
            let parsed = Cli::try_parse_from(words);
            assert!(parsed.is_ok(), "{example}: {}", parsed.err().unwrap());
        }
    }
}
