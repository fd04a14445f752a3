//! With memory decoding off, every alias of a window raises SIGBUS; with it on again, every one works.

use std::os::unix::process::ExitStatusExt;

use vfio_remap::{Device, Placement, Window};

use crate::lab::{self, SUBJECTS, Subject};
use crate::probe;

/// An original, a duplicate of it, one that was relocated and one over a part, all touched.
fn aliases(subject: &Subject, device: &Device) -> Vec<Window> {
    let bar = subject.bar(device);
    let original = bar.map(.., Placement::Anywhere).unwrap();
    let (duplicate, _) = original.duplicate(Placement::Anywhere).unwrap();
    let mut relocated = original.duplicate(Placement::Anywhere).unwrap().0;
    let _ = subject.scratch(&relocated).read();
    relocated.relocate(Placement::Anywhere).unwrap();
    let part = bar.map(subject.part.clone(), Placement::Anywhere).unwrap();
    let windows = vec![original, duplicate, relocated, part];
    for window in &windows {
        let _ = subject.scratch(window).read();
    }
    windows
}

#[test]
fn memory_decoding_revokes_and_restores_every_alias() {
    for subject in &SUBJECTS {
        let device = lab::open(subject.name);
        let windows = aliases(subject, &device);
        let at = |window: &Window| subject.scratch(window);
        let read = || -> Vec<u32> { windows.iter().map(|window| at(window).read()).collect() };
        let before = read();
        let config = device.config().unwrap();
        config.set_memory_decoding(false).unwrap();
        for window in &windows {
            let offset = (subject.scratch.0 - window.region_range().start) as usize;
            let address = window.as_ptr() as usize + offset;
            assert_eq!(probe::load(address), None, "{} {window:?}", subject.name);
        }
        config.set_memory_decoding(true).unwrap();
        assert_eq!(read(), before, "{}", subject.name);
        drop(windows);
        device.close().unwrap();
    }
}

#[test]
fn memory_decoding_off_is_a_sigbus_through_every_alias() {
    for subject in ["edu", "ivshmem64m"] {
        for alias in 0..4 {
            let environment = [("SUBJECT", subject.to_owned()), ("ALIAS", alias.to_string())];
            let status = lab::child("revocation::dies_of_sigbus", &environment, None);
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{subject} {alias}: {status}");
        }
    }
}

#[test]
#[ignore = "a child of the test above: it dies of SIGBUS"]
fn dies_of_sigbus() {
    let name = std::env::var("SUBJECT").unwrap();
    let alias: usize = std::env::var("ALIAS").unwrap().parse().unwrap();
    let subject = SUBJECTS.iter().find(|subject| subject.name == name).unwrap();
    let device = lab::open(subject.name);
    let windows = aliases(subject, &device);
    device.config().unwrap().set_memory_decoding(false).unwrap();
    let window = &windows[alias];
    let offset = (subject.scratch.0 - window.region_range().start) as usize;
    load_or_die(window.as_ptr() as usize + offset);
}

/// Loads 32 bits at `address`, whatever comes of it: SIGSEGV or SIGBUS if it faults.
fn load_or_die(address: usize) -> u32 {
    // SAFETY: a load of four bytes from an address that a window maps, by a child that may die of it.
    unsafe { (address as *const u32).read_volatile() }
}
