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

/// One after another: the guard is the process's, and so is the name of the socket.
#[test]
fn what_takes_the_device_away_loses_nothing() {
    for arguments in [
        ["unplug", "--cause", "truncate", "--rounds", "5"],
        ["unplug", "--cause", "reset", "--rounds", "5"],
    ] {
        run(&Options::parse_from(arguments), program()).unwrap();
    }
    // It has no power management.
    let options = Options::parse_from(["unplug", "--cause", "d3"]);
    let error = run(&options, program()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
