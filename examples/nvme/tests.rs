//! Runs command lines on a controller that a thread of this process serves.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use clap::Parser;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{ClientLimits, Emulated, Nvme, Server};
use vfio_remap::{ErrorKind, Result};

use crate::options::Options;

const BLOCK: usize = 512;
const SIZE: usize = 1 << 20;
/// How many mappings with a file the server accepts.
const MAPPINGS: u32 = 16;

/// A controller that keeps its data between commands, and a file.
struct Setup {
    controller: Emulated,
    socket: PathBuf,
    file: PathBuf,
}

impl Setup {
    fn new() -> Self {
        Self::with(Namespace::memory(SIZE as u64, BLOCK as u32).unwrap())
    }

    fn with(storage: Namespace) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = |what| {
            let name = format!("vfio-remap-nvme-{}-{number}.{what}", std::process::id());
            std::env::temp_dir().join(name)
        };
        Self {
            controller: Emulated::new(Nvme::new(vec![storage])).unwrap(),
            socket: path("socket"),
            file: path("file"),
        }
    }

    /// Runs a command line. FILE stands for the file.
    fn run(&self, command: &str) -> Result<()> {
        let device = format!("vfio-user:{}", self.socket.display());
        let file = self.file.to_str().unwrap();
        let words = command.split(' ').map(|word| if word == "FILE" { file } else { word });
        let common = ["nvme", "--json", "--device", &device];
        let options = Options::parse_from(common.into_iter().chain(words));
        let mut limits = ClientLimits::default();
        limits.files = MAPPINGS;
        let server = Server::bind(&self.socket, self.controller.clone()).unwrap();
        let server = server.with_limits(limits);
        thread::scope(|scope| {
            let server = scope.spawn(move || server.serve());
            let done = crate::perform(&options);
            server.join().unwrap().unwrap();
            done
        })
    }

    fn fails(&self, command: &str, kind: ErrorKind, words: &[&str]) {
        let error = self.run(command).unwrap_err();
        assert_eq!(error.kind(), kind, "{command}: {error}");
        for words in words {
            assert!(error.to_string().contains(words), "{command}: {error}");
        }
    }

    /// The contents of the namespace.
    fn contents(&self) -> Vec<u8> {
        self.run("read FILE").unwrap();
        fs::read(&self.file).unwrap()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Data without zero bytes, in which adjacent blocks differ.
fn content(size: usize) -> Vec<u8> {
    (0..size).map(|at| ((at + at / BLOCK) % 255) as u8 + 1).collect()
}

#[test]
fn written_data_is_read_back_and_other_blocks_do_not_change() {
    let setup = Setup::new();
    setup.run("identify").unwrap();
    // More than the largest transfer, and not a multiple of it.
    let data = content(777 * BLOCK);
    fs::write(&setup.file, &data).unwrap();
    setup.run("write FILE --offset 1536 --yes-destroy-data").unwrap();
    let mut expected = vec![0; SIZE];
    expected[1536..1536 + data.len()].copy_from_slice(&data);
    assert!(setup.contents() == expected);
    // Copies the beginning of the file, which holds the namespace, to another offset.
    setup.run("write FILE --offset 524288 --length 2048 --yes-destroy-data").unwrap();
    expected.copy_within(..2048, 524_288);
    // Reads a part back, which replaces the contents of the file.
    setup.run("read FILE --offset 525312 --length 1024").unwrap();
    assert!(fs::read(&setup.file).unwrap() == expected[525_312..526_336]);
    assert!(setup.contents() == expected);
}

#[test]
fn an_invalid_copy_fails_and_changes_neither_device_nor_file() {
    use ErrorKind::{InUse, NotFound, OutOfRange, Unaligned};
    const MULTIPLE: [&str; 2] = ["a block has 512 bytes", "multiples of that for --offset"];
    let setup = Setup::new();
    let write = "write FILE --yes-destroy-data";
    setup.fails(write, NotFound, &[setup.file.to_str().unwrap()]);
    let data = content(1024);
    fs::write(&setup.file, &data).unwrap();
    let refused = |command: String, kind, words: &[&str]| {
        setup.fails(&command, kind, words);
        assert!(fs::read(&setup.file).unwrap() == data, "{command}");
    };
    // The file is too short.
    let short = "it has 1024 bytes, but 1536 were requested";
    refused(format!("{write} --length 1536"), OutOfRange, &[short]);
    for part in ["--length 700", "--offset 100", "--length 0 --offset 1"] {
        refused(format!("{write} {part}"), Unaligned, &MULTIPLE);
        refused(format!("read FILE {part}"), Unaligned, &MULTIPLE);
    }
    // The namespace is too short, or the end overflows.
    for part in ["--offset 1048064", "--offset 1048576", "--offset 18446744073709551104"] {
        let command = format!("{write} --length 1024 {part}");
        refused(command, OutOfRange, &["1024 bytes at", "it has 1048576 bytes"]);
        let command = format!("read FILE --length 1024 {part}");
        refused(command, OutOfRange, &["1024 bytes at", "it has 1048576 bytes"]);
    }
    // The device is not emulated for this run only.
    refused("write FILE".to_owned(), InUse, &["--yes-destroy-data"]);
    fs::write(&setup.file, &data[..700]).unwrap();
    setup.fails(write, Unaligned, &["700 bytes", "pad the file"]);
    assert!(setup.contents().iter().all(|byte| *byte == 0));
}

#[test]
fn what_has_no_blocks_to_copy_is_named() {
    let setup = Setup::new();
    fs::write(&setup.file, "").unwrap();
    let invalid = ErrorKind::InvalidInput;
    setup.fails("write FILE --yes-destroy-data", invalid, &["it is empty"]);
    fs::remove_file(&setup.file).unwrap();
    // Nobody writes to it: to open it would wait for ever.
    nix::unistd::mkfifo(&setup.file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for file in ["/dev/null", "FILE"] {
        let command = format!("write {file} --yes-destroy-data");
        setup.fails(&command, invalid, &["it is no regular file"]);
    }
    setup.fails("read FILE", ErrorKind::Gone, &["ENXIO"]);
}

#[test]
fn a_namespace_that_is_named_is_identified_alone() {
    let setup = Setup::new();
    setup.run("identify --namespace 1").unwrap();
    setup.fails("identify --namespace 2", ErrorKind::NotFound, &["namespace 2", "there are [1]"]);
    for words in [["--namespace", "0"], ["--timeout", "0"]] {
        let words = [&["nvme", "identify"], &words[..]].concat();
        assert!(Options::try_parse_from(&words).is_err(), "{words:?}");
    }
}

#[test]
fn verify_covers_the_whole_namespace() {
    let setup = Setup::new();
    setup.run("verify --seed 7 --yes-destroy-data").unwrap();
    assert!(setup.contents().chunks(BLOCK).all(|block| block.iter().any(|byte| *byte != 0)));
}

#[test]
fn sixteen_mappings_are_enough_to_verify_and_to_measure() {
    let setup = Setup::with(Namespace::memory(64 << 20, 4096).unwrap());
    setup.run("verify --seed 7 --yes-destroy-data").unwrap();
    setup.run("bench --depth 128 --threads 8 --seconds 1").unwrap();
}
