//! `cargo lab bench nvme`: compares the example `nvme` with the kernel's driver, as a
//! page of the documentation.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::chart::{self, Bar, Panel};
use crate::guest::Payload;
use crate::kernels::{Image, Kernel};
use crate::machine::Variant;
use crate::payload;
use crate::processors;
use crate::program::{FIO, Program};
use crate::samples::{Samples, grouped};
use crate::ui;

const PAGE: &str = "docs/performance.md";
const PLOT: &str = "docs/performance.svg";

/// The kernel to use unless another is named: the targets were measured on it.
pub const KERNEL: &str = "6.1";

/// The IOPS that the driver must reach when it polls, with `iommu=nopt`: a depth, and a
/// multiple of the kernel's IOPS at that depth.
const TARGETS: [(u32, f64); 2] = [(1, 9.0), (32, 36.0)];

/// How many runs each contender has, and how long one lasts, in seconds.
const ROUNDS: u32 = 5;
const SECONDS: u32 = 2;

/// The contenders of `benches/nvme.rs`, in the order of the tables, and their names in
/// the tables.
const CONTENDERS: [(&str, &str); 5] = [
    ("kernel", "kernel, io_uring"),
    ("kernel-tuned", "kernel, io_uring tuned"),
    ("kernel-polled", "kernel, io_uring tuned, polled"),
    ("driver-interrupts", "`nvme`, interrupts"),
    ("driver", "`nvme`, polled"),
];

/// What a contender did. The order is that of the tables: reads before writes, large
/// blocks before small ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    write: bool,
    block_size: Reverse<u32>,
    depth: u32,
}

impl Load {
    fn new(operation: &str, block_size: u32, depth: u32) -> Self {
        Self { write: operation == "write", block_size: Reverse(block_size), depth }
    }

    fn reads(depth: u32) -> Self {
        Self::new("read", 4096, depth)
    }

    fn words(self) -> String {
        let Self { write, block_size: Reverse(block_size), depth } = self;
        let operation = if write { "write" } else { "read" };
        format!("{operation} | {block_size} | {depth}")
    }
}

/// The IOPS that were measured in one boot, by load and index of the contender.
#[derive(Default)]
struct Figures(BTreeMap<(Load, usize), Vec<f64>>);

impl Figures {
    /// Parses the output of `benches/nvme.rs`.
    fn parse(output: &str) -> Result<Self> {
        let mut figures = Self::default();
        for line in output.lines().filter_map(|line| line.strip_prefix("row\t")) {
            let (key, iops) = parse_row(line).with_context(|| format!("malformed row: {line}"))?;
            figures.0.entry(key).or_default().push(iops);
        }
        ensure!(!figures.0.is_empty(), "the benchmark printed no figures");
        Ok(figures)
    }

    fn median(&self, load: Load, contender: &str) -> Option<f64> {
        Some(Samples::new(self.0.get(&(load, index(contender)?))?.clone()).median())
    }

    /// The IOPS of a contender as a multiple of the kernel's.
    fn ratio(&self, load: Load, contender: &str) -> Option<f64> {
        Some(self.median(load, contender)? / self.median(load, "kernel")?)
    }

    fn table(&self) -> String {
        let mut table =
            "| operation | block, bytes | depth | who | IOPS, median | min–max | × kernel |\n\
                         |---|---:|---:|---|---:|---:|---:|\n"
                .to_owned();
        for ((load, contender), runs) in &self.0 {
            let (name, shown) = CONTENDERS[*contender];
            let runs = Samples::new(runs.clone());
            let (low, high) = runs.range();
            let ratio = self.ratio(*load, name).unwrap_or(f64::NAN);
            writeln!(
                table,
                "| {} | {shown} | {} | {}–{} | {ratio:.1} |",
                load.words(),
                grouped(runs.median()),
                grouped(low),
                grouped(high)
            )
            .expect("writing to a string succeeds");
        }
        table
    }
}

/// Boots the kernel twice, and writes the page and its plot. Returns whether the driver
/// reaches the targets.
pub fn write(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    let program = payload::benchmark("nvme")?;
    let example = payload::example("nvme")?;
    let fio = Program::ensure(store, &FIO)?;
    let Some(image) = kernel.image(store)? else {
        bail!("the mirror does not have kernel {} any more", kernel.name);
    };
    let mut files = fio.files()?;
    files.push(("lab/examples/nvme".to_owned(), example));
    let boot = |iommu, arguments: &[&str], label: &str| -> Result<Figures> {
        let runs = [format!("--rounds={ROUNDS}"), format!("--seconds={SECONDS}")];
        let arguments: Vec<_> =
            arguments.iter().map(|&argument| argument.to_owned()).chain(runs).collect();
        let payload = Payload { program: &program, arguments: &arguments, files: &files };
        let outcome = lab.boot(&image, iommu, &payload, &format!("{}-{label}", kernel.name))?;
        let complaints = outcome.complaints();
        ensure!(
            matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty(),
            "{}\n{complaints}",
            outcome.ending
        );
        Figures::parse(&outcome.output)
    };
    let translating = boot(Variant::Translating, &["--bench"], "nvme-nopt")?;
    let passing = boot(Variant::Usual, &["--bench", "--brief"], "nvme-pt")?;

    let page = page(&facts(&lab.root.version, &image, &fio)?, &translating, &passing);
    for (path, content) in [(PAGE, page), (PLOT, plot(&translating))] {
        fs::write(payload::workspace().join(path), content)?;
        ui::status("Wrote", path);
    }
    let missed = missed(&translating);
    missed.iter().for_each(|missed| ui::error(missed));
    Ok(missed.is_empty())
}

fn page(facts: &str, translating: &Figures, passing: &Figures) -> String {
    let targets: Vec<_> = TARGETS
        .iter()
        .map(|(depth, target)| {
            let ratio = translating.ratio(Load::reads(*depth), "driver").unwrap_or(f64::NAN);
            format!("- depth {depth}: **{ratio:.1} times** the kernel's IOPS (at least {target})\n")
        })
        .collect();
    format!(
        "\
# The NVMe driver in user space compared with the kernel's

`cargo lab bench nvme` writes this page and its plot. It boots a kernel in QEMU and runs two programs
alternately on one device: the example `nvme`, a driver in safe Rust on this crate, and fio on the
kernel's driver. Both make random reads and writes with one thread, as fast as possible. Between runs
the device is bound to the other driver, vfio-pci or nvme. The device is QEMU's nvme on a null back
end, which does no work, so the benchmark measures the software between a program and its device. The
guest is emulated, so the result depends mainly on the number of instructions. Use the ratios; the
absolute figures are those of the emulator.

{facts}
## The IOMMU translates for both drivers (`iommu=nopt`)

Both drivers have the same protection. With polling and reads of 4096 bytes, the driver reaches at

{}
![IOPS by contender](performance.svg)

{}
## The kernel's devices bypass the IOMMU (`iommu=pt`)

The kernel's driver runs without protection from its device; the driver in user space keeps it.

{}",
        targets.concat(),
        translating.table(),
        passing.table()
    )
}

/// The table of software and hardware that the figures depend on.
fn facts(qemu: &str, image: &Image, fio: &Program) -> Result<String> {
    let processors = processors::description()?;
    Ok(format!(
        "\
| | |
|---|---|
| kernel | linux {} of Debian, two processors, intel-iommu |
| emulator | QEMU {qemu} of Debian, TCG, on {processors} |
| device | QEMU's nvme, `null-co`, blocks of 4096 bytes or of 512 |
| kernel, io_uring | fio {}: `ioengine=io_uring direct=1 numjobs=1 thread` |
| tuned | and `fixedbufs registerfiles norandommap gtod_reduce=1` |
| polled | and `hipri`, on a queue without interrupts (`nvme.poll_queues=1`) |
| `nvme` | `nvme bench --threads 1`, with `--interrupts` or without |
| runs | {ROUNDS} of each contender, of {SECONDS} seconds; the median counts |
",
        image.version, fio.version
    ))
}

fn plot(figures: &Figures) -> String {
    let panels: Vec<_> = TARGETS
        .iter()
        .map(|&(depth, _)| {
            let load = Load::reads(depth);
            let bars = CONTENDERS.iter().filter_map(|&(name, shown)| {
                let value = figures.median(load, name)?;
                let ratio = figures.ratio(load, name)?;
                Some(Bar {
                    label: shown.replace('`', ""),
                    value,
                    text: format!("{} (×{ratio:.1})", grouped(value)),
                    strong: name.starts_with("driver"),
                })
            });
            let title = format!("Random reads of 4096 bytes, depth {depth}: IOPS");
            Panel { title, bars: bars.collect() }
        })
        .collect();
    chart::svg(&panels)
}

fn missed(figures: &Figures) -> Vec<String> {
    let reached = |depth| figures.ratio(Load::reads(depth), "driver").unwrap_or(0.0);
    TARGETS
        .iter()
        .filter(|(depth, target)| reached(*depth) < *target)
        .map(|(depth, target)| {
            let ratio = reached(*depth);
            format!("at depth {depth} the driver reaches {ratio:.1} times the kernel, not {target}")
        })
        .collect()
}

fn parse_row(line: &str) -> Option<((Load, usize), f64)> {
    let fields: Vec<_> = line.split('\t').collect();
    let [operation, block_size, depth, contender, iops] = fields[..] else { return None };
    let load = Load::new(operation, block_size.parse().ok()?, depth.parse().ok()?);
    Some(((load, index(contender)?), iops.parse().ok()?))
}

fn index(contender: &str) -> Option<usize> {
    CONTENDERS.iter().position(|(name, _)| *name == contender)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "round 1 of 3\n\
        row\tread\t4096\t1\tkernel\t1000\nrow\tread\t4096\t1\tdriver\t9500\n\
        row\tread\t4096\t1\tkernel\t900\nrow\tread\t4096\t1\tdriver\t8000\n\
        row\tread\t4096\t1\tkernel\t1100\nrow\tread\t4096\t1\tdriver\t12345\n\
        row\tread\t4096\t32\tkernel\t1000\nrow\tread\t4096\t32\tdriver\t35000\n";

    #[test]
    fn a_table_shows_medians_and_multiples_of_the_kernels() {
        let table = Figures::parse(OUTPUT).unwrap().table();
        assert!(
            table.contains("| read | 4096 | 1 | `nvme`, polled | 9 500 | 8 000–12 345 | 9.5 |\n"),
            "{table}"
        );
    }

    #[test]
    fn a_target_that_is_missed_is_named() {
        let missed = missed(&Figures::parse(OUTPUT).unwrap());
        assert_eq!(missed, ["at depth 32 the driver reaches 35.0 times the kernel, not 36"]);
    }

    #[test]
    fn an_output_without_figures_is_an_error() {
        assert!(Figures::parse("round 1 of 3\n").is_err());
        assert!(Figures::parse("row\tread\t4096\t1\tnobody\t1000\n").is_err());
    }
}
