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

#[macro_use]
#[path = "../common/say.rs"]
mod say;
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
    #[arg(long, default_value = "0", value_parser = number)]
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
    let options = Options::parse();
    say::end("unplug", served::program().and_then(|program| run(&options, program)))
}

/// A number, as this program prints it (0x…) or in decimal.
fn number(text: &str) -> std::result::Result<usize, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => usize::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// `program` starts this program as the server of its own device.
fn run(options: &Options, program: Command) -> Result<()> {
    if options.device.is_none() && !options.cause.is_for_its_own() {
        let what = "this program's own device";
        return Err(Error::new(ErrorKind::Unsupported, "take away", what)
            .with_reason(format!("{:?} does not reach it", options.cause))
            .with_advice("name another one (--device), or use --cause truncate or --cause reset"));
    }
    let (device, mut server) = match &options.device {
        Some(name) => (open(name)?, None),
        None => {
            let (device, server) = served::start(program)?;
            (device, Some(server))
        }
    };
    FaultGuard::install(FaultScope::WindowOnly)?;
    let windows = windows(&device, options.bar)?;
    say!("{}: {} windows over bar {}", device.name(), windows.len(), options.bar);
    let polling = Polling {
        stop: AtomicBool::new(false),
        reads: windows.iter().map(|_| AtomicU64::new(0)).collect(),
    };
    let result = std::thread::scope(|scope| {
        // The scope waits for the threads, however this ends.
        let stopping = Stopping(&polling.stop);
        let mut threads = Vec::new();
        for (window, reads) in windows.iter().zip(&polling.reads) {
            let register = window.read_only_register::<u32>(options.offset)?;
            let stop = &polling.stop;
            threads.push(scope.spawn(move || poll(&register, window, stop, reads)));
        }
        let result = rounds(options, &device, &windows, &polling, server.as_mut());
        drop(stopping);
        let noticed: u64 = threads.into_iter().filter_map(|thread| thread.join().ok()).sum();
        say!("the threads noticed {noticed} times that a value was not the device's");
        result
    });
    let reads: u64 = polling.reads.iter().map(|reads| reads.load(Ordering::Relaxed)).sum();
    say!("{reads} reads, none of which ended the process");
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

const OTHER_BAR: &str = "choose another one, 0 to 5: --bar";

/// An original, a duplicate, and one that was relocated.
fn windows(device: &Device, bar: u32) -> Result<Vec<Window>> {
    let bar = device.bar(bar).map_err(|error| error.with_advice(OTHER_BAR))?;
    let part = bar.layout().mappable().next().ok_or_else(|| {
        Error::new(ErrorKind::NotMappable, "map", format!("{bar:?}")).with_advice(OTHER_BAR)
    })?;
    let original = bar.map(part, Placement::Anywhere)?;
    let (duplicate, _) = original.duplicate(Placement::Anywhere)?;
    let (mut relocated, _) = original.duplicate(Placement::Anywhere)?;
    let relocation = relocated.relocate(Placement::Anywhere)?;
    say!("{}", relocation.report);
    Ok(vec![original, duplicate, relocated])
}

struct Polling {
    stop: AtomicBool,
    /// How often each thread has read its register.
    reads: Vec<AtomicU64>,
}

/// Ends the threads when it is dropped.
struct Stopping<'s>(&'s AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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
            say!("revoked: {why}");
        }
        until("the threads go on", patience, || polling.has_gone_on())?;
        if options.cause == Cause::Removal {
            break;
        }
        options.cause.bring_back(device, &mut server)?;
        restored += device.restore().into_result()?.len();
    }
    say!(
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
    // Patience beyond what the clock can say has no end.
    let end = Instant::now().checked_add(patience);
    while !holds() {
        if end.is_some_and(|end| Instant::now() > end) {
            return Err(Error::new(ErrorKind::TimedOut, "wait until", what));
        }
        std::thread::yield_now();
    }
    Ok(())
}
