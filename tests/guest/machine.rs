//! The machine from outside: QEMU's monitor (QMP), at the other end of the third serial port.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// The monitor, ready for commands.
pub struct Machine {
    port: File,
    /// What was read of the next line.
    line: Vec<u8>,
}

impl Machine {
    pub fn open() -> Self {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let mut machine = Self { port: options.open("/dev/ttyS2").unwrap(), line: Vec::new() };
        // No character of any text: the monitor forgets what it has taken for the beginning of a command,
        // such as its own greeting, which the terminal echoes until it is told not to.
        machine.port.write_all(b"\xff\n").unwrap();
        // The monitor takes nothing before this, and refuses it once it was said, by an earlier test.
        let _ = machine.execute("qmp_capabilities", json!({}));
        machine
    }

    /// Asks the guest to let go of a device (`device_del`). It is gone once the guest has done so.
    pub fn unplug(&mut self, id: &str) {
        self.execute("device_del", json!({ "id": id })).unwrap();
    }

    /// Plugs a device in (`device_add`).
    pub fn plug(&mut self, device: Value) {
        self.until_done("device_add", &device);
    }

    /// Executes a command until it succeeds: a device that was unplugged keeps its name and what it uses until QEMU
    /// has cleaned up behind it.
    fn until_done(&mut self, command: &str, arguments: &Value) {
        let end = Instant::now() + PATIENCE;
        while let Err(error) = self.execute(command, arguments.clone()) {
            assert!(Instant::now() < end, "{command}: {error}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Makes a disk of 64 MiB for a controller that is plugged in (`blockdev-add`): it reads zeros, and takes some
    /// time for each request, so that requests are outstanding at any time.
    pub fn add_disk(&mut self, name: &str) {
        let disk = json!({
            "driver": "null-co", "node-name": name, "size": 64 << 20, "read-zeroes": true,
            "latency-ns": 100_000_000,
        });
        self.execute("blockdev-add", disk).unwrap();
    }

    /// Removes a disk whose controller is unplugged (`blockdev-del`).
    pub fn remove_disk(&mut self, name: &str) {
        self.until_done("blockdev-del", &json!({ "node-name": name }));
    }

    /// A command of QEMU's monitor for humans; what it answers, which is nothing if all went well.
    pub fn say(&mut self, command: &str) -> String {
        let answer = self.execute("human-monitor-command", json!({ "command-line": command }));
        answer.unwrap().as_str().unwrap_or_default().trim().to_owned()
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed);
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        self.port.write_all(format!("{request}\n").as_bytes()).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            let line = self.next_line(end);
            // Events, the greeting, and answers to earlier commands are passed over.
            let Ok(mut answer) = serde_json::from_slice::<Value>(&line) else { continue };
            if answer["id"] == id {
                return match answer["error"].take() {
                    Value::Null => Ok(answer["return"].take()),
                    error => Err(error),
                };
            }
        }
    }

    fn next_line(&mut self, end: Instant) -> Vec<u8> {
        loop {
            if let Some(at) = self.line.iter().position(|byte| *byte == b'\n') {
                let rest = self.line.split_off(at + 1);
                return std::mem::replace(&mut self.line, rest);
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "QEMU's monitor does not answer");
            let timeout = PollTimeout::try_from(left).unwrap();
            poll(&mut [PollFd::new(self.port.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
            let mut bytes = [0; 4096];
            match self.port.read(&mut bytes) {
                Ok(count) => self.line.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}
