//! Interrupts in an asynchronous program: tokio's `AsyncFd` accepts a vector.
//!
//! `cargo run --release --example async_interrupts` computes factorials on an emulated edu device, which raises
//! an interrupt when one is done.

#![forbid(unsafe_code)]

#[macro_use]
#[path = "common/say.rs"]
mod say;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::io::unix::AsyncFd;
use vfio_remap::device::{Interrupt, Vector};
use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::{Device, IoRegister, Result};

/// Computes factorials on an emulated edu device, and waits for its interrupts as a task.
#[derive(Parser)]
struct Options {}

/// Waits until the vector has fired. Other tasks run meanwhile.
async fn fired(vector: &AsyncFd<Vector>) -> std::io::Result<u64> {
    loop {
        let mut guard = vector.readable().await?;
        match guard.get_inner().take()? {
            // The readiness was old: tokio has to poll again.
            None => guard.clear_ready(),
            Some(count) => return Ok(count),
        }
    }
}

fn main() -> ExitCode {
    let Options {} = Options::parse();
    say::end("async_interrupts", factorials())
}

#[tokio::main(flavor = "current_thread")]
async fn factorials() -> Result<()> {
    let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
    device.config()?.set_bus_mastering(true)?;
    let vectors = device.vectors(Interrupt::Msi, 1)?;
    // tokio 1.54 has deprecated this, because a type's descriptor may change. That of a Vector does not.
    #[allow(deprecated)]
    let done = AsyncFd::new(vectors.vector(0)?)?;

    let register = |offset| -> Result<IoRegister<u32>> { device.bar(0)?.trapped_register(offset) };
    let (factorial, status) = (register(0x08)?, register(0x20)?);
    let (causes, acknowledge) = (register(0x24)?, register(0x64)?);
    // Enables the interrupt at the end of a computation.
    status.write(0x80)?;
    for n in 1..=12 {
        factorial.write(n)?;
        fired(&done).await?;
        acknowledge.write(causes.read()?)?;
        say!("{n}! = {}", factorial.read()?);
    }
    drop((done, vectors, factorial, status, causes, acknowledge));
    Ok(device.close()?)
}
