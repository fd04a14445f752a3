//! Takes a device away under threads that poll its registers, and shows that none of them dies: the windows are
//! revoked, the threads notice, and the windows are restored when the device is back.
//!
//! ```sh
//! cargo run --release --example unplug
//! cargo run --release --example unplug -- --cause decode --device 0000:00:03.0
//! ```
//!
//! Without `--device` it serves a device of its own, in another process, whose memory can be truncated. It ends
//! with status 0 if each window was revoked and restored in each round.

#![forbid(unsafe_code)]

mod cause;
mod served;
#[cfg(test)]
mod tests;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use vfio_remap::device::Revoked;
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Window};

use cause::Cause;

/// Takes a device away under threads that poll its registers.
#[derive(Parser)]
struct Options {
    /// What takes it away
    #[arg(long, value_enum, default_value = "truncate")]
    cause: Cause,
    /// A PCI address, or vfio-user:PATH; without it, a device of this program's own
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// The BAR whose windows the threads poll
    #[arg(long, default_value_t = 0)]
    bar: u32,
    /// The register that they poll: 32 bits at this offset
    #[arg(long, default_value_t = 0)]
    offset: usize,
    /// How often it is taken away
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Seconds to wait for each step, and for the removal
    #[arg(long, default_value_t = 60)]
    patience: u64,
}

fn main() -> ExitCode {
    if let Some(served) = served::serve() {
        return served;
    }
    match served::program().and_then(|program| run(&Options::parse(), program)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("unplug: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `program` starts this program as the server of its own device.
fn run(options: &Options, program: Command) -> Result<()> {
    let (device, mut server) = match &options.device {
        Some(name) => (open(name)?, None),
        None => {
            let (device, server) = served::start(program)?;
            (device, Some(server))
        }
    };
    FaultGuard::install(FaultScope::WindowOnly)?;
    let windows = windows(&device, options.bar)?;
    println!("{}: {} windows over bar {}", device.name(), windows.len(), options.bar);
    let polling = Polling {
        stop: AtomicBool::new(false),
        reads: windows.iter().map(|_| AtomicU64::new(0)).collect(),
    };
    let result = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (window, reads) in windows.iter().zip(&polling.reads) {
            let register = window.read_only_register::<u32>(options.offset)?;
            let stop = &polling.stop;
            threads.push(scope.spawn(move || poll(&register, window, stop, reads)));
        }
        let result = rounds(options, &device, &windows, &polling, server.as_mut());
        polling.stop.store(true, Ordering::Relaxed);
        let noticed: u64 = threads.into_iter().filter_map(|thread| thread.join().ok()).sum();
        println!("the threads noticed {noticed} times that a value was not the device's");
        result
    });
    let reads: u64 = polling.reads.iter().map(|reads| reads.load(Ordering::Relaxed)).sum();
    println!("{reads} reads, none of which ended the process");
    result?;
    drop((windows, server));
    Ok(device.close()?)
}

fn open(name: &str) -> Result<Device> {
    let device = match name.strip_prefix("vfio-user:") {
        Some(path) => Device::new(Arc::new(VfioUser::connect(path)?)),
        None => Device::open(name)?,
    };
    device.config()?.set_memory_decoding(true)?;
    Ok(device)
}

/// An original, a duplicate, and one that was relocated.
fn windows(device: &Device, bar: u32) -> Result<Vec<Window>> {
    let bar = device.bar(bar)?;
    let part = bar.layout().mappable().next().ok_or_else(|| {
        Error::new(ErrorKind::NotMappable, "map", format!("{bar:?}"))
            .with_advice("choose another one: --bar")
    })?;
    let original = bar.map(part, Placement::Anywhere)?;
    let (duplicate, _) = original.duplicate(Placement::Anywhere)?;
    let (mut relocated, _) = original.duplicate(Placement::Anywhere)?;
    let relocation = relocated.relocate(Placement::Anywhere)?;
    println!("{}", relocation.report);
    Ok(vec![original, duplicate, relocated])
}

struct Polling {
    stop: AtomicBool,
    /// How often each thread has read its register.
    reads: Vec<AtomicU64>,
}

/// A thread of a driver: reads a register again and again, and waits while its window is revoked. Returns how
/// often it has noticed that.
fn poll(
    register: &vfio_remap::Register<u32, vfio_remap::device::ReadOnly>,
    window: &Window,
    stop: &AtomicBool,
    reads: &AtomicU64,
) -> u64 {
    let mut noticed = 0;
    while !stop.load(Ordering::Relaxed) {
        let value = register.try_read();
        reads.fetch_add(1, Ordering::Release);
        if value.is_err() {
            noticed += 1;
            while window.is_revoked() && !stop.load(Ordering::Relaxed) {
                reads.fetch_add(1, Ordering::Release);
                std::thread::yield_now();
            }
        }
    }
    noticed
}

fn rounds(
    options: &Options,
    device: &Device,
    windows: &[Window],
    polling: &Polling,
    mut server: Option<&mut served::Served>,
) -> Result<()> {
    let patience = Duration::from_secs(options.patience);
    let (mut contained, mut restored) = (0, 0);
    let rounds = if options.cause == Cause::Removal { 1 } else { options.rounds };
    for round in 1..=rounds {
        options.cause.take_away(device, &mut server, patience)?;
        if options.cause == Cause::Reset {
            // It is back already, and no access has faulted.
            until("the threads go on", patience, || polling.has_gone_on())?;
            continue;
        }
        until("all windows are revoked", patience, || windows.iter().all(Window::is_revoked))?;
        let why = windows.iter().filter_map(Window::revoked);
        contained += why.clone().filter(|why| matches!(why, Revoked::Fault(_))).count();
        if let (1, Some(why)) = (round, why.clone().next()) {
            println!("revoked: {why}");
        }
        until("the threads go on", patience, || polling.has_gone_on())?;
        if options.cause == Cause::Removal {
            break;
        }
        options.cause.bring_back(device, &mut server)?;
        restored += device.restore().into_result()?.len();
    }
    println!(
        "{rounds} rounds by {:?}: {contained} faults contained, {restored} windows restored",
        options.cause
    );
    let expected = if matches!(options.cause, Cause::Removal | Cause::Reset) {
        0
    } else {
        rounds as usize * windows.len()
    };
    if restored == expected {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Os, "restore", format!("{expected} windows"))
        .with_reason(format!("only {restored} were")))
}

impl Polling {
    /// Whether each thread has read its register three times since this was called.
    fn has_gone_on(&self) -> bool {
        let counts = || self.reads.iter().map(|reads| reads.load(Ordering::Acquire));
        let before: Vec<u64> = counts().collect();
        let end = Instant::now() + Duration::from_millis(100);
        while Instant::now() < end {
            if counts().zip(&before).all(|(now, before)| now >= before + 3) {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }
}

fn until(what: &str, patience: Duration, holds: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + patience;
    while !holds() {
        if Instant::now() > end {
            return Err(Error::new(ErrorKind::TimedOut, "wait until", what));
        }
        std::thread::yield_now();
    }
    Ok(())
}
