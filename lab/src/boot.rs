//! One boot of one kernel with one payload: QEMU from start to end.

use std::fmt;
use std::fs;
use std::io::{self, IsTerminal, Write};
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
use crate::libtest;
use crate::machine::{self, Variant};
use crate::qemu::{self, Qemu};
use crate::root::Root;
use crate::ui::{self, Stage};

/// Lines of the kernel log, and of the payload's output, that a failed boot
/// shows.
pub const TAIL: usize = 25;

/// How often the lab checks whether a guest still runs.
const LOOK: Duration = Duration::from_secs(5);

/// How often a guest is booted if the emulator crashes or stalls.
const ATTEMPTS: usize = 3;

/// How a payload's output is shown. A file keeps it in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// It is written to standard output immediately.
    AtOnce,
    /// It is written to standard output when the guest has ended, so that the outputs of
    /// concurrent guests do not mix.
    AtTheEnd,
    Never,
}

/// What boots need, and where they write their logs.
#[derive(Clone)]
pub struct Lab {
    pub root: Root,
    pub busybox: PathBuf,
    /// For logs and outputs.
    pub logs: PathBuf,
    pub timeout: Duration,
    pub show: Show,
    /// By how much the rounds of some tests are multiplied: see [`guest::ROUNDS`].
    pub rounds: u32,
}

/// Follows a boot while it runs.
pub trait Watcher {
    /// QEMU has started as this process: again, if the boot is repeated.
    fn started(&mut self, process: u32);
    /// The payload has written this.
    fn output(&mut self, bytes: &[u8]);
}

/// Nobody follows it.
impl Watcher for () {
    fn started(&mut self, _process: u32) {}

    fn output(&mut self, _bytes: &[u8]) {}
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The payload ran to its end.
    Exited(u8),
    Panicked,
    TimedOut(Duration),
    /// The guest no longer ran.
    Stalled(Standstill),
    /// A signal killed QEMU, for example after a failed assertion.
    Crashed {
        signal: i32,
        qemu_said: String,
    },
    /// `guest/init` could not set the guest up.
    SetupFailed(String),
    /// QEMU ended before the guest reported the end of the payload.
    Died {
        qemu_said: String,
    },
}

/// Why reading a guest's output ended.
#[derive(Clone, Copy)]
enum End {
    /// QEMU has ended, killed by this signal if there is one.
    Output(Option<i32>),
    Time,
    Stalled(Standstill),
}

pub struct Outcome {
    pub ending: Ending,
    pub log: KernelLog,
    pub log_path: PathBuf,
    /// The output of the payload.
    pub output: String,
    pub took: Duration,
    /// The attempts before this one.
    pub given_up: Vec<Attempt>,
}

/// A boot without a result.
pub struct Attempt {
    pub ending: Ending,
    pub log_path: PathBuf,
}

impl Lab {
    /// Boots a kernel and runs the payload in it. `label` names the logs.
    ///
    /// If the emulator crashes or the guest stalls, this prints a warning and boots the
    /// guest again: the emulator is at fault, and the boot has no result. But if a test
    /// had already failed, or the kernel had complained, that is the result. After
    /// [`ATTEMPTS`] boots without a result, the boot has failed. The logs of earlier
    /// attempts are kept under other names.
    pub fn boot(
        &self,
        image: &Image,
        variant: Variant,
        payload: &Payload,
        label: &str,
    ) -> Result<Outcome> {
        self.boot_watched(image, variant, payload, label, &mut ())
    }

    /// As [`boot`](Self::boot), followed by `watcher`.
    pub fn boot_watched(
        &self,
        image: &Image,
        variant: Variant,
        payload: &Payload,
        label: &str,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome> {
        // Removes the logs of an earlier run.
        for number in 1..ATTEMPTS {
            for path in self.leavings(&attempt(label, number)) {
                fs::remove_file(path).or_else(unless_missing)?;
            }
        }
        let mut given_up = Vec::new();
        loop {
            let outcome = self.boot_once(image, variant, payload, label, watcher)?;
            let number = given_up.len() + 1;
            if !outcome.has_no_result() || number == ATTEMPTS {
                return Ok(Outcome { given_up, ..outcome });
            }
            ui::warning(&format!("{label}: {}; booting it again", outcome.ending));
            let kept = self.leavings(&attempt(label, number));
            for (from, to) in self.leavings(label).iter().zip(&kept) {
                fs::rename(from, to)?;
            }
            let [log_path, _] = kept;
            given_up.push(Attempt { ending: outcome.ending, log_path });
        }
    }

    /// The files for the kernel's log and the payload's output.
    fn leavings(&self, label: &str) -> [PathBuf; 2] {
        ["kernel.log", "output"].map(|what| self.logs.join(format!("{label}.{what}")))
    }

    fn boot_once(
        &self,
        image: &Image,
        variant: Variant,
        payload: &Payload,
        label: &str,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome> {
        fs::create_dir_all(&self.logs)?;
        let work = cache::work_directory(&self.logs, "boot-of-")?;
        let initramfs = work.path().join("initramfs");
        let console = work.path().join("console");
        let terminal = self.show == Show::AtOnce && io::stdout().is_terminal();
        let (busybox, rounds) = (&self.busybox, self.rounds);
        let archive = guest::initramfs(image, variant, busybox, payload, terminal, rounds)?;
        fs::write(&initramfs, archive)?;

        for (name, size) in machine::disk_files() {
            fs::File::create(work.path().join(name))?.set_len(size)?;
        }
        let what = format!("linux {}{}", image.version, variant.suffix());
        let mut command =
            qemu::command(&self.root, image, variant, work.path(), &initramfs, &console);
        self.run_watched(&mut command, work.path(), &console, &what, label, watcher)
    }

    /// Runs QEMU to its end. The guest writes the markers of `guest/init` to its log.
    /// `work` is for temporary files; messages call the boot `what`.
    pub fn run(
        &self,
        command: &mut Command,
        work: &Path,
        console: &Path,
        what: &str,
        label: &str,
    ) -> Result<Outcome> {
        self.run_watched(command, work, console, what, label, &mut ())
    }

    fn run_watched(
        &self,
        command: &mut Command,
        work: &Path,
        console: &Path,
        what: &str,
        label: &str,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome> {
        let mut stage = Stage::new("Booting", what);
        let started = Instant::now();
        let errors = fs::File::create(work.join("qemu"))?;
        let mut qemu = Qemu::start(command.stderr(errors))?;
        watcher.started(qemu.child.id());
        let (output, end) = self.stream(&mut qemu, work, console, what, &mut stage, watcher)?;
        drop(qemu);
        let took = started.elapsed();
        if self.show == Show::AtTheEnd {
            stage.clear();
            let told = format!("{what} ({label}) in {:.1} s", took.as_secs_f32());
            ui::output("Booted", &told, &output)?;
        }

        let log = KernelLog::new(&fs::read(console).unwrap_or_default());
        let [log_path, output_path] = self.leavings(label);
        fs::write(&log_path, log.as_str())?;
        fs::write(output_path, &output)?;
        let qemu_said = fs::read_to_string(work.join("qemu"))?;
        let ending = Ending::judge(&log, end, self.timeout, qemu_said);
        let output = String::from_utf8_lossy(&output).into_owned();
        Ok(Outcome { ending, log, log_path, output, took, given_up: Vec::new() })
    }

    /// Reads the payload's output until QEMU ends, the time limit passes, or the guest
    /// stalls.
    fn stream(
        &self,
        qemu: &mut Qemu,
        work: &Path,
        console: &Path,
        what: &str,
        stage: &mut Stage,
        watcher: &mut dyn Watcher,
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
                // QEMU creates both files when it starts.
                let letters = fs::read(work.join(heartbeat::FILE)).unwrap_or_default();
                let logged = fs::metadata(console).map_or(0, |console| console.len() as usize);
                if let Some(standstill) = pulse.look(&letters, logged + all.len(), now) {
                    return Ok((all, End::Stalled(standstill)));
                }
                next_look = now + LOOK;
            }
            let left = self.timeout.saturating_sub(now.duration_since(started));
            let received = qemu.output.recv_timeout(left.min(next_look.duration_since(now)));
            if let Ok(bytes) = &received {
                watcher.output(bytes);
            }
            match received {
                Ok(bytes) if self.show == Show::AtOnce => {
                    stage.clear();
                    stdout.write_all(&bytes)?;
                    stdout.flush()?;
                    all.extend(bytes);
                }
                Ok(bytes) => {
                    all.extend(bytes);
                    stage.progress(&format!("{what}: {}", last_line(&all)));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok((all, End::Output(qemu.child.wait()?.signal())));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// The last line of an output that is not blank.
fn last_line(output: &[u8]) -> String {
    const MOST: usize = 200;
    let end = String::from_utf8_lossy(&output[output.len().saturating_sub(MOST)..]);
    let mut lines = end.lines().rev();
    lines.find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
}

/// The label of an earlier attempt.
fn attempt(label: &str, number: usize) -> String {
    format!("{label}.attempt-{number}")
}

fn unless_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

impl Outcome {
    /// Whether the boot has no result: the emulator crashed or stalled, and no test had
    /// failed until then.
    fn has_no_result(&self) -> bool {
        matches!(self.ending, Ending::Stalled(_) | Ending::Crashed { .. })
            && self.log.offences().is_empty()
            && !libtest::has_failed(&self.output)
    }

    /// The problems of a boot, as text; empty if there are none.
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
    /// What the guest reported takes precedence over how the emulator ended.
    fn judge(log: &KernelLog, end: End, timeout: Duration, qemu_said: String) -> Self {
        if log.panicked() {
            return Self::Panicked;
        }
        if let Some(reason) = log.setup_failure() {
            return Self::SetupFailed(reason.to_owned());
        }
        if let Some(status) = log.payload_status() {
            return Self::Exited(status);
        }
        match end {
            End::Time => Self::TimedOut(timeout),
            End::Stalled(standstill) => Self::Stalled(standstill),
            End::Output(Some(signal)) => Self::Crashed { signal, qemu_said },
            End::Output(None) => Self::Died { qemu_said },
        }
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
            Self::Stalled(standstill) => write!(f, "the guest has stalled: {standstill}"),
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

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The outcome of a boot whose QEMU ended by itself.
    pub fn ended(log: &str, output: &str) -> Outcome {
        outcome(log, End::Output(None), output)
    }

    const STALLED: End = End::Stalled(Standstill::Silence);
    const CRASHED: End = End::Output(Some(6));

    fn outcome(log: &str, end: End, output: &str) -> Outcome {
        let log = KernelLog::new(format!("lab: payload starts\n{log}").as_bytes());
        Outcome {
            ending: Ending::judge(&log, end, Duration::from_secs(60), String::new()),
            log,
            log_path: PathBuf::new(),
            output: output.to_owned(),
            took: Duration::ZERO,
            given_up: Vec::new(),
        }
    }

    #[test]
    fn what_the_guest_reported_takes_precedence() {
        for end in [STALLED, CRASHED, End::Time, End::Output(None)] {
            let ending = |log| outcome(log, end, "").ending;
            assert_eq!(ending("Kernel panic - not syncing: x"), Ending::Panicked);
            assert_eq!(ending("lab: setup failed: x"), Ending::SetupFailed("x".to_owned()));
            assert_eq!(ending("lab: payload ended with status 7"), Ending::Exited(7));
        }
        assert_eq!(outcome("", STALLED, "").ending, Ending::Stalled(Standstill::Silence));
        assert!(matches!(outcome("", CRASHED, "").ending, Ending::Crashed { signal: 6, .. }));
        assert!(matches!(outcome("", End::Time, "").ending, Ending::TimedOut(_)));
        assert!(matches!(outcome("", End::Output(None), "").ending, Ending::Died { .. }));
    }

    #[test]
    fn progress_is_the_last_line_that_is_not_blank() {
        assert_eq!(last_line(b"test a ... ok\ntest b ... "), "test b ... ");
        assert_eq!(last_line(b"test a ... ok\n\n"), "test a ... ok");
        assert_eq!(last_line(b""), "");
    }

    #[test]
    fn only_a_boot_without_a_result_is_repeated() {
        for end in [STALLED, CRASHED] {
            assert!(outcome("", end, "test a ... ok\ntest b ... ").has_no_result());
            assert!(!outcome("", end, "test a ... FAILED\ntest b ... ").has_no_result());
            assert!(!outcome("BUG: Bad page map", end, "test a ... ").has_no_result());
            assert!(!outcome("lab: payload ended with status 0", end, "").has_no_result());
        }
        assert!(!outcome("", End::Time, "").has_no_result());
        assert!(!outcome("", End::Output(None), "").has_no_result());
    }
}
