//! The program from start to end: makes the machine and its devices, runs the guest, and releases all again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::read;
use vfio_remap::device::{Event, Events};
use vfio_remap::passthrough::Apertures;

use crate::device::Passed;
use crate::machine::Machine;
use crate::memory::{self, HIGH_WINDOW, LOW_WINDOW};
use crate::options::Options;
use crate::pci::Pci;
use crate::platform::{End, HALTED, Platform, STOPPED};
use crate::processor::{self, Processor};
use crate::{boot, mp_table};

/// The I/O ports for BARs: above those of a PC's own devices.
const PORTS: std::ops::Range<u32> = 0x1000..0x1_0000;
/// How often the monitor looks whether the guest has halted, in milliseconds.
const LOOK: u16 = 500;

/// Runs a guest to its end.
pub fn run(options: &Options) -> End {
    // Before any thread is started: all of them block these signals, which then arrive here.
    let signals = signals()?;
    processor::handle_interruptions()?;
    let machine = Arc::new(Machine::new(memory::create(options.memory)?)?);
    let entry =
        boot::load(&machine.memory, &options.kernel, options.initrd.as_deref(), &options.append)?;
    let apertures = Apertures::new(&[LOW_WINDOW, HIGH_WINDOW], PORTS)?;
    let mut watches = Vec::new();
    let mut devices = Vec::new();
    for (slot, source) in (1..).zip(&options.devices) {
        let (device, events) = Passed::open(source, &apertures, &machine, slot)?;
        let name = device.guest.device().name().to_owned();
        watches.extend(events.map(|events| (devices.len(), name, events)));
        devices.push(device);
    }
    mp_table::write(&machine.memory, options.cpus, devices.len() as u8 + 1)?;
    let platform = Arc::new(Platform::new(&machine, Pci::new(machine.clone(), devices)?)?);
    let mut processors = Vec::new();
    let mut started = Ok(());
    for number in 0..options.cpus {
        let entry = (number == 0).then_some(entry);
        let processor = Processor::start(&machine, &platform, (number, options.cpus), entry);
        started = started.and(processor.map(|processor| processors.push(processor)));
    }
    let end = started.and_then(|()| watch(&platform, &processors, &signals, watches));
    // Also for one that waits until its output is read. The first end is the one that counts.
    platform.end(Ok(STOPPED));
    processors.into_iter().for_each(Processor::stop);
    // No processor runs any more: nothing else holds the platform.
    let platform = Arc::into_inner(platform).context("a processor still runs")?;
    let errors = platform.into_pci().release_all();
    ensure!(errors.is_empty(), "not every device could be closed: {}", errors.join("; "));
    end
}

/// SIGTERM and SIGINT as a descriptor.
fn signals() -> Result<SignalFd> {
    let set: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC))
        .context("cannot watch for signals")
}

/// Serves console, signals and events until there is an end, which it returns. `watches` has the events of devices,
/// with their indices on the bus and their names.
fn watch(
    platform: &Platform,
    processors: &[Processor],
    signals: &SignalFd,
    mut watches: Vec<(usize, String, Events)>,
) -> End {
    let stdin = io::stdin();
    let mut input_is_open = true;
    loop {
        let mut fds = vec![readable(platform.ended.as_fd()), readable(signals.as_fd())];
        fds.extend(watches.iter().map(|(_, _, events)| readable(events.as_fd())));
        let room = if input_is_open { platform.room() } else { 0 };
        if room > 0 {
            fds.push(readable(stdin.as_fd()));
        }
        let count = poll(&mut fds, LOOK).context("cannot wait for events")?;
        let ready: Vec<_> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        if ready[0] {
            return platform.take_end().context("the guest has ended without a reason")?;
        }
        if ready[1] {
            return Ok(STOPPED);
        }
        if count == 0 {
            // Not `all`, which would stop at the first that is awake: each is asked.
            if processors.iter().filter(|processor| !processor.was_asleep()).count() == 0 {
                return Ok(HALTED);
            }
            processors.iter().for_each(Processor::interrupt);
        }
        if ready.get(2 + watches.len()) == Some(&true) {
            match typed(&stdin, room).context("cannot read standard input")? {
                Some(bytes) => platform.type_in(&bytes),
                None => input_is_open = false,
            }
        }
        let happened = ready[2..].iter().take(watches.len()).position(|ready| *ready);
        if let Some(index) = happened {
            let (_, name, events) = &watches[index];
            match events.take()? {
                Some(Event::Release) => {
                    eprintln!("vmm: {name} is requested, and is taken from the guest");
                    let (device, ..) = watches.remove(index);
                    platform.pci().release(device)?;
                }
                Some(event) => eprintln!("vmm: {name} has reported an event: {event:?}"),
                None => {}
            }
        }
    }
}

/// What was typed, at most `room` bytes; `None` at the end. The rest stays in the descriptor, so that it is readable:
/// a buffer would hide it from poll(2).
fn typed(input: impl AsFd, room: usize) -> Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; room];
    match read(input, &mut bytes) {
        Ok(0) => return Ok(None),
        Ok(count) => bytes.truncate(count),
        // Another process that has the descriptor was faster, or a signal came.
        Err(Errno::EAGAIN | Errno::EINTR) => bytes.clear(),
        Err(errno) => return Err(errno.into()),
    }
    Ok(Some(bytes))
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::boot::tests::{file, program};
    use crate::platform::RESET;

    /// Runs instructions as a guest. `None` if this machine has no KVM.
    fn ends(name: &str, code: &[u8], devices: &[&str]) -> Option<String> {
        let kernel = file(name, &program(code));
        let mut words = vec!["vmm", "--memory", "16", "--cpus", "2", "--kernel"];
        words.push(kernel.to_str().unwrap());
        words.extend(devices.iter().flat_map(|device| ["--device", device]));
        let end = run(&Options::parse_from(words));
        std::fs::remove_file(&kernel).unwrap();
        match end {
            Ok(end) => Some(end.to_owned()),
            Err(error) if format!("{error:#}").contains("/dev/kvm") => None,
            Err(error) => Some(format!("{error:#}")),
        }
    }

    #[test]
    fn what_the_guest_has_no_room_for_stays_readable() {
        let (input, output) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&output, b"abcdefgh").unwrap();
        let has_more = || poll(&mut [readable(input.as_fd())], 0u8).unwrap() > 0;
        assert_eq!(typed(&input, 5).unwrap().as_deref(), Some(&b"abcde"[..]));
        assert!(has_more());
        assert_eq!(typed(&input, 5).unwrap().as_deref(), Some(&b"fgh"[..]));
        assert!(!has_more());
        drop(output);
        assert_eq!(typed(&input, 5).unwrap(), None);
    }

    #[test]
    fn a_guest_ends_by_halting_by_a_reset_and_by_a_triple_fault() {
        // cli; hlt
        for (name, code, end) in [
            ("halt", &[0xfa, 0xf4][..], HALTED),
            // mov al, 0xfe; out 0x64, al
            ("reset", &[0xb0, 0xfe, 0xe6, 0x64], RESET),
            // ud2
            ("fault", &[0x0f, 0x0b], RESET),
        ] {
            if let Some(found) = ends(name, code, &["emulated:nvme", "emulated:edu"]) {
                assert_eq!(found, end, "{name}");
            }
        }
    }
}
