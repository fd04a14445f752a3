//! Compares the crate `vfio-remap-ethernet` with DPDK's testpmd and with the kernel's drivers: by turns, in one
//! boot, on cards of the same model.
//!
//! It runs only in the lab (`cargo lab bench nic`), which provides the cards, testpmd and the kernel's modules,
//! reads the rows that this prints, and measures the processor time of the turns.

#[path = "../common/guest.rs"]
mod guest;
#[path = "../common/turn.rs"]
mod turn;

mod driver;
mod frame;
mod kernel;
mod testpmd;
mod worker;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

use guest::{Result, lab_device, load_modules};
use turn::Turns;

/// The modules of the kernel's contenders, in the lab's guest; the last of them.
const MODULES: &str = "/lab/network";
const LAST_MODULE: &str = "-pktgen.ko";

/// How long each contender runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);
/// How long a contender may take for what should take it a moment.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// The kernel's contenders, which are not judged, have a turn in every third round.
const KERNEL_EVERY: u32 = 3;

const MODELS: [&str; 2] = ["igb", "e1000e"];

#[derive(Parser)]
struct Options {
    /// How many turns each contender has.
    #[arg(long, default_value_t = 3)]
    turns: u32,
    /// How long each turn is measured.
    #[arg(long, default_value_t = 1000)]
    milliseconds: u64,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if std::env::var_os("LAB_DEVICES").is_none() {
        println!("nic: this benchmark needs the lab's cards; run it with: cargo lab bench nic");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("nic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    load_modules(MODULES, LAST_MODULE, None)?;
    testpmd::prepare()?;
    let mut turns = Turns::default();
    for model in MODELS {
        transmit(model, options, &mut turns)?;
        forward(model, options, &mut turns)?;
    }
    Ok(())
}

/// A program that is compared.
trait Contender {
    fn name(&self) -> &'static str;

    /// Lets it send or forward frames until `measure` returns, which is given how to count them.
    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()>;
}

/// Returns the number of frames so far.
type Count<'a> = &'a mut dyn FnMut() -> Result<u64>;

fn transmit(model: &str, options: &Options, turns: &mut Turns) -> Result<()> {
    let card = |name: &str| lab_device(&format!("{model}-{name}"));
    let interface = kernel::Interface::new(model, &card("kernel")?)?;
    let mut judged: [Box<dyn Contender>; 2] = [
        Box::new(driver::Sender::new(&card("driver")?)?),
        Box::new(testpmd::Testpmd::sending(&card("dpdk")?)?),
    ];
    let mut others: [Box<dyn Contender>; 2] = [
        Box::new(kernel::Pktgen::new(interface.clone())?),
        Box::new(kernel::PacketSocket::new(interface)?),
    ];
    compare(&format!("transmit {model}"), &mut judged, &mut others, options, turns)
}

fn forward(model: &str, options: &Options, turns: &mut Turns) -> Result<()> {
    let cards = |name: &str| -> Result<[_; 2]> {
        let card = |end: &str| lab_device(&format!("{model}-{name}-{end}"));
        Ok([card("a")?, card("b")?])
    };
    let mut judged: [Box<dyn Contender>; 2] = [
        Box::new(driver::Forwarder::new(&cards("driver")?)?),
        Box::new(testpmd::Testpmd::forwarding(&cards("dpdk")?)?),
    ];
    compare(&format!("forward {model}"), &mut judged, &mut [], options, turns)
}

fn compare(
    load: &str,
    judged: &mut [Box<dyn Contender>],
    others: &mut [Box<dyn Contender>],
    options: &Options,
    turns: &mut Turns,
) -> Result<()> {
    println!("{load}: {} turns", options.turns);
    let time = Duration::from_millis(options.milliseconds);
    let mut run = |contender: &mut Box<dyn Contender>| {
        let name = contender.name();
        contender
            .run(&mut |count| {
                runs(count)?;
                thread::sleep(WARM_UP);
                turns.measure(&[load, name], time, count)
            })
            .map_err(|error| format!("{load}, {name}: {error}"))
    };
    for round in 0..options.turns {
        judged.iter_mut().try_for_each(&mut run)?;
        if round % KERNEL_EVERY == 0 {
            others.iter_mut().try_for_each(&mut run)?;
        }
        // None is always first.
        judged.reverse();
    }
    Ok(())
}

/// Waits until frames are counted.
fn runs(count: Count) -> Result<()> {
    let before = count()?;
    wait_until("frames are sent", || Ok(count()? > before))
}

/// Waits for what a contender should soon do.
fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIME_LIMIT;
    while !is_so()? {
        if Instant::now() > deadline {
            return Err(format!("not within {TIME_LIMIT:?}: {what}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
