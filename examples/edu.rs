//! Uses QEMU's educational device, in safe Rust: liveness, factorials by polling and by interrupt, DMA in both
//! directions.
//!
//! `cargo run --release --example edu`; add `-- --device` with `vfio-user:PATH` or a PCI address for another
//! device.

#![forbid(unsafe_code)]

#[macro_use]
#[path = "common/say.rs"]
mod say;
mod common;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vfio_remap::device::Interrupt;
use vfio_remap::{Error, ErrorKind, Result};
use vfio_remap_edu::Edu;

/// Drives QEMU's educational device.
#[derive(Parser)]
struct Options {
    /// emulated:edu, vfio-user:PATH, or a PCI address
    #[arg(long, value_name = "DEVICE", default_value = "emulated:edu")]
    device: String,
    /// The kind of interrupt
    #[arg(long, value_enum, default_value = "msi")]
    interrupt: Kind,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Intx,
    Msi,
}

fn main() -> ExitCode {
    if let Some(served) = common::served() {
        return served;
    }
    say::end("edu", drive(&Options::parse()))
}

fn drive(options: &Options) -> Result<()> {
    let common::Opened { device, process } = common::open(&options.device)?;
    let interrupt = match options.interrupt {
        Kind::Intx => Interrupt::Intx,
        Kind::Msi => Interrupt::Msi,
    };
    let name = device.name().to_owned();
    let edu = Edu::new(device, interrupt)?;
    say!("{name}: identification {:#010x}", edu.id()?);
    expect("liveness", edu.liveness(0x1234_5678)?, !0x1234_5678)?;
    expect("10! by polling", edu.factorial_polled(10)?, 3_628_800)?;
    expect("12! by interrupt", edu.factorial(12)?, 479_001_600)?;
    edu.ring()?;
    say!("the interrupt arrived");
    let sent: Vec<u8> = (0..4096u32).map(|n| (n % 251) as u8).collect();
    edu.buffer().write(0, &sent);
    edu.there_and_back(0, 4096, 4096)?;
    let mut received = vec![0; sent.len()];
    edu.buffer().read(4096, &mut received);
    expect("bytes that differ after DMA in both directions", differing(&sent, &received), 0)?;
    edu.close()?;
    drop(process);
    Ok(())
}

fn differing(one: &[u8], other: &[u8]) -> u32 {
    one.iter().zip(other).filter(|(one, other)| one != other).count() as u32
}

fn expect(what: &str, found: u32, expected: u32) -> Result<()> {
    say!("{what}: {found:#x}");
    if found == expected {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Malformed, "check", what)
        .with_reason(format!("found {found:#x}, expected {expected:#x}")))
}
