//! What the targets share: inputs that are lists of messages, and conversations to start from.

mod conversation;
pub mod messages;
pub mod seeds;

pub use conversation::drive;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

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
