//! A tour of the crate: maps a BAR, duplicates the window, relocates it, and reports each time which strategy
//! was used and why.
//!
//! Without `--device` it runs on an emulated device, QEMU's edu, in a separate process.

#[macro_use]
#[path = "common/say.rs"]
mod say;
mod common;

use std::cmp::Reverse;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};
use vfio_remap::space::{Attempt, KernelVersion, Outcome, Request};
use vfio_remap::{
    Device, Error, ErrorKind, Placement, Region, Register, Report, Reservation, Result, Strategy,
    Window,
};

/// Maps a BAR, duplicates and relocates the window, and reports which strategy was used and why.
#[derive(Parser)]
struct Options {
    /// emulated:edu, emulated:nvme, vfio-user:PATH of a server's socket, or the PCI address of a device bound to
    /// vfio-pci, such as 0000:00:03.0
    #[arg(long, value_name = "DEVICE", default_value = "emulated:edu")]
    device: String,
    /// The BAR to map [default: the largest that can be mapped]
    #[arg(long, value_name = "N")]
    bar: Option<u32>,
    /// Use only this strategy
    #[arg(long, value_name = "NAME")]
    strategy: Option<Pin>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "PascalCase")]
enum Pin {
    DontUnmap,
    OldLenZero,
    MapAgain,
    Move,
}

/// The output of the tour: line by line, or as one JSON object at the end.
struct Story {
    json: bool,
    steps: Vec<Value>,
}

/// The cost of a step for this process.
struct Cost {
    faults: i64,
    micros: f64,
}

/// A register that can be written safely on an unused device, and the value that it then reads as.
struct Scratch {
    offset: usize,
    /// The offset of the reply. An emulated device takes a moment for it.
    answer_at: usize,
    what: &'static str,
    values: [u32; 2],
    answer: fn(u32) -> u32,
}

fn main() -> ExitCode {
    if let Some(served) = common::served() {
        return served;
    }
    say::end("tour", tour(&Options::parse()))
}

fn tour(options: &Options) -> Result<()> {
    let mut story = Story { json: options.json, steps: Vec::new() };
    let common::Opened { device, process } = common::open(&options.device)?;
    story.say(format!("{} on Linux {}", device.name(), KernelVersion::running()));
    let regions: Vec<Value> = device.regions().map(|region| story.region(&region)).collect();
    {
        let bar = choose(&device, options.bar)?;
        // The largest mappable part: all of most BARs, or what MSI-X leaves.
        let part = bar.layout().mappable().min_by_key(|part| Reverse(part.end - part.start));
        let part = part.unwrap_or(0..bar.size());
        let (window, cost) = measured(|| bar.map(part.clone(), Placement::Anywhere))
            .map_err(|failed| other_bar(failed.into()))?;
        story.map(&bar, &window, &cost);
        let scratch = scratch(&device, &bar, &window);
        let copy = duplicate(&mut story, &window, scratch.as_ref(), options.strategy)?;
        relocate(&mut story, window, copy.as_ref(), scratch.as_ref(), options.strategy)?;
    }
    let name = device.name().to_owned();
    device.close()?;
    drop(process);
    story.say("Closed: nothing held the device.");
    if options.json {
        let kernel = KernelVersion::running().to_string();
        say!(
            "{}",
            json!({"device": name, "kernel": kernel, "regions": regions, "steps": story.steps})
        );
    }
    Ok(())
}

fn other_bar(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotMappable => {
            error.with_advice("choose another BAR, 0 to 5: --bar")
        }
        _ => error,
    }
}

fn choose(device: &Device, index: Option<u32>) -> Result<Region<'_>> {
    match index {
        Some(index) => device.bar(index).map_err(other_bar),
        None => {
            let mappable = |bar: &Region<'_>| -> u64 {
                bar.layout().mappable().map(|part| part.end - part.start).sum()
            };
            let largest = device.bars().min_by_key(|bar| Reverse(mappable(bar)));
            largest.map_or_else(|| device.bar(0), Ok)
        }
    }
}

fn duplicate(
    story: &mut Story,
    window: &Window,
    scratch: Option<&Scratch>,
    pin: Option<Pin>,
) -> Result<Option<Window>> {
    if let Some(Pin::Move) = pin {
        story.say("\nMove cannot duplicate, so that step is skipped.");
        return Ok(None);
    }
    let ((copy, report), cost) = measured(|| window.duplicate(request(Placement::Anywhere, pin)))?;
    story.verb("duplicate", &report, &cost);
    match scratch {
        Some(scratch) => scratch.prove(story, [window, &copy], ["the first", "the second"])?,
        None => same(story, window, &copy)?,
    }
    Ok(Some(copy))
}

impl Scratch {
    /// Writes through one window and reads through the other.
    fn prove(&self, story: &mut Story, windows: [&Window; 2], names: [&str; 2]) -> Result<()> {
        let (one, other) =
            (windows[0].register::<u32>(self.offset)?, windows[1].register::<u32>(self.answer_at)?);
        for value in self.values {
            one.write(value);
            let read = read_until(&other, (self.answer)(value));
            let [through, back] = names;
            story.proof(
                format!(
                    "wrote {value:#x} to {} through {through}, read {read:#x} through {back}",
                    self.what
                ),
                read == (self.answer)(value),
            )?;
        }
        Ok(())
    }
}

/// Reads a register until it has the expected value, for at most a second.
fn read_until(register: &Register<u32>, expected: u32) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let read = register.read();
        if read == expected || Instant::now() > deadline {
            return read;
        }
    }
}

/// Only reads, on a device whose registers are unknown.
fn same(story: &mut Story, one: &Window, other: &Window) -> Result<()> {
    let (one, other) =
        (one.read_only_register::<u32>(0)?.read(), other.read_only_register::<u32>(0)?.read());
    story.proof(
        format!("read {one:#x} through the first and {other:#x} through the second"),
        one == other,
    )
}

fn relocate(
    story: &mut Story,
    mut window: Window,
    copy: Option<&Window>,
    scratch: Option<&Scratch>,
    pin: Option<Pin>,
) -> Result<()> {
    let size = window.addresses().len();
    let place = Reservation::congruent(size, 2 << 20, window.region_range().start & !0xfff)?;
    let before = window.read_only_register::<u32>(0)?.read();
    let (relocation, cost) = measured(|| window.relocate(request(Placement::In(place), pin)))?;
    story.verb("relocate", &relocation.report, &cost);
    let after = window.read_only_register::<u32>(0)?.read();
    story.proof(format!("read {before:#x} before and {after:#x} after"), before == after)?;
    if let Some(scratch) = scratch {
        let moved = "the one that moved";
        let (one, name) = copy.map_or((&window, moved), |copy| (copy, "its duplicate"));
        scratch.prove(story, [one, &window], [name, moved])?;
    }
    if let Some(old) = relocation.old {
        let start = format!("{:x}-", old.address());
        let maps = std::fs::read_to_string(PathBuf::from("/proc/self/maps")).unwrap_or_default();
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap_or("(not listed)");
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        story.proof(format!("the old range is {}", words.join(" ")), line.contains(" ---"))?;
    }
    Ok(())
}

fn request(placement: Placement, pin: Option<Pin>) -> Request {
    match pin {
        None => placement.into(),
        Some(Pin::DontUnmap) => placement.only(Strategy::DontUnmap),
        Some(Pin::OldLenZero) => placement.only(Strategy::OldLenZero),
        Some(Pin::MapAgain) => placement.only(Strategy::MapAgain),
        Some(Pin::Move) => placement.only(Strategy::Move),
    }
}

/// Registers of the lab's devices that can be written and read back.
fn scratch(device: &Device, bar: &Region<'_>, window: &Window) -> Option<Scratch> {
    let keeps = |offset, what, values| Scratch {
        offset,
        answer_at: offset,
        what,
        values,
        answer: |value| value,
    };
    let inverts = |offset, answer_at, what| Scratch {
        offset,
        answer_at,
        what,
        values: [0x1234_5678, 0],
        answer: |value| !value,
    };
    let config = device.config().ok()?;
    let start = window.region_range().start as usize;
    let scratch = match (config.vendor_id().ok()?, config.device_id().ok()?, bar.index()) {
        // The emulated edu maps a mailbox; QEMU's maps the registers themselves.
        (0x1234, 0x11e8, 0) if start == 0x1_0000 => {
            inverts(0x1_0004, 0x1_0008, "edu's liveness mailbox, which inverts,")
        }
        (0x1234, 0x11e8, 0) => inverts(4, 4, "edu's liveness register, which inverts,"),
        (0x1af4, 0x1110, 2) => keeps(0x100, "a word of shared memory", [0xcafe_f00d, 7]),
        (0x8086, 0x10d3, 0) => keeps(0x38, "VET", [0x88a8, 0x8100]),
        _ if config.read_u32(8).ok()? >> 8 == 0x01_0802 && bar.index() == 0 => {
            let enabled = window.read_only_register::<u32>(0x14).ok()?.read() & 1 != 0;
            if enabled {
                return None;
            }
            keeps(0x24, "AQA of a controller that is not enabled", [0x1f_001f, 0])
        }
        _ => return None,
    };
    Some(Scratch {
        offset: scratch.offset.checked_sub(start)?,
        answer_at: scratch.answer_at.checked_sub(start)?,
        ..scratch
    })
}

fn measured<T, E>(
    f: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Cost), E> {
    let faults = || getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.minor_page_faults());
    let (before, start) = (faults(), Instant::now());
    let result = f()?;
    let micros = start.elapsed().as_nanos() as f64 / 1000.0;
    Ok((result, Cost { faults: faults() - before, micros }))
}

impl Story {
    fn say(&self, line: impl std::fmt::Display) {
        if !self.json {
            say!("{line}");
        }
    }

    /// Draws a region: full blocks can be mapped, light ones are trapped.
    fn region(&self, bar: &Region<'_>) -> Value {
        const CELLS: u64 = 32;
        let size = bar.size();
        let drawing: String = (0..CELLS)
            .map(|cell| {
                let at = u64::try_from(u128::from(size) * u128::from(cell) / u128::from(CELLS));
                let mapped = bar.layout().mappable().any(|part| part.contains(&at.unwrap_or(0)));
                if mapped { '█' } else { '░' }
            })
            .collect();
        let kind = bar.backing_kind().map_or("trapped".to_owned(), |kind| format!("{kind:?}"));
        self.say(format!(
            "  {} {:<2} {:>9} ▕{drawing}▏ {kind}",
            if bar.index() < 6 { "bar   " } else { "region" },
            bar.index(),
            bytes(size)
        ));
        let spans = bar.layout().to_string();
        if bar.layout().spans().len() > 1 {
            spans.lines().for_each(|span| self.say(format!("              {span}")));
        }
        json!({"index": bar.index(), "size": size, "backing": kind, "spans": spans.lines().collect::<Vec<_>>()})
    }

    fn map(&mut self, bar: &Region<'_>, window: &Window, cost: &Cost) {
        let (part, addresses) = (window.region_range(), window.addresses());
        self.say(format!(
            "\nmap         {:#x}..{:#x} of bar {}",
            part.start,
            part.end,
            bar.index()
        ));
        self.say(format!("  at        {:#x}..{:#x}", addresses.start, addresses.end));
        self.cost(cost);
        self.steps.push(json!({"verb": "map", "to": [addresses.start, addresses.end], "faults": cost.faults, "micros": cost.micros}));
    }

    fn verb(&mut self, verb: &str, report: &Report, cost: &Cost) {
        self.say(format!("\n{verb:<11} by {}", report.strategy));
        for attempt in report.attempts.iter() {
            self.say(format!("  before    {attempt}"));
        }
        self.say(format!("  from      {:#x}..{:#x}", report.from.start, report.from.end));
        self.say(format!("  to        {:#x}..{:#x}", report.to.start, report.to.end));
        self.say(format!("  source    {:?}", report.source));
        self.cost(cost);
        self.steps.push(json!({
            "verb": verb,
            "strategy": report.strategy.to_string(),
            "attempts": report.attempts.iter().map(attempt).collect::<Vec<_>>(),
            "from": [report.from.start, report.from.end],
            "to": [report.to.start, report.to.end],
            "source": format!("{:?}", report.source),
            "report": report.to_string(),
            "faults": cost.faults,
            "micros": cost.micros,
        }));
    }

    fn cost(&self, Cost { faults, micros }: &Cost) {
        self.say(format!("  cost      {faults} faults, {micros:.1} µs"));
    }

    /// A check; the tour ends with an error if it fails.
    fn proof(&mut self, what: String, holds: bool) -> Result<()> {
        if holds {
            self.say(format!("  proof     {what}"));
            return Ok(());
        }
        Err(Error::new(ErrorKind::Malformed, "check", "the device").with_reason(what))
    }
}

fn attempt(attempt: &Attempt) -> Value {
    let strategy = attempt.strategy.to_string();
    match attempt.outcome {
        Outcome::Refused { errno, remembered } => {
            json!({"strategy": strategy, "errno": errno, "remembered": remembered})
        }
        Outcome::Hazard(hazard) => json!({"strategy": strategy, "hazard": format!("{hazard:?}")}),
        other => json!({"strategy": strategy, "outcome": format!("{other:?}")}),
    }
}

fn bytes(size: u64) -> String {
    match size {
        0..1024 => format!("{size} B"),
        1024..0x10_0000 => format!("{} KiB", size >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", size >> 20),
        _ => format!("{} GiB", size >> 30),
    }
}
