//! What the guest reaches by ports and by memory that no slot has: the serial port, PCI, and the reset port.

use std::io::{self, Stdout, Write as _};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::machine::{Machine, lock};
use crate::pci::Pci;

/// The first serial port, and its interrupt.
const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = 0x3ff;
const SERIAL_INTERRUPT: u32 = 4;
/// The command port of a keyboard controller, and its command to pulse the reset line.
const KEYBOARD: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// Why the guest has ended; or what has failed.
pub type End = Result<&'static str>;
/// Also by a triple fault: a fault while a fault in the handler of a fault was handled.
pub const RESET: &str = "the guest has reset the machine";
pub const HALTED: &str = "the guest has halted or powered off";
pub const STOPPED: &str = "stopped by a signal";

/// Everything that processors share.
pub struct Platform {
    serial: Mutex<Serial<SerialInterrupt, NoEvents, Stdout>>,
    pci: Mutex<Pci>,
    end: Mutex<Option<End>>,
    /// Readable when there is an end.
    pub ended: EventFd,
}

/// The eventfd of the serial port's interrupt.
struct SerialInterrupt(EventFd);

impl Trigger for SerialInterrupt {
    type E = nix::Error;

    fn trigger(&self) -> nix::Result<()> {
        self.0.write(1).map(drop)
    }
}

fn eventfd() -> Result<EventFd> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .context("cannot make an eventfd")
}

impl Platform {
    pub fn new(machine: &Machine, pci: Pci) -> Result<Self> {
        let interrupt = eventfd()?;
        machine.connect_pin(interrupt.as_fd(), None, SERIAL_INTERRUPT)?;
        Ok(Self {
            serial: Mutex::new(Serial::new(SerialInterrupt(interrupt), io::stdout())),
            pci: Mutex::new(pci),
            end: Mutex::default(),
            ended: eventfd()?,
        })
    }

    /// Ends the guest.
    pub fn end(&self, end: End) {
        lock(&self.end).get_or_insert(end);
        // It fails only if the counter is at its end, and then it is readable.
        let _ = self.ended.write(1);
    }

    /// Why it has ended, if it has.
    pub fn take_end(&self) -> Option<End> {
        lock(&self.end).take()
    }

    pub fn into_pci(self) -> Pci {
        self.pci.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn pci(&self) -> MutexGuard<'_, Pci> {
        lock(&self.pci)
    }

    /// Gives the guest what was typed.
    pub fn type_in(&self, bytes: &[u8]) {
        // What does not fit into its buffer is lost, as on a real line.
        let _ = lock(&self.serial).enqueue_raw_bytes(bytes);
    }

    /// How many bytes [`type_in`](Self::type_in) takes now.
    pub fn room(&self) -> usize {
        lock(&self.serial).fifo_capacity()
    }

    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            SERIAL..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                data.iter_mut().for_each(|byte| *byte = serial.read((port - SERIAL) as u8));
            }
            _ => self.pci().read_port(port, data),
        }
    }

    /// Writes a port. One ends the guest.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        match port {
            SERIAL..=SERIAL_LAST => {
                for byte in data.iter().filter(|_| has_room(io::stdout(), &self.ended)) {
                    let mut serial = lock(&self.serial);
                    // Standard output may be closed; the guest runs on.
                    let _ = serial.write((port - SERIAL) as u8, *byte);
                    let _ = serial.writer_mut().flush();
                }
            }
            KEYBOARD if data == [PULSE_RESET] => self.end(Ok(RESET)),
            _ => self.pci().write_port(port, data),
        }
    }
}

/// Waits, without a lock, until `output` takes a byte. `false` if `ended` is readable before.
fn has_room(output: impl AsFd, ended: impl AsFd) -> bool {
    let room = PollFd::new(output.as_fd(), PollFlags::POLLOUT);
    let mut fds = [room, PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
    // The monitor interrupts processors.
    while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
    fds[0].any() != Some(false)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::fcntl::OFlag;

    use super::*;

    #[test]
    fn an_output_that_nobody_reads_holds_nobody_at_the_end() {
        let (input, output) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let ended = eventfd().unwrap();
        assert!(has_room(&output, &ended));
        let mut full = File::from(output.try_clone().unwrap());
        while full.write(&[0; 4096]).is_ok() {}
        let waited = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| has_room(&output, &ended));
            ended.write(1).unwrap();
            waiting.join().unwrap()
        });
        assert!(!waited);
        // One that is closed takes everything: a write fails.
        drop(input);
        assert!(has_room(&output, &ended));
    }
}
