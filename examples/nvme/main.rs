//! A tool for NVMe controllers, in safe Rust: it identifies, copies, verifies and measures.
//!
//! `cargo run --release --example nvme -- verify`, or `-- identify`, `-- bench`, `-- read FILE`, `-- write
//! FILE`; without `--device`, on an emulated controller in a separate process.

#![forbid(unsafe_code)]

#[macro_use]
#[path = "../common/say.rs"]
mod say;
mod bench;
#[path = "../common/mod.rs"]
mod common;
mod copy;
mod guard;
mod histogram;
mod mover;
mod options;
mod pattern;
mod progress;
mod session;
mod show;
mod stop;
#[cfg(test)]
mod tests;
mod verify;

use std::process::ExitCode;

use clap::Parser;
use options::{Options, Task};
use vfio_remap::Result;

fn main() -> ExitCode {
    if let Some(served) = common::served() {
        return served;
    }
    say::end("nvme", perform(&Options::parse()))
}

fn perform(options: &Options) -> Result<()> {
    match &options.task {
        Task::Identify => show::identify(options),
        Task::Read(copy) => copy::read(options, copy),
        Task::Write(copy) => copy::write(options, copy),
        Task::Verify(verify) => verify::run(options, verify),
        Task::Bench(bench) => bench::run(options, bench),
    }
}
