//! What the targets share: inputs that are lists of messages, and conversations to start from.

pub mod card;
mod conversation;
pub mod input;
pub mod messages;
pub mod passthrough;
pub mod seeds;
pub mod seeds_of_cards;

pub use conversation::drive;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, setrlimit};

/// Shared memory.
pub fn memory(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("its size");
    file.into()
}

/// An eventfd.
pub fn eventfd() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd").into()
}

/// Readies a target's process. Where the environment names a directory by `FUZZ_SEEDS`, inputs to start
/// from are written there, and that is all.
pub fn start(seeds: fn() -> Vec<(String, Vec<u8>)>) {
    if let Some(directory) = std::env::var_os("FUZZ_SEEDS") {
        for (name, seed) in seeds() {
            std::fs::write(Path::new(&directory).join(name), seed).expect("a seed");
        }
        std::process::exit(0);
    }
    // So few that an input which loses descriptors is found when it has run a hundred times.
    setrlimit(Resource::RLIMIT_NOFILE, 256, 256).expect("a limit");
}

/// How many threads of this process have this name, or one that begins with it if it is shorter than names may be.
fn threads(name: &str) -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("the threads of this process");
    let names = tasks.flatten().flat_map(|task| fs::read_to_string(task.path().join("comm")));
    names.filter(|comm| comm.trim_end().starts_with(name)).count()
}

/// Runs a target. Afterwards it waits for the threads that close descriptors of this run, so that what they hold is
/// not taken for lost: libFuzzer compares what a run has allocated and freed.
pub fn run(target: impl FnOnce()) {
    /// A new thread has the name of the first one until it sets its own.
    static UNNAMED: OnceLock<(String, usize)> = OnceLock::new();
    let (name, unnamed) = UNNAMED.get_or_init(|| {
        let name = fs::read_to_string("/proc/self/comm").expect("the name of this process");
        let name = name.trim_end().to_owned();
        (name.clone(), threads(&name))
    });
    target();
    let start = Instant::now();
    let closing = || threads("vfio-user close") + threads("vfio-user disc");
    while threads(name) > *unnamed || closing() > 0 {
        assert!(start.elapsed() < Duration::from_secs(50), "descriptors are not closed");
        std::thread::yield_now();
    }
}
