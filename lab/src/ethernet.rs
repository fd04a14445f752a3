//! `cargo lab bench nic`: compares the Ethernet driver with DPDK, as a page of the
//! documentation.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::chart::{self, Bar, Panel};
use crate::guest::Payload;
use crate::kernels::{Image, Kernel};
use crate::machine::Variant;
use crate::modules;
use crate::payload;
use crate::processors;
use crate::program::{Program, TESTPMD};
use crate::samples::{Samples, grouped};
use crate::turns::{Turns, Used};
use crate::ui;

const PAGE: &str = "docs/ethernet.md";
const PLOT: &str = "docs/ethernet.svg";

/// The kernel to use unless another is named.
pub const KERNEL: &str = "6.1";

/// The most processor time of a frame, and the fewest frames per second, as multiples of
/// DPDK's.
const MOST_TIME: f64 = 1.0;
const FEWEST_FRAMES: f64 = 0.95;

/// How many turns the driver and DPDK have with each load, and how long one is measured.
const TURNS: usize = 15;
const MILLISECONDS: u32 = 1000;

/// The share of the machine's processors that others may use without a warning.
const LOADED: f64 = 0.05;

/// The contenders of `benches/nic`, in the order of the tables, and their names in the
/// tables.
const CONTENDERS: [(&str, &str); 4] = [
    (DRIVER, "`vfio-remap-ethernet`"),
    (DPDK, "DPDK"),
    ("pktgen", "kernel, pktgen"),
    ("packet", "kernel, AF_PACKET"),
];
const DRIVER: &str = "driver";
const DPDK: &str = "dpdk";

/// What the contenders do, in the order of the tables, as the benchmark and as the page name it.
const LOADS: [(&str, &str); 4] = [
    ("transmit igb", "transmit, igb"),
    ("transmit e1000e", "transmit, e1000e"),
    ("forward igb", "forward, igb"),
    ("forward e1000e", "forward, e1000e"),
];

/// What a contender did in a turn.
struct Turn {
    frames: f64,
    elapsed: Duration,
    used: Used,
}

/// The turns of a contender with a load.
struct Measured {
    /// Nanoseconds of a frame: of all threads of the emulator, of those that run the guest's
    /// processors, and of the others.
    time: Samples,
    guest: Samples,
    emulator: Samples,
    /// Frames per second.
    rate: Samples,
}

impl Measured {
    fn new(turns: &[Turn]) -> Self {
        let samples =
            |figure: &dyn Fn(&Turn) -> f64| Samples::new(turns.iter().map(figure).collect());
        let times = |time: fn(&Used) -> Duration| {
            samples(&|turn| time(&turn.used).as_nanos() as f64 / turn.frames)
        };
        Self {
            time: times(Used::total),
            guest: times(|used| used.guest),
            emulator: times(|used| used.emulator),
            rate: samples(&|turn| turn.frames / turn.elapsed.as_secs_f64()),
        }
    }
}

/// What was measured in one boot, by index of the load and of the contender.
struct Figures(BTreeMap<(usize, usize), Measured>);

impl Figures {
    /// Parses the output of `benches/nic`, and adds the processor time of its turns.
    fn parse(output: &str, used: &BTreeMap<u32, Used>) -> Result<Self> {
        let mut turns = BTreeMap::<_, Vec<Turn>>::new();
        for line in output.lines().filter_map(|line| line.strip_prefix("row\t")) {
            let malformed = || format!("malformed row: {line}");
            let (number, key, frames, elapsed) = parse_row(line).with_context(malformed)?;
            ensure!(frames > 0.0, "no frames: {line}");
            let used = used.get(&number).copied();
            let used = used.with_context(|| format!("turn {number} has no processor time"))?;
            turns.entry(key).or_default().push(Turn { frames, elapsed, used });
        }
        let measured = turns.iter().map(|(key, turns)| (*key, Measured::new(turns)));
        let figures = Self(measured.collect());
        for (load, (name, _)) in LOADS.iter().enumerate() {
            for contender in [DRIVER, DPDK] {
                let count = figures.of(load, contender).map_or(0, |found| found.time.count());
                ensure!(count >= TURNS, "{contender} had {count} turns of {name}, not {TURNS}");
            }
        }
        Ok(figures)
    }

    fn of(&self, load: usize, contender: &str) -> Option<&Measured> {
        let contender = CONTENDERS.iter().position(|(name, _)| *name == contender)?;
        self.0.get(&(load, contender))
    }

    /// Processor time of a frame, and frames per second, of a contender as multiples of DPDK's.
    fn ratios(&self, load: usize, measured: &Measured) -> (f64, f64) {
        let of = |of: fn(&Measured) -> &Samples| {
            let dpdk = self.of(load, DPDK).map_or(f64::NAN, |dpdk| of(dpdk).median());
            of(measured).median() / dpdk
        };
        (of(|measured| &measured.time), of(|measured| &measured.rate))
    }

    fn table(&self) -> String {
        let mut table = "\
| load | who | turns | processor time per frame, ns: median | quartiles | × DPDK | guest + emulator | \
frames per second: median | quartiles | × DPDK |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
"
        .to_owned();
        for ((load, contender), measured) in &self.0 {
            let (time, rate) = self.ratios(*load, measured);
            let quartiles = |samples: &Samples| {
                let (low, high) = samples.quartiles();
                format!("{}–{}", grouped(low), grouped(high))
            };
            writeln!(
                table,
                "| {} | {} | {} | {} | {} | {time:.2} | {} + {} | {} | {} | {rate:.2} |",
                LOADS[*load].1,
                CONTENDERS[*contender].1,
                measured.time.count(),
                grouped(measured.time.median()),
                quartiles(&measured.time),
                grouped(measured.guest.median()),
                grouped(measured.emulator.median()),
                grouped(measured.rate.median()),
                quartiles(&measured.rate),
            )
            .expect("writing to a string succeeds");
        }
        table
    }

    /// The targets of a load: whether they are reached, and what was.
    fn verdicts(&self) -> Vec<(bool, String)> {
        let mut verdicts = Vec::new();
        for (load, (_, name)) in LOADS.iter().enumerate() {
            let (time, rate) = self
                .of(load, DRIVER)
                .map_or((f64::NAN, f64::NAN), |driver| self.ratios(load, driver));
            verdicts.push((
                time <= MOST_TIME && rate >= FEWEST_FRAMES,
                format!(
                    "{name}: **{time:.2} times** DPDK's processor time per frame (at most \
                     {MOST_TIME}), **{rate:.2} times** its frames per second (at least {FEWEST_FRAMES})"
                ),
            ));
        }
        verdicts
    }

    fn plot(&self) -> String {
        let panels = LOADS.iter().enumerate().map(|(load, (_, name))| {
            // Beside the kernel's, these would be too short to compare.
            let judged = CONTENDERS.iter().filter(|(name, _)| [DRIVER, DPDK].contains(name));
            let bars = judged.filter_map(|&(contender, shown)| {
                let measured = self.of(load, contender)?;
                let value = measured.time.median();
                let (ratio, _) = self.ratios(load, measured);
                Some(Bar {
                    label: shown.replace('`', ""),
                    value,
                    text: format!("{} (×{ratio:.2})", grouped(value)),
                    strong: contender == DRIVER,
                })
            });
            let title = format!("{}: nanoseconds of processor time per frame", capitalized(name));
            Panel { title, bars: bars.collect() }
        });
        chart::svg(&panels.collect::<Vec<_>>())
    }
}

/// Boots the kernel, and writes the page and its plot. Returns whether the driver reaches the
/// targets.
pub fn write(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    let program = payload::benchmark("nic")?;
    let testpmd = Program::ensure(store, &TESTPMD)?;
    let Some(image) = kernel.image(store)? else {
        bail!("the mirror does not have kernel {} any more", kernel.name);
    };
    let mut files = testpmd.files()?;
    files.extend(image.module_files(&modules::NETWORK)?);
    let arguments = [
        "--bench".to_owned(),
        format!("--turns={TURNS}"),
        format!("--milliseconds={MILLISECONDS}"),
    ];
    let payload = Payload { program: &program, arguments: &arguments, files: &files };
    let mut turns = Turns::default();
    let label = format!("{}-nic", kernel.name);
    let outcome = lab.boot_watched(&image, Variant::Cards, &payload, &label, &mut turns)?;
    let complaints = outcome.complaints();
    ensure!(
        matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty(),
        "{}\n{complaints}",
        outcome.ending
    );
    let figures = Figures::parse(&outcome.output, &turns.done)?;

    let others = turns.share_of_others();
    if others > LOADED {
        ui::warning(&format!(
            "other processes used {:.0} % of this machine's processors meanwhile: measure again on \
             a quiet machine",
            100.0 * others
        ));
    }
    let page = page(&facts(&lab.root.version, &image, &testpmd, others)?, &figures);
    for (path, content) in [(PAGE, page), (PLOT, figures.plot())] {
        fs::write(payload::workspace().join(path), content)?;
        ui::status("Wrote", path);
    }
    let verdicts = figures.verdicts();
    let missed = verdicts.iter().filter(|(reached, _)| !reached);
    missed.for_each(|(_, verdict)| ui::error(&verdict.replace("**", "")));
    Ok(verdicts.iter().all(|(reached, _)| *reached))
}

fn page(facts: &str, figures: &Figures) -> String {
    let verdicts: String =
        figures.verdicts().iter().map(|(_, verdict)| format!("- {verdict}\n")).collect();
    format!(
        "\
# The Ethernet driver compared with DPDK

`cargo lab bench nic` writes this page and its plot. It boots a kernel in QEMU and compares two programs that
drive network cards from user space: `vfio-remap-ethernet`, a driver in safe Rust on this crate, and testpmd of
DPDK. They run by turns, each on its own cards of the same model, and keep the cards between their turns. Both
poll with one thread, in bursts of 32 frames of 64 bytes (without the checksum of Ethernet). The IOMMU
translates for all cards.

- transmit: a program writes the same 42 bytes of headers into each frame and sends it. The card's network has
  no other station and drops the frame.
- forward: a program sends at one card what it receives from the other, without a copy. The two cards are
  connected to each other. At first 128 frames are sent from each, and they circulate.

The processor time is that of all of QEMU's threads (`/proc/PID/task/TID/schedstat`): of those that run the
guest's processors, which also do most of the work of its devices, and of the other threads of the emulator.
It does not include the time in which a thread waits for a processor. The cards count the frames (GPTC); the
kernel's drivers count theirs. Use the ratios; the absolute figures are those of the emulator.

{facts}
{verdicts}
![Processor time per frame by contender](ethernet.svg)

{}",
        figures.table()
    )
}

/// The table of software and hardware that the figures depend on.
fn facts(qemu: &str, image: &Image, testpmd: &Program, others: f64) -> Result<String> {
    let processors = processors::description()?;
    Ok(format!(
        "\
| | |
|---|---|
| kernel | linux {} of Debian, two processors, intel-iommu, `iommu=nopt` |
| emulator | QEMU {qemu} of Debian, TCG, on {processors} |
| cards | QEMU's igb (82576) and e1000e (82574L), queues of 256 descriptors |
| `vfio-remap-ethernet` | interface for bursts, one thread on the second processor |
| DPDK | testpmd {}: `-l 0,1`, `txonly`, `io` with `tx_first 4`; huge pages |
| kernel, pktgen | `burst 1`, `pkt_size 64`, on the second processor |
| kernel, AF_PACKET | `sendmmsg(2)` of 32 frames, on the second processor |
| turns | of {} ms, after 100 ms; {TURNS} of both programs, a third as many of the kernel's drivers |
| other processes | used {:.1} % of the machine's processors meanwhile |
",
        image.version,
        testpmd.version,
        MILLISECONDS,
        100.0 * others
    ))
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}

type Row = (u32, (usize, usize), f64, Duration);

/// The number of a turn, its load and contender, its frames, and how long it was.
fn parse_row(line: &str) -> Option<Row> {
    let fields: Vec<_> = line.split('\t').collect();
    let [number, load, contender, frames, nanoseconds] = fields[..] else { return None };
    let load = LOADS.iter().position(|(name, _)| *name == load)?;
    let contender = CONTENDERS.iter().position(|(name, _)| *name == contender)?;
    let elapsed = Duration::from_nanos(nanoseconds.trim_end().parse().ok()?);
    Some((number.parse().ok()?, (load, contender), frames.parse().ok()?, elapsed))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns of a second: in each load the driver has `driver` ms of processor time, and DPDK 1000.
    fn output(turns: usize, driver: u64, frames: u64) -> (String, BTreeMap<u32, Used>) {
        let (mut output, mut used) = ("hello\n".to_owned(), BTreeMap::new());
        let mut number = 0;
        for (load, _) in LOADS {
            for (contender, milliseconds, frames) in
                [(DRIVER, driver, frames), (DPDK, 1000, 1_000_000)]
            {
                for _ in 0..turns {
                    number += 1;
                    writeln!(output, "row\t{number}\t{load}\t{contender}\t{frames}\t1000000000")
                        .unwrap();
                    let guest = Duration::from_millis(milliseconds);
                    used.insert(number, Used { guest, ..Used::default() });
                }
            }
        }
        (output, used)
    }

    fn reached(driver: u64, frames: u64) -> bool {
        let (output, used) = output(TURNS, driver, frames);
        let verdicts = Figures::parse(&output, &used).unwrap().verdicts();
        verdicts.iter().all(|(reached, _)| *reached)
    }

    #[test]
    fn the_driver_is_judged_by_time_per_frame_and_by_frames() {
        assert!(reached(1000, 1_000_000));
        assert!(reached(950, 950_001));
        assert!(!reached(1001, 1_000_000), "it takes longer");
        assert!(!reached(900, 940_000), "it sends too few");
    }

    #[test]
    fn a_table_shows_medians_quartiles_and_multiples() {
        let (output, used) = output(TURNS, 500, 1_000_000);
        let table = Figures::parse(&output, &used).unwrap().table();
        let row = "| transmit, igb | `vfio-remap-ethernet` | 15 | 500 | 500–500 | 0.50 | 500 + 0 | \
                   1 000 000 | 1 000 000–1 000 000 | 1.00 |\n";
        assert!(table.contains(row), "{table}");
    }

    #[test]
    fn too_few_turns_and_turns_without_times_are_errors() {
        let (rows, used) = output(TURNS - 1, 500, 1_000_000);
        assert!(Figures::parse(&rows, &used).is_err());
        let (rows, mut used) = output(TURNS, 500, 1_000_000);
        used.remove(&3);
        assert!(Figures::parse(&rows, &used).is_err());
        assert!(Figures::parse("row\t1\ttransmit igb\tnobody\t1\t1\n", &used).is_err());
    }
}
