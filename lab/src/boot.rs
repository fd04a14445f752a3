//! One boot of one kernel for one payload: QEMU from start to end.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cache;
use crate::guest::{self, Payload};
use crate::heartbeat::{self, Pulse, Standstill};
use crate::kernels::Image;
use crate::klog::{KernelLog, tail};
use crate::machine::{self, Variant};
use crate::qemu::{self, Qemu};
use crate::root::Root;
use crate::ui::{self, Stage};

/// Lines of the kernel log, and of the payload's output, that a failed boot
/// shows.
const TAIL: usize = 25;

/// How often it is looked whether a guest still runs.
const LOOK: Duration = Duration::from_secs(5);

/// How often a guest is booted that the emulator does not bring to its end.
pub const ATTEMPTS: usize = 3;

/// Where boots find their parts and leave their logs.
pub struct Lab {
    pub root: Root,
    pub busybox: PathBuf,
    /// For what a boot leaves behind.
    pub logs: PathBuf,
    pub timeout: Duration,
}

/// How a boot ended.
pub enum Ending {
    /// The payload ran to its end.
    Exited(u8),
    Panicked,
    TimedOut(Duration),
    /// The guest did not run any more, whatever its payload did.
    Stalled(Standstill),
    /// QEMU died of a signal, as it does where it finds itself in error.
    Crashed {
        signal: i32,
        qemu_said: String,
    },
    /// `guest/init` could not set the guest up.
    SetupFailed(String),
    /// QEMU ended, but the guest had not said that the payload did.
    Died {
        qemu_said: String,
    },
}

/// Why a guest's output was followed no further.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// QEMU has ended.
    Output,
    Time,
    Stalled(Standstill),
}

pub struct Outcome {
    pub ending: Ending,
    pub log: KernelLog,
    pub log_path: PathBuf,
    /// What the payload wrote.
    pub output: String,
    pub took: Duration,
}

impl Lab {
    /// Boots a kernel and runs the payload in it; what the payload writes
    /// goes to our standard output as it comes. `label` names the logs.
    ///
    /// Where the emulator crashes or the guest stands still, it is booted again,
    /// and the user is told: that is the emulator's doing, and no answer about what
    /// was to be tested. One that never comes to its end fails.
    pub fn boot(
        &self,
        image: &Image,
        variant: Variant,
        payload: &Payload,
        label: &str,
    ) -> Result<Outcome> {
        for _ in 1..ATTEMPTS {
            let outcome = self.boot_once(image, variant, payload, label)?;
            if !outcome.ending.is_the_emulators() {
                return Ok(outcome);
            }
            ui::warning(&format!("{label}: {}; booting it again", outcome.ending));
        }
        self.boot_once(image, variant, payload, label)
    }

    fn boot_once(
        &self,
        image: &Image,
        variant: Variant,
        payload: &Payload,
        label: &str,
    ) -> Result<Outcome> {
        fs::create_dir_all(&self.logs)?;
        let work = cache::work_directory(&self.logs, "boot-of-")?;
        let initramfs = work.path().join("initramfs");
        let console = work.path().join("console");
        fs::write(&initramfs, guest::initramfs(image, variant, &self.busybox, payload)?)?;

        for (name, size) in machine::disk_files() {
            fs::File::create(work.path().join(name))?.set_len(size)?;
        }
        let what = format!("linux {}{}", image.version, variant.suffix());
        let mut command =
            qemu::command(&self.root, image, variant, work.path(), &initramfs, &console);
        self.run(&mut command, work.path(), &console, &what, label)
    }

    /// Runs a QEMU, whose guest has the markers of `guest/init` in its log, to
    /// its end. `work` is for what it leaves, `what` is what the user is told.
    pub fn run(
        &self,
        command: &mut Command,
        work: &Path,
        console: &Path,
        what: &str,
        label: &str,
    ) -> Result<Outcome> {
        let stage = Stage::new("Booting", what);
        let started = Instant::now();
        let errors = fs::File::create(work.join("qemu"))?;
        let mut qemu = Qemu::start(command.stderr(errors))?;
        let (output, end) = self.stream(&qemu, work, console, &stage)?;
        let signal = if end == End::Output { qemu.child.wait()?.signal() } else { None };
        drop(qemu);
        let took = started.elapsed();

        let log = KernelLog::new(&fs::read(console).unwrap_or_default());
        let log_path = self.logs.join(format!("{label}.kernel.log"));
        fs::write(&log_path, log.as_str())?;
        fs::write(self.logs.join(format!("{label}.output")), &output)?;
        let qemu_said = fs::read_to_string(work.join("qemu"))?;
        let ending = if end == End::Time {
            Ending::TimedOut(self.timeout)
        } else if let End::Stalled(standstill) = end {
            Ending::Stalled(standstill)
        } else if let Some(signal) = signal {
            Ending::Crashed { signal, qemu_said }
        } else if log.panicked() {
            Ending::Panicked
        } else if let Some(reason) = log.setup_failure() {
            Ending::SetupFailed(reason.to_owned())
        } else if let Some(status) = log.payload_status() {
            Ending::Exited(status)
        } else {
            Ending::Died { qemu_said }
        };
        let output = String::from_utf8_lossy(&output).into_owned();
        Ok(Outcome { ending, log, log_path, output, took })
    }

    /// Passes the payload's output on until QEMU ends, or there is no use in
    /// waiting for that.
    fn stream(
        &self,
        qemu: &Qemu,
        work: &Path,
        console: &Path,
        stage: &Stage,
    ) -> Result<(Vec<u8>, End)> {
        let mut all = Vec::new();
        let mut stdout = io::stdout();
        let started = Instant::now();
        let mut pulse = Pulse::new(started);
        let mut next_look = started + LOOK;
        loop {
            let now = Instant::now();
            if now.duration_since(started) >= self.timeout {
                return Ok((all, End::Time));
            }
            if now >= next_look {
                // QEMU makes both at its start.
                let letters = fs::read(work.join(heartbeat::FILE)).unwrap_or_default();
                let logged = fs::metadata(console).map_or(0, |console| console.len() as usize);
                if let Some(standstill) = pulse.look(&letters, logged + all.len(), now) {
                    return Ok((all, End::Stalled(standstill)));
                }
                next_look = now + LOOK;
            }
            let left = self.timeout.saturating_sub(now.duration_since(started));
            match qemu.output.recv_timeout(left.min(next_look.duration_since(now))) {
                Ok(bytes) => {
                    stage.clear();
                    stdout.write_all(&bytes)?;
                    stdout.flush()?;
                    all.extend(bytes);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok((all, End::Output)),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Outcome {
    /// What to show of a boot: nothing, if it went well.
    pub fn complaints(&self) -> String {
        let mut complaints = String::new();
        if !matches!(self.ending, Ending::Exited(_)) {
            complaints = format!(
                "{}\nthe payload's last output:\n{}\nthe kernel's last messages:\n{}\n",
                self.ending,
                tail(&self.output, TAIL),
                self.log.tail(TAIL)
            );
        }
        let offences = self.log.offences();
        if !offences.is_empty() {
            let lines = offences.join("\n");
            complaints += &format!("the kernel complained:\n{lines}\n");
        }
        complaints
    }
}

impl Ending {
    /// Whether it says nothing of what ran in the guest.
    pub fn is_the_emulators(&self) -> bool {
        matches!(self, Self::Stalled(_) | Self::Crashed { .. })
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status @ 129..) => {
                write!(f, "exit status {status}: died of signal {}", status - 128)
            }
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Panicked => write!(f, "the kernel panicked"),
            Self::TimedOut(limit) => {
                write!(f, "not done after {} minutes: killed", limit.as_secs() / 60)
            }
            Self::Stalled(standstill) => write!(f, "the guest stands still: {standstill}"),
            Self::Crashed { signal, qemu_said } => {
                write!(f, "the emulator died of signal {signal}: {}", qemu_said.trim())
            }
            Self::SetupFailed(reason) => write!(f, "the guest could not be set up: {reason}"),
            Self::Died { qemu_said } => {
                write!(f, "the guest ended before its payload did")?;
                match qemu_said.trim() {
                    "" => Ok(()),
                    said => write!(f, ": {said}"),
                }
            }
        }
    }
}
