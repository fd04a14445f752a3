//! SIGINT and SIGTERM end a command well.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};
use std::time::Instant;

use super::{AMPLE, Scratch, object, start};

fn signal(program: &Child, name: &str) {
    let id = program.id().to_string();
    assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
}

/// Waits until a file has more than its header.
fn wait_for_frames(file: &str) {
    let begin = Instant::now();
    while fs::metadata(file).map_or(0, |file| file.len()) <= 24 {
        assert!(begin.elapsed() < AMPLE, "nothing is captured");
        std::thread::yield_now();
    }
}

#[test]
fn a_signal_ends_a_capture_and_its_file_is_whole() {
    let scratch = Scratch::new("signals");
    for name in ["INT", "TERM"] {
        let file = scratch.file(name);
        let program = start(&["--json", "capture", &file]);
        wait_for_frames(&file);
        signal(&program, name);
        let captured = object(&program.wait_with_output().unwrap());
        let frames = super::commands::frames(&fs::read(&file).unwrap());
        assert_eq!(captured["frames"], frames.len(), "{name}");
    }
}

#[test]
fn a_signal_ends_pings_and_they_are_summed_up() {
    let mut program = start(&["ping", "--count", "60000", "--interval", "10"]);
    let mut lines = BufReader::new(program.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("bytes from 10.0.2.2: 1,") {
        assert_ne!(lines.read_line(&mut said).unwrap(), 0, "{said}");
    }
    signal(&program, "TERM");
    lines.read_to_string(&mut said).unwrap();
    assert!(program.wait().unwrap().success(), "{said}");
    assert!(said.contains("10.0.2.2: ") && said.contains(" answered"), "{said}");
}

#[test]
fn a_signal_ends_a_transfer_with_an_error() {
    let scratch = Scratch::new("transfer");
    let file = scratch.file("file");
    let program = start(&["get", "http://server.test/999999MiB", "--output", &file]);
    wait_for_frames(&file);
    signal(&program, "INT");
    let output = program.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("a signal has ended it"), "{said}");
}
