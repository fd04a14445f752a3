//! `cargo lab bench nvme`: compares the example `nvme` with the kernel's driver, as a
//! page of the documentation.

mod figures;

use std::fs;

use anyhow::{Result, bail, ensure};

use self::figures::Figures;
use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::guest::Payload;
use crate::kernels::{Image, Kernel};
use crate::machine::Variant;
use crate::payload;
use crate::processors;
use crate::program::{FIO, Program};
use crate::turns::Turns;
use crate::ui;

const PAGE: &str = "docs/performance.md";
const PLOT: &str = "docs/performance.svg";

/// The kernel to use unless another is named: the targets were measured on it.
pub const KERNEL: &str = "6.1";

/// What the driver must reach when it polls and reads 4096 bytes, with `iommu=nopt`: a depth, and
/// the kernel's processor time per command as a multiple of the driver's.
const TARGETS: [(u32, f64); 2] = [(1, 5.5), (32, 42.0)];
/// The depths that the page shows.
const DEPTHS: [u32; 3] = [1, 4, 32];

/// How many turns each contender has with each load, and how long one is measured.
const TURNS: u32 = 15;
/// One more, in case a program begins too late in one.
const ROUNDS: u32 = TURNS + 1;
const MILLISECONDS: u32 = 300;

/// The share of the machine's processors that others may use without a warning.
const LOADED: f64 = 0.05;

/// The block node behind the controller.
const NODE: &str = "null-4k";

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
    let boot = |iommu, arguments: &[&str], label: &str| -> Result<(Figures, f64)> {
        let runs = [format!("--turns={ROUNDS}"), format!("--milliseconds={MILLISECONDS}")];
        let arguments: Vec<_> =
            arguments.iter().map(|&argument| argument.to_owned()).chain(runs).collect();
        let payload = Payload { program: &program, arguments: &arguments, files: &files };
        let mut turns = Turns::counting(NODE);
        let label = format!("{}-{label}", kernel.name);
        let outcome = lab.boot_watched(&image, iommu, &payload, &label, &mut turns)?;
        let complaints = outcome.complaints();
        ensure!(
            matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty(),
            "{}\n{complaints}",
            outcome.ending
        );
        let figures = Figures::parse(&outcome.output, &turns.done, TURNS)?;
        Ok((figures, turns.share_of_others()))
    };
    let (translating, others) = boot(Variant::Translating, &["--bench"], "nvme-nopt")?;
    let (passing, more) = boot(Variant::Usual, &["--bench", "--brief"], "nvme-pt")?;

    let others = others.max(more);
    if others > LOADED {
        ui::warning(&format!(
            "other processes used {:.0} % of this machine's processors meanwhile: measure again on \
             a quiet machine",
            100.0 * others
        ));
    }
    let facts = facts(&lab.root.version, &image, &fio, others)?;
    let page = page(&facts, &translating, &passing);
    for (path, content) in [(PAGE, page), (PLOT, translating.plot(&DEPTHS))] {
        fs::write(payload::workspace().join(path), content)?;
        ui::status("Wrote", path);
    }
    let missed = missed(&translating);
    missed.iter().for_each(|missed| ui::error(missed));
    Ok(missed.is_empty())
}

fn page(facts: &str, translating: &Figures, passing: &Figures) -> String {
    let reached: String = DEPTHS
        .iter()
        .map(|depth| {
            let (time, iops) = translating.driver_ratios(*depth);
            let target = TARGETS.iter().find(|(of, _)| of == depth);
            let target = target.map_or(String::new(), |(_, least)| format!(" (at least {least})"));
            let most = translating.most(*depth);
            format!("- depth {depth}: **{time:.1} times**{target}, at {iops:.1} times the IOPS; at most {most:.1}\n")
        })
        .collect();
    format!(
        "\
# The NVMe driver in user space compared with the kernel's

`cargo lab bench nvme` writes this page and its plot. It boots a kernel in QEMU and runs programs by
turns on one device: the example `nvme`, a driver in safe Rust on this crate, and fio on the kernel's
driver. They make random reads and writes as fast as possible. In each round the device is bound to one
driver and then to the other, vfio-pci and nvme. The device is QEMU's nvme on a null back end, which does
no work, so the benchmark measures the software between a program and its device.

The judged figure is the processor time of a command: that of all of QEMU's threads, from
`/proc/PID/task/TID/schedstat`, in which both the guest and the device are emulated. Commands are counted
by the emulator's block layer (`query-blockstats`). Time in which a thread waits for a processor does not
count, and QEMU's threads have the highest priority if the lab runs as root, so it depends little on other
programs. A guest's processor that polls is never idle: with few commands at a time, most of its time is
waiting for the emulator. The emulator's sleeps are those of its main loop and other threads that do not run
the guest's processors; one that sleeps takes some 20 µs to wake. The absolute figures are those of the
emulator; use the ratios. The driver's instructions are counted by `drivers/nvme/tests/cost.rs`.

{facts}
## The IOMMU translates for both drivers (`iommu=nopt`)

Both drivers have the same protection. The kernel's processor time for a read of 4096 bytes, as a multiple
of that of the driver, which polls. `At most` is the multiple for a driver that needs no time itself: the
emulator's other threads need as long for each command, and a processor that polls waits for them as long.

{reached}
![Processor time by contender](performance.svg)

{}
One controller of QEMU serves all of its queues in one thread, QEMU's main loop (`-device nvme,help` shows
no iothread). So a second thread, pinned to the second processor, adds to the kernel's IOPS while the guest
limits them, and not to the driver's, which one thread already brings to the main loop's limit.

## The kernel's devices bypass the IOMMU (`iommu=pt`)

The kernel's driver runs without protection from its device; the driver in user space keeps it.

{}",
        translating.table(),
        passing.table()
    )
}

/// The table of software and hardware that the figures depend on.
fn facts(qemu: &str, image: &Image, fio: &Program, others: f64) -> Result<String> {
    let processors = processors::description()?;
    Ok(format!(
        "\
| | |
|---|---|
| kernel | linux {} of Debian, two processors, intel-iommu |
| emulator | QEMU {qemu} of Debian, TCG, on {processors} |
| device | QEMU's nvme, `null-co`, blocks of 4096 bytes |
| kernel, io_uring | fio {}: `ioengine=io_uring direct=1`, jobs pinned |
| polled | and `fixedbufs registerfiles norandommap gtod_reduce=1 hipri`, on a queue without interrupts (`nvme.poll_queues=1`) |
| io_uring_cmd | the same, but `ioengine=io_uring_cmd cmd_type=nvme` on the generic character device |
| `nvme` | `nvme bench --pin`, `--acknowledge-after=1`, `--interrupts`, or `--interrupts --spin=0` |
| turns | {ROUNDS} of each contender with each load, of {} seconds; one in which the device completed nothing is left out, and at least {TURNS} are left |
| other load | {:.1} % of the machine's processors |
",
        image.version,
        fio.version,
        f64::from(MILLISECONDS) / 1000.0,
        100.0 * others
    ))
}

fn missed(figures: &Figures) -> Vec<String> {
    let missed = TARGETS.iter().filter_map(|(depth, target)| {
        let (ratio, _) = figures.driver_ratios(*depth);
        let is_reached = ratio >= *target;
        (!is_reached).then(|| {
            format!(
                "at depth {depth} the kernel's processor time per command is {ratio:.1} times the \
                 driver's, not {target}"
            )
        })
    });
    missed.collect()
}

#[cfg(test)]
mod tests {
    use super::figures::tests::output;
    use super::*;

    #[test]
    fn a_target_that_is_missed_is_named() {
        let missed_by = |kernel, driver| {
            let (rows, used) = output(kernel, driver);
            missed(&Figures::parse(&rows, &used, 3).unwrap())
        };
        // Nothing was measured at depth 1.
        let [first, second] = &missed_by(410, 10)[..] else { panic!("two are missed") };
        assert!(first.starts_with("at depth 1 "), "{first}");
        assert_eq!(
            second,
            "at depth 32 the kernel's processor time per command is 41.0 times the driver's, not 42"
        );
        assert_eq!(missed_by(430, 10).len(), 1);
    }
}
