//! Windows are revoked and restored; and what becomes of their device when somebody else takes it away.

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::{FaultCause, Revoked};
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::transport::region_index;
use vfio_remap::{Device, Placement, Window};

use crate::lab::{self, SUBJECTS, Subject};
use crate::{leftovers, probe};

/// The command register and its bit for memory decoding (PCI 3.0 §6.2.2).
const COMMAND: u64 = 4;
const MEMORY: u16 = 2;

/// The capability of power management, and the offset in it of the register that has the state
/// (PCI Power Management 1.2 §3.2.4).
const POWER_MANAGEMENT: u8 = 1;
const CONTROL_STATUS: u64 = 4;
const D3_HOT: u16 = 3;

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

/// Changes 16 bits of configuration space, as another holder of the device does: past the crate's books.
fn change(device: &Device, offset: u64, clear: u16, set: u16) {
    let mut bytes = [0; 2];
    let transport = device.transport();
    transport.read_at(region_index::CONFIG, offset, &mut bytes).unwrap();
    let value = u16::from_le_bytes(bytes) & !clear | set;
    transport.write_at(region_index::CONFIG, offset, &value.to_le_bytes()).unwrap();
}

/// What a revoked window reads.
fn absent(window: &Window) -> u32 {
    if window.reads_ones_when_revoked() { u32::MAX } else { 0 }
}

#[test]
fn every_alias_is_revoked_and_restored() {
    leftovers::none_of(|| {
        for subject in &SUBJECTS {
            let device = lab::open(subject.name);
            let windows = aliases(subject, &device);
            let registers: Vec<_> = windows.iter().map(|window| subject.scratch(window)).collect();
            // Up to Linux 6.11, a fault maps all of a window in pages of 4 KiB, which takes an emulated processor
            // seconds for 4 GiB.
            let first = u32::from(subject.name == "ivshmem4g");
            for round in first..2 {
                registers[0].write(subject.scratch.1);
                let kept = (subject.answer)(subject.scratch.1);
                for (window, register) in windows.iter().zip(&registers) {
                    assert_eq!(register.read(), kept, "{} {window:?}", subject.name);
                    window.revoke().unwrap();
                    assert_eq!(register.read(), absent(window), "{} {window:?}", subject.name);
                    register.write(!subject.scratch.1);
                    if round > 0 {
                        window.restore().unwrap();
                    }
                }
                device.restore().into_result().unwrap();
                for register in &registers {
                    assert_eq!(register.read(), kept, "{}: a write came through", subject.name);
                }
            }
            drop((windows, registers));
            device.close().unwrap();
        }
    });
}

#[test]
fn memory_decoding_revokes_and_restores_every_alias() {
    for subject in &SUBJECTS {
        let device = lab::open(subject.name);
        let windows = aliases(subject, &device);
        let read = || -> Vec<u32> {
            windows.iter().map(|window| subject.scratch(window).read()).collect()
        };
        let before = read();
        let config = device.config().unwrap();
        // By this crate, no access faults.
        config.set_memory_decoding(false).unwrap();
        let late = subject.bar(&device).map(.., Placement::Anywhere).unwrap();
        for window in windows.iter().chain([&late]) {
            assert_eq!(subject.scratch(window).read(), absent(window), "{}", subject.name);
            assert_eq!(window.revoked(), Some(Revoked::DecodingOff));
        }
        config.set_memory_decoding(true).unwrap();
        assert_eq!(read(), before, "{}", subject.name);
        assert_eq!(subject.scratch(&late).read(), before[0]);
        // By another holder, each does.
        change(&device, COMMAND, MEMORY, 0);
        for window in &windows {
            let offset = (subject.scratch.0 - window.region_range().start) as usize;
            let address = window.as_ptr() as usize + offset;
            assert_eq!(probe::load(address), None, "{} {window:?}", subject.name);
        }
        change(&device, COMMAND, 0, MEMORY);
        assert_eq!(read(), before, "{}", subject.name);
        drop((windows, late));
        device.close().unwrap();
    }
}

#[test]
fn writes_of_configuration_space_revoke_before_any_fault() {
    // Not that of 4 GiB: up to Linux 6.11 a fault maps all of a window in pages of 4 KiB.
    for subject in SUBJECTS.iter().filter(|subject| subject.name != "ivshmem4g") {
        let device = lab::open(subject.name);
        let windows = aliases(subject, &device);
        let registers: Vec<_> = windows.iter().map(|window| subject.scratch(window)).collect();
        let config = device.config().unwrap();
        let power = config.capability(POWER_MANAGEMENT).unwrap();
        let power = power.map(|it| (it.offset + CONTROL_STATUS, D3_HOT, D3_HOT, Revoked::LowPower));
        let decoding = (COMMAND, MEMORY, 0, Revoked::DecodingOff);
        for (register, clear, set, why) in [decoding].into_iter().chain(power) {
            let before = config.read_u16(register).unwrap();
            config.write_u16(register, before & !clear | set).unwrap();
            for (window, scratch) in windows.iter().zip(&registers) {
                assert_eq!(scratch.read(), absent(window), "{} {window:?}", subject.name);
                scratch.write(!subject.scratch.1);
                assert_eq!(window.revoked(), Some(why), "{}", subject.name);
            }
            config.write_u16(register, before).unwrap();
            // A device may have lost its state in D3hot.
            registers[0].write(subject.scratch.1);
            for (window, scratch) in windows.iter().zip(&registers) {
                let kept = (subject.answer)(subject.scratch.1);
                assert_eq!(scratch.read(), kept, "{} {window:?}", subject.name);
            }
        }
        drop((registers, windows));
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

fn subject() -> &'static Subject {
    let name = std::env::var("SUBJECT").unwrap();
    SUBJECTS.iter().find(|subject| subject.name == name).unwrap()
}

#[test]
#[ignore = "a child of the test above: it dies of SIGBUS"]
fn dies_of_sigbus() {
    let subject = subject();
    let alias: usize = std::env::var("ALIAS").unwrap().parse().unwrap();
    let device = lab::open(subject.name);
    let windows = aliases(subject, &device);
    change(&device, COMMAND, MEMORY, 0);
    let window = &windows[alias];
    let offset = (subject.scratch.0 - window.region_range().start) as usize;
    load_or_die(window.as_ptr() as usize + offset);
}

/// Loads 32 bits at `address`, whatever comes of it: SIGSEGV or SIGBUS if it faults.
fn load_or_die(address: usize) -> u32 {
    // SAFETY: a load of four bytes from an address that a window maps, by a child that may die of it.
    unsafe { (address as *const u32).read_volatile() }
}

/// Runs an ignored test below in a process of its own: the guard is for the whole life of a process.
fn contained(test: &str, subject: &str, rounds: usize) {
    let begun = Instant::now();
    let environment = [("SUBJECT", subject.to_owned())];
    let status = lab::child(&format!("revocation::{test}"), &environment, None);
    assert!(status.success(), "{test} {subject}: {status}");
    println!("{test}, {subject}: {rounds} times in {:.1} s", begun.elapsed().as_secs_f32());
}

#[test]
fn decoding_that_others_switch_off_is_contained() {
    for subject in ["nvme", "edu", "ivshmem64m"] {
        contained("survives_decoding", subject, rounds());
    }
}

#[test]
fn a_sleep_that_others_cause_is_contained() {
    // Linux 5.10 looks at memory decoding only: no access faults.
    if lab::kernel() != "5.10" {
        contained("survives_sleep", "nvme", rounds());
        contained("survives_sleep", "e1000e", rounds());
    }
}

#[test]
fn a_reset_by_others_revokes_nothing() {
    contained("waits_for_resets", "nvme", RESETS);
}

/// How often devices are taken away, by each cause.
fn rounds() -> usize {
    lab::rounds(50)
}

/// How often one is reset by others.
const RESETS: usize = 10;

/// Runs `act` again and again while a thread for each window reads and writes its scratch register. Each round
/// ends when each thread has made an access since `act` began.
fn under_load(subject: &Subject, windows: &[Window], rounds: usize, act: impl Fn(usize)) {
    let stop = AtomicBool::new(false);
    let turns: Vec<AtomicU64> = windows.iter().map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for (window, turns) in windows.iter().zip(&turns) {
            let (register, stop) = (subject.scratch(window), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = register.read();
                    register.write(subject.scratch.1);
                    turns.fetch_add(1, Ordering::Release);
                }
            });
        }
        for round in 0..rounds {
            let before: Vec<_> = turns.iter().map(|turns| turns.load(Ordering::Acquire)).collect();
            act(round);
            until("each thread has gone on", || {
                turns
                    .iter()
                    .zip(&before)
                    .all(|(turns, before)| turns.load(Ordering::Acquire) > before + 1)
            });
        }
    });
}

/// Tells threads to stop, also when a test has failed.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "it does not come about that {what}");
        std::thread::yield_now();
    }
}

/// Has others take the device away and bring it back, under load: each window is revoked at its fault, and
/// restored.
fn comes_and_goes(expected: FaultCause, away: impl Fn(&Device), back: impl Fn(&Device)) {
    FaultGuard::install(FaultScope::WindowOnly).unwrap();
    let subject = subject();
    let device = lab::open(subject.name);
    let windows = aliases(subject, &device);
    under_load(subject, &windows, rounds(), |_| {
        away(&device);
        until("all are revoked", || windows.iter().all(Window::is_revoked));
        assert_eq!(windows[3].revoked(), Some(Revoked::Fault(expected)), "{}", subject.name);
        back(&device);
        device.restore().into_result().unwrap();
        assert!(!windows.iter().any(Window::is_revoked));
    });
    subject.scratch(&windows[0]).write(subject.scratch.1);
    let kept = (subject.answer)(subject.scratch.1);
    for window in &windows {
        assert_eq!(subject.scratch(window).read(), kept, "{}", subject.name);
    }
    drop(windows);
    device.close().unwrap();
}

#[test]
#[ignore = "a child of a test above"]
fn survives_decoding() {
    comes_and_goes(
        FaultCause::DecodingOff,
        |device| change(device, COMMAND, MEMORY, 0),
        |device| change(device, COMMAND, 0, MEMORY),
    );
}

#[test]
#[ignore = "a child of a test above"]
fn survives_sleep() {
    let state = |device: &Device| {
        let capability = device.config().unwrap().capability(POWER_MANAGEMENT).unwrap();
        capability.expect("it has power states").offset + CONTROL_STATUS
    };
    comes_and_goes(
        FaultCause::LowPower,
        |device| change(device, state(device), D3_HOT, D3_HOT),
        |device| change(device, state(device), D3_HOT, 0),
    );
}

#[test]
#[ignore = "a child of a test above"]
fn waits_for_resets() {
    FaultGuard::install(FaultScope::WholeDevice).unwrap();
    let subject = subject();
    let device = lab::open(subject.name);
    let windows = aliases(subject, &device);
    under_load(subject, &windows, RESETS, |_| {
        device.transport().reset().unwrap();
        assert!(!windows.iter().any(Window::is_revoked));
    });
    // By this crate, the windows are revoked for as long as it takes.
    under_load(subject, &windows, 3, |_| {
        let outage = device.reset().unwrap();
        assert_eq!((outage.revoked.changed(), outage.restored.changed()), (4, 4), "{outage}");
        assert!(outage.is_over(), "{outage}");
    });
    drop(windows);
    device.close().unwrap();
}
