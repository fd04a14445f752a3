//! The figures of the benchmark `nvme`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};

use crate::chart::{self, Bar, Panel};
use crate::samples::{Samples, grouped};
use crate::turns::Used;

/// The contenders of `benches/nvme.rs`, in the order of the tables, and their names in
/// the tables.
pub const CONTENDERS: [(&str, &str); 7] = [
    (KERNEL, "kernel, io_uring"),
    ("kernel-polled", "kernel, io_uring polled"),
    ("kernel-passthrough", "kernel, io_uring_cmd polled"),
    ("driver-sleeping", "`nvme`, interrupts, sleeping at once"),
    ("driver-interrupts", "`nvme`, interrupts"),
    ("driver-acknowledging", "`nvme`, polled, acknowledging each"),
    (DRIVER, "`nvme`, polled"),
];
pub const KERNEL: &str = "kernel";
pub const DRIVER: &str = "driver";

/// What a contender did. The order is that of the tables: reads before writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    write: bool,
    block_size: Reverse<u32>,
    threads: u32,
    depth: u32,
}

impl Load {
    /// Reads of 4096 bytes by one thread.
    pub fn reads(depth: u32) -> Self {
        Self { write: false, block_size: Reverse(4096), threads: 1, depth }
    }

    fn words(self) -> String {
        let Self { write, block_size: Reverse(block_size), threads, depth } = self;
        let operation = if write { "write" } else { "read" };
        format!("{operation} | {block_size} | {threads} | {depth}")
    }
}

/// The turns of a contender with a load: for each command, or of them.
pub struct Measured {
    /// Microseconds of processor time of all threads of the emulator, and of those that run the
    /// guest's processors.
    pub time: Samples,
    guest: Samples,
    /// How often the other threads of the emulator slept.
    sleeps: Samples,
    /// Commands per second.
    iops: Samples,
}

impl Measured {
    fn new(turns: &[Used]) -> Self {
        let samples = |figure: fn(&Used) -> f64| Samples::new(turns.iter().map(figure).collect());
        Self {
            time: samples(|used| used.total().as_secs_f64() * 1e6 / used.commands as f64),
            guest: samples(|used| used.guest.as_secs_f64() * 1e6 / used.commands as f64),
            sleeps: samples(|used| used.sleeps as f64 / used.commands as f64),
            iops: samples(|used| used.commands as f64 / used.elapsed.as_secs_f64()),
        }
    }
}

/// What was measured in one boot, by load and index of the contender.
pub struct Figures(BTreeMap<(Load, usize), Measured>);

impl Figures {
    /// Parses the output of `benches/nvme.rs`, and adds what its turns used. Turns without a
    /// command are left out; each row needs so many others.
    pub fn parse(output: &str, used: &BTreeMap<u32, Used>, turns: u32) -> Result<Self> {
        let mut rows = BTreeMap::<_, Vec<Used>>::new();
        for line in output.lines().filter_map(|line| line.strip_prefix("row\t")) {
            let row = parse_row(line).with_context(|| format!("malformed row: {line}"));
            let (number, key) = row?;
            let used = used.get(&number).copied();
            let used = used.with_context(|| format!("turn {number} was not measured"))?;
            // Such a turn shows nothing: the program had not begun.
            if used.commands > 0 {
                rows.entry(key).or_default().push(used);
            }
        }
        ensure!(!rows.is_empty(), "the benchmark printed no figures");
        for ((load, contender), used) in &rows {
            let (name, _) = CONTENDERS[*contender];
            ensure!(
                used.len() >= turns as usize,
                "{name} had {} turns of {load:?}, not {turns}",
                used.len()
            );
        }
        Ok(Self(rows.into_iter().map(|(key, used)| (key, Measured::new(&used))).collect()))
    }

    pub fn of(&self, load: Load, contender: &str) -> Option<&Measured> {
        self.0.get(&(load, index(contender)?))
    }

    /// The processor time of a command with the kernel's driver, and the commands per second, as
    /// multiples: of the contender's time, and of the kernel's commands.
    fn ratios(&self, load: Load, measured: &Measured) -> (f64, f64) {
        let Some(kernel) = self.of(load, KERNEL) else { return (f64::NAN, f64::NAN) };
        let time = kernel.time.median() / measured.time.median();
        (time, measured.iops.median() / kernel.iops.median())
    }

    /// The kernel's processor time for a read as a multiple of the driver's, and the driver's
    /// reads per second as a multiple of the kernel's.
    pub fn driver_ratios(&self, depth: u32) -> (f64, f64) {
        let load = Load::reads(depth);
        let driver = self.of(load, DRIVER);
        driver.map_or((f64::NAN, f64::NAN), |driver| self.ratios(load, driver))
    }

    /// The first of these ratios for a driver that polls and needs no time itself: its processor
    /// waits for each command as long as the emulator's other threads work on it, which is taken
    /// from the driver's turns.
    pub fn most(&self, depth: u32) -> f64 {
        let load = Load::reads(depth);
        let (Some(kernel), Some(driver)) = (self.of(load, KERNEL), self.of(load, DRIVER)) else {
            return f64::NAN;
        };
        let emulator = driver.time.median() - driver.guest.median();
        kernel.time.median() / (2.0 * emulator)
    }

    pub fn table(&self) -> String {
        let mut table = "\
| operation | block, bytes | threads | depth | who | µs of processor time per command, median | quartiles | \
kernel's × | of it processors | emulator's sleeps per command | IOPS, median | quartiles | × kernel |
|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|
"
        .to_owned();
        for ((load, contender), measured) in &self.0 {
            let (time, iops) = self.ratios(*load, measured);
            let (low_time, high_time) = measured.time.quartiles();
            let (low, high) = measured.iops.quartiles();
            writeln!(
                table,
                "| {} | {} | {:.2} | {low_time:.2}–{high_time:.2} | {time:.1} | {:.2} | {:.2} | {} | \
                 {}–{} | {iops:.1} |",
                load.words(),
                CONTENDERS[*contender].1,
                measured.time.median(),
                measured.guest.median(),
                measured.sleeps.median(),
                grouped(measured.iops.median()),
                grouped(low),
                grouped(high),
            )
            .expect("writing to a string succeeds");
        }
        table
    }

    /// A panel for each depth.
    pub fn plot(&self, depths: &[u32]) -> String {
        let panels = depths.iter().map(|&depth| {
            let load = Load::reads(depth);
            let bars = CONTENDERS.iter().filter_map(|&(name, shown)| {
                let measured = self.of(load, name)?;
                let (ratio, _) = self.ratios(load, measured);
                let value = measured.time.median();
                Some(Bar {
                    label: shown.replace('`', ""),
                    value,
                    text: format!("{value:.1} (kernel's ×{ratio:.1})"),
                    strong: name.starts_with(DRIVER),
                })
            });
            let title = format!("Reads of 4096 bytes, depth {depth}: µs of processor time each");
            Panel { title, bars: bars.collect() }
        });
        chart::svg(&panels.collect::<Vec<_>>())
    }
}

fn parse_row(line: &str) -> Option<(u32, (Load, usize))> {
    let fields: Vec<_> = line.split('\t').collect();
    let [number, operation, block_size, threads, depth, contender, ..] = fields[..] else {
        return None;
    };
    let load = Load {
        write: operation == "write",
        block_size: Reverse(block_size.parse().ok()?),
        threads: threads.parse().ok()?,
        depth: depth.parse().ok()?,
    };
    Some((number.parse().ok()?, (load, index(contender)?)))
}

fn index(contender: &str) -> Option<usize> {
    CONTENDERS.iter().position(|(name, _)| *name == contender)
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use super::*;

    /// The output of a run of three turns at depth 32, and what they used: so many microseconds
    /// for each command.
    pub fn output(kernel: u64, driver: u64) -> (String, BTreeMap<u32, Used>) {
        let (mut output, mut turns) = ("round 1 of 3\n".to_owned(), BTreeMap::new());
        for round in 0..3 {
            for (contender, micros) in [(KERNEL, kernel), (DRIVER, driver)] {
                let number = turns.len() as u32 + 1;
                writeln!(output, "row\t{number}\tread\t4096\t1\t32\t{contender}\t0\t1").unwrap();
                let used = Used {
                    guest: Duration::from_micros(600 * micros),
                    emulator: Duration::from_micros(400 * micros + round),
                    elapsed: Duration::from_micros(500 * micros),
                    sleeps: 250,
                    commands: 1000,
                    ..Used::default()
                };
                turns.insert(number, used);
            }
        }
        (output, turns)
    }

    #[test]
    fn a_table_shows_medians_quartiles_and_ratios() {
        let (output, used) = output(400, 10);
        let figures = Figures::parse(&output, &used, 3).unwrap();
        let table = figures.table();
        let row = "| read | 4096 | 1 | 32 | `nvme`, polled | 10.00 | 10.00–10.00 | 40.0 | 6.00 | 0.25 | \
                   200 000 | 200 000–200 000 | 40.0 |\n";
        assert!(table.contains(row), "{table}");
        let (time, iops) = figures.driver_ratios(32);
        assert!((time - 40.0).abs() < 0.01 && (iops - 40.0).abs() < 0.01);
        assert!(figures.driver_ratios(1).0.is_nan());
        // The emulator's other threads need 4 µs for a command of the driver.
        assert!((figures.most(32) - 50.0).abs() < 0.1, "{}", figures.most(32));
        assert!(figures.most(1).is_nan());
    }

    #[test]
    fn too_few_turns_and_turns_without_times_are_errors() {
        let (rows, mut used) = output(400, 10);
        assert!(Figures::parse(&rows, &used, 4).is_err());
        used.get_mut(&2).unwrap().commands = 0;
        assert!(Figures::parse(&rows, &used, 3).is_err());
        used.remove(&2);
        assert!(Figures::parse(&rows, &used, 3).is_err());
        assert!(Figures::parse("round 1 of 3\n", &used, 3).is_err());
        assert!(Figures::parse("row\t1\tread\t4096\t1\t1\tnobody\t0\t1\n", &used, 1).is_err());
    }
}
