//! The example as it is run.

use std::process::Command;

use super::*;

/// This program, to serve: see [`serves`].
fn program() -> Command {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", "tests::serves", "--ignored", "--nocapture"]);
    program
}

#[test]
#[ignore = "a server for the tests below, in a process of its own"]
fn serves() {
    served::serve_at_socket().unwrap();
}

/// One after another: the guard is the process's.
#[test]
fn what_takes_the_device_away_loses_nothing() {
    for arguments in [
        ["unplug", "--cause", "truncate", "--rounds", "5"],
        ["unplug", "--cause", "reset", "--rounds", "5"],
    ] {
        run(&Options::parse_from(arguments), program()).unwrap();
    }
    // Patience that no clock can count.
    let patience = u64::MAX.to_string();
    let words = ["unplug", "--rounds", "1", "--patience", &patience, "--offset", "0x10"];
    run(&Options::parse_from(words), program()).unwrap();
    // Its memory ends there.
    let options = Options::parse_from(["unplug", "--offset", "0x4000"]);
    assert_eq!(run(&options, program()).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(directories(), Vec::<std::path::PathBuf>::new());
}

/// What this process has left behind.
fn directories() -> Vec<std::path::PathBuf> {
    let prefix = served::Directory::prefix();
    let entries = std::fs::read_dir(std::env::temp_dir()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.to_string_lossy().contains(&prefix)).collect()
}

#[test]
fn what_does_not_reach_its_own_device_is_refused_at_once() {
    for cause in ["decode", "d3", "removal"] {
        let options = Options::parse_from(["unplug", "--cause", cause]);
        let error = run(&options, program()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("--cause truncate or --cause reset"), "{error}");
    }
}

#[test]
fn threads_end_when_the_scope_fails() {
    let stop = AtomicBool::new(false);
    let caught = std::panic::catch_unwind(|| {
        std::thread::scope(|scope| {
            let _stopping = Stopping(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
            });
            panic!("to see that the scope ends");
        })
    });
    assert!(caught.is_err());
}

#[test]
fn an_offset_is_read_as_it_is_printed() {
    assert_eq!((number("0x2a"), number("42")), (Ok(42), Ok(42)));
    assert!(number("x").is_err() && number("0x").is_err());
}
