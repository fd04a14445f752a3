//! The commands, as they are given, on a controller that a thread of this process serves.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use clap::Parser;
use vfio_remap::emulated::{Emulated, Namespace, Nvme, Server};
use vfio_remap::{ErrorKind, Result};

use crate::options::Options;

const BLOCK: usize = 512;
const SIZE: usize = 1 << 20;

/// A controller that keeps what is written from one command to the next, and a file.
struct Desk {
    controller: Emulated,
    socket: PathBuf,
    file: PathBuf,
}

impl Desk {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = |what| {
            let name = format!("vfio-remap-nvme-{}-{number}.{what}", std::process::id());
            std::env::temp_dir().join(name)
        };
        let storage = Namespace::memory(SIZE as u64, BLOCK as u32).unwrap();
        Self {
            controller: Emulated::new(Nvme::new(vec![storage])).unwrap(),
            socket: path("socket"),
            file: path("file"),
        }
    }

    /// Does what a command line says, FILE being ours.
    fn does(&self, command: &str) -> Result<()> {
        let device = format!("vfio-user:{}", self.socket.display());
        let file = self.file.to_str().unwrap();
        let words = command.split(' ').map(|word| if word == "FILE" { file } else { word });
        let common = ["nvme", "--json", "--device", &device];
        let options = Options::parse_from(common.into_iter().chain(words));
        let server = Server::bind(&self.socket, self.controller.clone()).unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(move || server.serve());
            let done = crate::perform(&options);
            server.join().unwrap().unwrap();
            done
        })
    }

    fn refuses(&self, command: &str, kind: ErrorKind, words: &[&str]) {
        let error = self.does(command).unwrap_err();
        assert_eq!(error.kind(), kind, "{command}: {error}");
        for words in words {
            assert!(error.to_string().contains(words), "{command}: {error}");
        }
    }

    /// All that the namespace holds.
    fn holds(&self) -> Vec<u8> {
        self.does("read FILE").unwrap();
        fs::read(&self.file).unwrap()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Of which no byte is zero, and no two blocks in a row are alike.
fn content(size: usize) -> Vec<u8> {
    (0..size).map(|at| ((at + at / BLOCK) % 255) as u8 + 1).collect()
}

#[test]
fn what_is_written_is_read_and_nothing_beside_it_is_changed() {
    let desk = Desk::new();
    desk.does("identify").unwrap();
    // More than a command transfers, and no whole number of those.
    let data = content(777 * BLOCK);
    fs::write(&desk.file, &data).unwrap();
    desk.does("write FILE --offset 1536 --yes-destroy-data").unwrap();
    let mut expected = vec![0; SIZE];
    expected[1536..1536 + data.len()].copy_from_slice(&data);
    assert!(desk.holds() == expected);
    // The beginning of the file, that is of the namespace, to another place.
    desk.does("write FILE --offset 524288 --length 2048 --yes-destroy-data").unwrap();
    expected.copy_within(..2048, 524_288);
    // A part of that back: it takes the place of what the file held.
    desk.does("read FILE --offset 525312 --length 1024").unwrap();
    assert!(fs::read(&desk.file).unwrap() == expected[525_312..526_336]);
    assert!(desk.holds() == expected);
}

#[test]
fn what_cannot_be_copied_is_refused_and_neither_device_nor_file_is_touched() {
    use ErrorKind::{InUse, NotFound, OutOfRange, Unaligned};
    const MULTIPLE: [&str; 2] = ["a block has 512 bytes", "multiples of that for --offset"];
    let desk = Desk::new();
    let write = "write FILE --yes-destroy-data";
    desk.refuses(write, NotFound, &[desk.file.to_str().unwrap()]);
    let data = content(1024);
    fs::write(&desk.file, &data).unwrap();
    let refused = |command: String, kind, words: &[&str]| {
        desk.refuses(&command, kind, words);
        assert!(fs::read(&desk.file).unwrap() == data, "{command}");
    };
    // The file is shorter than that.
    let short = "it has 1024 bytes, and 1536 were asked for";
    refused(format!("{write} --length 1536"), OutOfRange, &[short]);
    for part in ["--length 700", "--offset 100", "--length 0 --offset 1"] {
        refused(format!("{write} {part}"), Unaligned, &MULTIPLE);
        refused(format!("read FILE {part}"), Unaligned, &MULTIPLE);
    }
    // The namespace is shorter than that, or no number is as large.
    for part in ["--offset 1048064", "--offset 1048576", "--offset 18446744073709551104"] {
        let command = format!("{write} --length 1024 {part}");
        refused(command, OutOfRange, &["1024 bytes at", "it has 1048576 bytes"]);
        let command = format!("read FILE --length 1024 {part}");
        refused(command, OutOfRange, &["1024 bytes at", "it has 1048576 bytes"]);
    }
    // It is not emulated for this run alone.
    refused("write FILE".to_owned(), InUse, &["--yes-destroy-data"]);
    fs::write(&desk.file, &data[..700]).unwrap();
    desk.refuses(write, Unaligned, &["700 bytes", "pad the file"]);
    assert!(desk.holds().iter().all(|byte| *byte == 0));
}

#[test]
fn a_namespace_is_verified_whole() {
    let desk = Desk::new();
    desk.does("verify --seed 7 --yes-destroy-data").unwrap();
    assert!(desk.holds().chunks(BLOCK).all(|block| block.iter().any(|byte| *byte != 0)));
}
