//! Compares the example `nvme`, a driver in user space, with the kernel's driver under fio: alternately, in
//! one boot, on the same device.
//!
//! It runs only in the lab (`cargo lab bench nvme`), which provides fio, the example and the kernel's
//! modules, and reads the rows that this prints.

#[path = "common/guest.rs"]
mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use vfio_remap::transport::PciDevice;

use guest::{Result, lab_device, load_modules, output, sysfs_of};

/// The paths of the example and of modules that are not loaded yet, in the lab's guest.
const EXAMPLE: &str = "/lab/examples/nvme";
const MODULES: &str = "/lab/on-demand";

/// How long the kernel's driver may take to find its namespaces.
const TIME_LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Options {
    /// How often each contender runs.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How long each run lasts.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// Leave out writes, smaller blocks, and other ways of completion.
    #[arg(long)]
    brief: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one thread does, as often as possible.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    block_size: u32,
    depth: u32,
}

/// The program that does it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Contender {
    /// The kernel's driver, under fio with io_uring and default options.
    Kernel,
    /// The same, with fio's options for speed.
    KernelTuned,
    /// The same, and the kernel polls for completions.
    KernelPolled,
    Driver,
    DriverInterrupts,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::KernelTuned => "kernel-tuned",
            Self::KernelPolled => "kernel-polled",
            Self::Driver => "driver",
            Self::DriverInterrupts => "driver-interrupts",
        }
    }

    fn is_kernel(self) -> bool {
        !matches!(self, Self::Driver | Self::DriverInterrupts)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if std::env::var_os("LAB_DEVICES").is_none() {
        println!("nvme: this benchmark needs the lab's devices; run it with: cargo lab bench nvme");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("nvme: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let runs = runs(options.brief);
    load_nvme()?;
    for name in ["nvme4k", "nvme"] {
        give_to_kernel(&lab_device(name)?)?;
    }
    for round in 1..=options.rounds {
        println!("round {round} of {}", options.rounds);
        for name in ["nvme4k", "nvme"] {
            let device = lab_device(name)?;
            let ours = runs.iter().copied().filter(|(load, _)| device_of(*load) == name);
            let (kernel, driver): (Vec<_>, Vec<_>) =
                ours.partition(|(_, contender)| contender.is_kernel());
            if kernel.is_empty() {
                continue;
            }
            let namespace = namespace(&device)?;
            for (load, contender) in kernel {
                report(load, contender, fio(&namespace, load, contender, options.seconds)?);
            }
            let binding = device.bind_vfio_pci()?;
            for (load, contender) in driver {
                report(load, contender, example(&device, load, contender, options.seconds)?);
            }
            binding.restore()?;
        }
    }
    Ok(())
}

/// The runs of each round.
fn runs(brief: bool) -> Vec<(Load, Contender)> {
    use Contender::{Driver, DriverInterrupts, Kernel, KernelPolled, KernelTuned};
    let mut runs = Vec::new();
    for depth in [1, 32] {
        let mut add = |write, block_size, contenders: &[Contender]| {
            let load = Load { write, block_size, depth };
            runs.extend(contenders.iter().map(|contender| (load, *contender)));
        };
        if brief {
            add(false, 4096, &[Kernel, Driver]);
            continue;
        }
        add(false, 4096, &[Kernel, KernelTuned, KernelPolled, Driver, DriverInterrupts]);
        add(true, 4096, &[Kernel, Driver]);
        add(false, 512, &[Kernel, Driver]);
    }
    runs
}

/// The lab's device with blocks of the load's size.
fn device_of(load: Load) -> &'static str {
    if load.block_size == 4096 { "nvme4k" } else { "nvme" }
}

/// Prints a row for the lab.
fn report(load: Load, contender: Contender, iops: f64) {
    let Load { write, block_size, depth } = load;
    let operation = if write { "write" } else { "read" };
    println!("row\t{operation}\t{block_size}\t{depth}\t{}\t{iops:.0}", contender.name());
}

fn fio(namespace: &Path, load: Load, contender: Contender, seconds: u32) -> Result<f64> {
    let mut command = Command::new("fio");
    command
        .args(["--name=nvme", "--ioengine=io_uring", "--direct=1", "--numjobs=1", "--thread"])
        .args(["--time_based", "--ramp_time=500ms", "--output-format=json"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--filename={}", namespace.display()))
        .arg(format!("--rw={}", if load.write { "randwrite" } else { "randread" }))
        .arg(format!("--bs={}", load.block_size))
        .arg(format!("--iodepth={}", load.depth));
    if contender != Contender::Kernel {
        command.args(["--fixedbufs", "--registerfiles", "--norandommap", "--gtod_reduce=1"]);
    }
    if contender == Contender::KernelPolled {
        command.arg("--hipri");
    }
    let said = output(&mut command)?;
    let report: serde_json::Value = serde_json::from_str(from_brace(&said)?)?;
    let side = &report["jobs"][0][if load.write { "write" } else { "read" }];
    side["iops"].as_f64().ok_or_else(|| format!("fio reports no IOPS: {said}").into())
}

fn example(device: &PciDevice, load: Load, contender: Contender, seconds: u32) -> Result<f64> {
    let mut command = Command::new(EXAMPLE);
    command
        .args(["bench", "--namespace=1", "--threads=1", "--json"])
        .arg(format!("--device={}", device.address()))
        .arg(format!("--depth={}", load.depth))
        .arg(format!("--block-size={}", load.block_size))
        .arg(format!("--seconds={seconds}"));
    if load.write {
        command.args(["--read-percent=0", "--yes-destroy-data"]);
    } else {
        command.arg("--read-percent=100");
    }
    if contender == Contender::DriverInterrupts {
        command.arg("--interrupts");
    }
    let said = output(&mut command)?;
    let report: serde_json::Value = serde_json::from_str(from_brace(&said)?)?;
    report["iops"].as_f64().ok_or_else(|| format!("the example reports no IOPS: {said}").into())
}

/// The JSON in an output, which may begin with warnings.
fn from_brace(said: &str) -> Result<&str> {
    let start = said.find('{').ok_or_else(|| format!("the output is not JSON: {said}"))?;
    Ok(&said[start..])
}

/// Loads the kernel's NVMe driver and its dependencies, with a queue for polling.
fn load_nvme() -> Result<()> {
    load_modules(MODULES, "-nvme.ko", Some("poll_queues=1"))
}

/// Unbinds a device from vfio-pci, and binds it to the kernel's NVMe driver.
fn give_to_kernel(device: &PciDevice) -> Result<()> {
    let address = device.address().to_string();
    let sysfs = sysfs_of(device);
    fs::write(sysfs.join("driver_override"), "nvme")?;
    fs::write(sysfs.join("driver/unbind"), &address)?;
    fs::write("/sys/bus/pci/drivers_probe", &address)?;
    namespace(device).map(drop)
}

/// Waits until the kernel's driver has found the first namespace, and returns its block device.
fn namespace(device: &PciDevice) -> Result<PathBuf> {
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        if let Some(found) = find_namespace(device) {
            return Ok(found);
        }
        if Instant::now() > deadline {
            return Err(format!("the kernel finds no namespace of {}", device.address()).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn find_namespace(device: &PciDevice) -> Option<PathBuf> {
    let controller = fs::read_dir(sysfs_of(device).join("nvme")).ok()?.next()?.ok()?;
    let mut entries = fs::read_dir(controller.path()).ok()?.flatten();
    let namespace = entries.find_map(|entry| block_device(entry.file_name().to_str()?))?;
    let node = Path::new("/dev").join(namespace);
    node.exists().then_some(node)
}

/// The name of the block device for a namespace's entry in sysfs. With several paths
/// (`CONFIG_NVME_MULTIPATH`) the entry also names the path: `nvme0c1n1`.
fn block_device(entry: &str) -> Option<String> {
    let (controller, namespace) = entry.strip_prefix("nvme")?.split_once('n')?;
    let subsystem = controller.split('c').next()?;
    Some(format!("nvme{subsystem}n{namespace}"))
}
