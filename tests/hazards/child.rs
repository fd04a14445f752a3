//! Tests that this program runs in processes of their own.

use std::process::{Child, Command, Stdio};

/// Starts an ignored test of this program, by its path.
pub fn start(test: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}
