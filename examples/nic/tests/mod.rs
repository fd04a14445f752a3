//! Runs command lines: in this process, or in one of their own.

mod bad_input;
mod commands;
mod leases;
mod served;
mod signals;
mod tap;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use clap::Parser;
use serde_json::Value;
use vfio_remap::{ErrorKind, Result};

use crate::options::Options;
use crate::stop::Stop;

/// More than anything here takes, however busy the machine is.
const AMPLE: Duration = Duration::from_secs(60);
const ARGUMENTS: &str = "VFIO_REMAP_TEST_NIC";

/// A directory of a test, removed with this.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vfio-remap-nic-{name}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a file in it, as text.
    fn file(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a command line does not say: the machine may be busy.
fn defaults<'w>(words: &[&str]) -> Vec<&'w str> {
    let options = ["--timeout", "--link-timeout"].into_iter();
    options.filter(|option| !words.contains(option)).flat_map(|option| [option, "60"]).collect()
}

/// Runs a command line in this process.
fn run(words: &[&str]) -> Result<()> {
    let words = [&["nic", "--json"][..], &defaults(words), words].concat();
    let options = Options::parse_from(words);
    crate::perform(&options, &Stop::default())
}

fn fails(words: &[&str], kind: ErrorKind, says: &[&str]) {
    let error = run(words).expect_err("it cannot be done");
    assert_eq!(error.kind(), kind, "{words:?}: {error}");
    for text in says {
        assert!(error.to_string().contains(text), "{words:?}: {error}");
    }
}

/// The program in a process of its own: this test binary, whose test `runs` is it.
fn start(words: &[&str]) -> Child {
    let test = [module_path!().split_once("::").unwrap().1, "runs"].join("::");
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", &test, "--nocapture"])
        .env(ARGUMENTS, words.join("\n"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "the program, in a process of its own"]
fn runs() {
    let Some(arguments) = std::env::var_os(ARGUMENTS).map(OsString::into_string) else { return };
    let arguments = arguments.unwrap();
    let options = Options::parse_from(["nic"].into_iter().chain(arguments.lines()));
    let done = Stop::on_signals().and_then(|stop| crate::perform(&options, &stop));
    if let Err(error) = &done {
        eprintln!("nic: {error}");
    }
    std::process::exit(done.is_err().into());
}

/// The JSON object that a process has printed, which has ended well.
fn object(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let mut objects = text.lines().filter(|line| line.starts_with('{'));
    let object = objects.next().unwrap_or_else(|| panic!("no JSON: {text}"));
    assert_eq!(objects.next(), None, "one object");
    serde_json::from_str(object).unwrap()
}

/// The JSON object that a command line prints.
fn printed(words: &[&str]) -> Value {
    let words = [&["--json"][..], &defaults(words), words].concat();
    object(&start(&words).wait_with_output().unwrap())
}
