//! Tests that this program runs in processes of their own.

use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs an ignored test of this program, by its path. `None` if it does not end in time: a process
/// that the kernel keeps cannot be waited for.
pub fn run(test: &str, patience: Duration) -> Option<ExitStatus> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    loop {
        let status = child.try_wait().unwrap();
        if status.is_some() || started.elapsed() > patience {
            return status;
        }
        thread::sleep(Duration::from_millis(100));
    }
}
