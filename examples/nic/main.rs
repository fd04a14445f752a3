//! A tool for Intel's 82576 and 82574L network cards, in safe Rust: a driver in user space, with the TCP/IP stack
//! smoltcp on top.
//!
//! `cargo run --release --example nic -- get`, or `-- info`, `-- ping ADDRESS`, `-- serve DIR`, `-- forward`,
//! `-- generate`, `-- capture FILE`; without `--device`, on an emulated card, which is connected to whatever the
//! command needs at the other end of its wire.

#![forbid(unsafe_code)]

#[macro_use]
#[path = "../common/say.rs"]
mod say;
mod capture;
mod card;
mod dhcp;
mod dns;
mod fetch;
mod files;
mod forward;
mod generate;
mod get;
mod guard;
mod info;
mod network;
mod options;
mod pattern;
mod pcap;
mod peer;
mod ping;
mod progress;
mod request;
mod response;
mod serve;
mod server;
mod stack;
mod stop;
mod survey;
#[path = "../common/tap.rs"]
mod tap;
#[cfg(test)]
mod tests;
mod traffic;
mod url;

use std::process::ExitCode;

use clap::Parser;
use options::{Options, Task};
use stop::Stop;
use vfio_remap::Result;

fn main() -> ExitCode {
    let options = Options::parse();
    let performed = Stop::on_signals().and_then(|stop| perform(&options, &stop));
    say::end("nic", performed)
}

/// Runs a command until it is done, or until `stop` is set.
fn perform(options: &Options, stop: &Stop) -> Result<()> {
    let common = &options.common;
    match &options.task {
        Task::Info => info::run(common, stop),
        Task::Ping(ping) => ping::run(common, ping, stop),
        Task::Get(get) => get::run(common, get, stop),
        Task::Serve(serve) => serve::run(common, serve, stop),
        Task::Forward(forward) => forward::run(common, forward, stop),
        Task::Generate(generate) => generate::run(common, generate, stop),
        Task::Capture(capture) => capture::run(common, capture, stop),
    }
}
