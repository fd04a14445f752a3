//! The program: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(target_arch = "x86_64")]
    let end = vmm::monitor::run(&clap::Parser::parse());
    #[cfg(not(target_arch = "x86_64"))]
    let end: anyhow::Result<&str> = Err(anyhow::anyhow!("this program needs an x86-64 machine"));
    let code = if end.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    eprintln!("vmm: {}", end.map_or_else(|error| format!("{error:#}"), str::to_owned));
    code
}
