//! Compares the example `nvme`, a driver in user space, with the kernel's driver under fio: by turns, in one boot, on
//! the same device.
//!
//! It runs only in the lab (`cargo lab bench nvme`), which provides fio, the example and the kernel's modules,
//! measures what each turn uses, and reads the rows that this prints.

#[path = "common/guest.rs"]
mod guest;
#[path = "common/turn.rs"]
mod turn;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vfio_remap::transport::PciDevice;

use guest::{Result, lab_device, load_modules, sysfs_of};
use turn::Turns;

/// The paths of the example and of modules that are not loaded yet, in the lab's guest.
const EXAMPLE: &str = "/lab/examples/nvme";
const MODULES: &str = "/lab/on-demand";
/// The lab's device with blocks of 4096 bytes.
const DEVICE: &str = "nvme4k";

/// How long the kernel's driver may take to find its namespaces, and a program to begin.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// How long each thread of the driver works before it is measured, and fio where it cannot be seen at work.
const WARM_UP: Duration = Duration::from_millis(100);
const LONG_WARM_UP: Duration = Duration::from_millis(600);
/// How many commands the kernel's block layer completes before fio is measured.
const COMMANDS: u64 = 200;
/// Longer than a program is ever needed, in seconds.
const LONG: u32 = 3600;
/// What a program has said.
const SAID: &str = "/tmp/said";

#[derive(Parser)]
struct Options {
    /// How often each contender has a turn with each load.
    #[arg(long, default_value_t = 15)]
    turns: u32,
    /// How long a turn is measured.
    #[arg(long, default_value_t = 300)]
    milliseconds: u64,
    /// Leave out writes, and other ways of completion.
    #[arg(long)]
    brief: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is done, as often as possible.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    block_size: u32,
    threads: u32,
    depth: u32,
}

/// The program that does it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Contender {
    /// The kernel's driver, under fio with io_uring and default options.
    Kernel,
    /// The same with fio's options for speed, and the kernel polls for completions.
    KernelPolled,
    /// The same, with commands that pass the block layer by.
    KernelPassthrough,
    Driver,
    /// With the completion queue's doorbell for each completion.
    DriverAcknowledging,
    DriverInterrupts,
    /// With interrupts, and sleeping at once instead of polling first.
    DriverSleeping,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::KernelPolled => "kernel-polled",
            Self::KernelPassthrough => "kernel-passthrough",
            Self::Driver => "driver",
            Self::DriverAcknowledging => "driver-acknowledging",
            Self::DriverInterrupts => "driver-interrupts",
            Self::DriverSleeping => "driver-sleeping",
        }
    }

    fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel | Self::KernelPolled | Self::KernelPassthrough)
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
    load_modules(MODULES, "-nvme.ko", Some("poll_queues=1"))?;
    let device = lab_device(DEVICE)?;
    give_to_kernel(&device)?;
    let mut turns = Turns::default();
    let time = Duration::from_millis(options.milliseconds);
    let (kernel, driver): (Vec<_>, Vec<_>) =
        loads(options.brief).into_iter().partition(|(_, contender)| contender.is_kernel());
    // The first round is a warm-up: the emulator translates each program's code when it first runs.
    for round in 0..=options.turns {
        println!("round {round} of {}", options.turns);
        let time = (round > 0).then_some(time);
        let namespace = namespace(&device)?;
        for (load, contender) in &kernel {
            take_turn(
                &mut turns,
                *load,
                *contender,
                time,
                &mut fio(&namespace, *load, *contender),
            )?;
        }
        let binding = device.bind_vfio_pci()?;
        for (load, contender) in &driver {
            take_turn(
                &mut turns,
                *load,
                *contender,
                time,
                &mut example(&device, *load, *contender),
            )?;
        }
        binding.restore()?;
    }
    Ok(())
}

/// What is measured in each round.
fn loads(brief: bool) -> Vec<(Load, Contender)> {
    use Contender::{Driver, Kernel};
    let mut loads = Vec::new();
    let mut add = |write, threads, depth, contenders: &[Contender]| {
        let load = Load { write, block_size: 4096, threads, depth };
        loads.extend(contenders.iter().map(|contender| (load, *contender)));
    };
    if brief {
        add(false, 1, 32, &[Kernel, Driver]);
        return loads;
    }
    let all = [
        Kernel,
        Contender::KernelPolled,
        Contender::KernelPassthrough,
        Driver,
        Contender::DriverInterrupts,
        Contender::DriverSleeping,
    ];
    add(false, 1, 1, &all);
    add(false, 1, 1, &[Contender::DriverAcknowledging]);
    add(false, 1, 4, &[Kernel, Driver]);
    add(false, 1, 32, &all);
    add(false, 2, 32, &[Kernel, Driver]);
    add(true, 1, 32, &[Kernel, Driver]);
    loads
}

/// Lets a program run, and has a part of its run measured if there is a time for that.
fn take_turn(
    turns: &mut Turns,
    load: Load,
    contender: Contender,
    time: Option<Duration>,
    command: &mut Command,
) -> Result<()> {
    let Load { write, block_size, threads, depth } = load;
    let running = Running::start(command, contender, threads)?;
    let what = [
        if write { "write" } else { "read" },
        &block_size.to_string(),
        &threads.to_string(),
        &depth.to_string(),
        contender.name(),
    ];
    if let Some(time) = time {
        // The lab counts the commands.
        turns.measure(&what, time, || Ok(0))?;
    }
    running.stop()
}

/// A program that works.
struct Running {
    child: Child,
    contender: Contender,
}

impl Running {
    /// Starts a program, and waits until its threads have worked for a while.
    fn start(command: &mut Command, contender: Contender, threads: u32) -> Result<Self> {
        let (said, before) = (File::create(SAID)?, completed());
        let child = command.stdout(said.try_clone()?).stderr(said).spawn()?;
        let mut running = Self { child, contender };
        let deadline = Instant::now() + TIME_LIMIT;
        while !running.has_begun(threads, before) {
            if running.child.try_wait()?.is_some() || Instant::now() > deadline {
                return Err(running.fail("does not work"));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(running)
    }

    /// Whether it has worked for a while. fio prepares itself for long, and its threads test the clock, so the
    /// commands count that the block layer has completed; it does not count those that pass it by.
    fn has_begun(&self, threads: u32, before: u64) -> bool {
        let process = self.child.id();
        match self.contender {
            Contender::KernelPassthrough => {
                let jobs = children(process).into_iter();
                jobs.map(|job| time(job, None)).sum::<Duration>() >= LONG_WARM_UP
            }
            _ if self.contender.is_kernel() => completed() >= before + COMMANDS,
            _ => time(process, Some(process)) >= WARM_UP * threads,
        }
    }

    /// Ends the program.
    fn stop(mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Err(self.fail("has ended too early"));
        }
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)?;
        let status = self.child.wait()?;
        // fio reports a signal by its status.
        if !status.success() && !self.contender.is_kernel() {
            return Err(self.fail("has failed"));
        }
        Ok(())
    }

    fn fail(mut self, what: &str) -> Box<dyn std::error::Error> {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = fs::read_to_string(SAID).unwrap_or_default();
        format!("{} {what}: {said}", self.contender.name()).into()
    }
}

/// The reads and writes that the kernel's NVMe block devices have completed (Linux, `Documentation/block/stat.rst`).
fn completed() -> u64 {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let devices = devices.filter(|device| device.file_name().to_string_lossy().starts_with("nvme"));
    let counts = devices.filter_map(|device| {
        let stat = fs::read_to_string(device.path().join("stat")).ok()?;
        let fields: Vec<u64> =
            stat.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
        Some(fields.first()? + fields.get(4)?)
    });
    counts.sum()
}

fn children(process: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    let children = children.unwrap_or_default();
    children.split_ascii_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// The processor time of a process's threads, without one of them.
fn time(process: u32, without: Option<u32>) -> Duration {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let without = without.map_or_else(String::new, |thread| thread.to_string());
    let times = threads.filter(|thread| *thread.file_name() != *without).filter_map(|thread| {
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        times.split_ascii_whitespace().next()?.parse().ok()
    });
    times.map(Duration::from_nanos).sum()
}

/// fio on a namespace's block device or, for passthrough, its character device.
fn fio(namespace: &Path, load: Load, contender: Contender) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=nvme", "--group_reporting", "--time_based"])
        .args(["--cpus_allowed=0-1", "--cpus_allowed_policy=split"])
        .arg(format!("--runtime={LONG}"))
        .arg(format!("--rw={}", if load.write { "randwrite" } else { "randread" }))
        .arg(format!("--bs={}", load.block_size))
        .arg(format!("--numjobs={}", load.threads))
        .arg(format!("--iodepth={}", load.depth));
    let device = namespace.display().to_string();
    match contender {
        Contender::KernelPassthrough => command
            .args(["--ioengine=io_uring_cmd", "--cmd_type=nvme"])
            .arg(format!("--filename={}", device.replace("/dev/nvme", "/dev/ng"))),
        _ => {
            command.args(["--ioengine=io_uring", "--direct=1"]).arg(format!("--filename={device}"))
        }
    };
    if contender != Contender::Kernel {
        command.args(["--fixedbufs", "--registerfiles", "--norandommap", "--gtod_reduce=1"]);
        command.arg("--hipri");
    }
    command
}

fn example(device: &PciDevice, load: Load, contender: Contender) -> Command {
    let mut command = Command::new(EXAMPLE);
    command
        .args(["bench", "--namespace=1", "--pin"])
        .arg(format!("--threads={}", load.threads))
        .arg(format!("--device={}", device.address()))
        .arg(format!("--depth={}", load.depth))
        .arg(format!("--block-size={}", load.block_size))
        .arg(format!("--seconds={LONG}"));
    if load.write {
        command.args(["--read-percent=0", "--yes-destroy-data"]);
    } else {
        command.arg("--read-percent=100");
    }
    match contender {
        Contender::DriverInterrupts => command.arg("--interrupts"),
        Contender::DriverSleeping => command.args(["--interrupts", "--spin=0"]),
        Contender::DriverAcknowledging => command.arg("--acknowledge-after=1"),
        _ => &mut command,
    };
    command
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
