//! Estimates how long `cargo lab test` will take, and prints it at the start.

use anyhow::Result;

use crate::cache::Store;
use crate::kernels::Kernel;
use crate::payload;
use crate::ui;

/// Times in seconds on two idle processors, if all programs are built and all kernels are in
/// the cache: the host's tests with fuzzing, and the boots of one kernel while another kernel
/// is booted.
const HOST: u64 = 120;
const KERNEL: u64 = 65;

/// Additional times of the first run, in seconds: building the programs of the host and of
/// guests, fetching QEMU or a kernel, building a kernel.
const HOST_PROGRAMS: u64 = 100;
const GUEST_PROGRAMS: u64 = 80;
const FETCHING: u64 = 15;
const KERNEL_BUILD: u64 = 420;

/// The work of a run.
#[derive(Default)]
struct Work {
    host: bool,
    kernels: u64,
    host_programs: bool,
    guest_programs: bool,
    to_fetch: u64,
    to_build: u64,
}

/// Prints how long the tests of these kernels, and of the host if `host`, will take.
pub fn print(store: &Store, kernels: &[&'static Kernel], host: bool) -> Result<()> {
    let target = payload::workspace().join("target");
    let mut work = Work {
        host,
        kernels: kernels.len() as u64,
        // This checks whether there are builds, not whether they are up to date.
        host_programs: host && !target.join("release/deps").exists(),
        guest_programs: !kernels.is_empty() && !target.join("lab/release").exists(),
        ..Work::default()
    };
    if !kernels.is_empty() && !store.directory.join("qemu").exists() {
        work.to_fetch += 1;
    }
    for kernel in kernels {
        if kernel.is_to_be_built(store)? {
            work.to_build += 1;
        } else if !store.directory.join("kernels").join(kernel.name).exists() {
            work.to_fetch += 1;
        }
    }
    ui::status("Testing", &work.to_string());
    Ok(())
}

impl Work {
    fn seconds(&self) -> u64 {
        let first = |is: bool, seconds| if is { seconds } else { 0 };
        first(self.host, HOST)
            + self.kernels * KERNEL
            + first(self.host_programs, HOST_PROGRAMS)
            + first(self.guest_programs, GUEST_PROGRAMS)
            + self.to_fetch * FETCHING
            + self.to_build * KERNEL_BUILD
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let counted =
            |count, what: &str| (count > 0).then(|| format!("{count} {what}{}", plural(count)));
        let host = self.host.then(|| "the host".to_owned());
        let tested: Vec<_> = host.into_iter().chain(counted(self.kernels, "kernel")).collect();
        let minutes = self.seconds().div_ceil(60);
        write!(f, "{}: about {minutes} min on two quiet cores", tested.join(" and "))?;
        let programs = self.host_programs || self.guest_programs;
        let first = [
            counted(self.to_fetch, "download"),
            counted(self.to_build, "kernel build"),
            programs.then(|| "the programs to build".to_owned()),
        ];
        let first: Vec<_> = first.into_iter().flatten().collect();
        if first.is_empty() { Ok(()) } else { write!(f, ", with {}", first.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_the_first_run_is_named() {
        let warm = Work { host: true, kernels: 5, ..Work::default() };
        let told = warm.to_string();
        assert!(told.starts_with("the host and 5 kernels: about "), "{told}");
        assert!(told.ends_with(" min on two quiet cores"), "{told}");
        let seconds = warm.seconds();
        let cold = Work { guest_programs: true, to_fetch: 5, to_build: 1, ..warm };
        assert!(cold.seconds() > seconds);
        let told = cold.to_string();
        let end = ", with 5 downloads, 1 kernel build, the programs to build";
        assert!(told.ends_with(end), "{told}");
    }
}
