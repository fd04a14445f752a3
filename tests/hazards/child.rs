//! Tests that this program runs in processes of their own.

use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs an ignored test of this program, by its path. `None` if it does not end in time: a process
/// that the kernel keeps cannot be waited for. One that ends well has run the test: a path that names
/// none is nothing to run, and ends well, too.
pub fn run(test: &str, patience: Duration) -> Option<ExitStatus> {
    run_until(test, patience, || false)
}

/// As [`run`], but waits no longer than until there is `enough`.
pub fn run_until(test: &str, patience: Duration, enough: impl Fn() -> bool) -> Option<ExitStatus> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    loop {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        if started.elapsed() > patience || enough() {
            return None;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() || said.contains("1 passed"), "{test} was not run: {said}");
    Some(output.status)
}
