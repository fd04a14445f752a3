//! A file system in another process (FUSE) of one file, which answers until it is told to stop.
//!
//! The process is this program once more. It ends with the one that started it, and then the kernel answers what
//! waits for it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

const NAME: &str = "file";
const DIRECTORY: &str = "VFIO_REMAP_TEST_FUSE";
/// How long it is silent at most.
const LIMIT: Duration = Duration::from_secs(60);

/// Of requests (`linux/fuse.h`).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

pub struct Fuse {
    process: Child,
    said: BufReader<std::process::ChildStderr>,
    directory: PathBuf,
}

impl Fuse {
    /// `None`, and a word, if this process may not mount one.
    pub fn mount() -> Option<Self> {
        let directory =
            std::env::temp_dir().join(format!("vfio-remap-fuse-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "support::fuse::serves_a_file", "--nocapture"])
            .env(DIRECTORY, &directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stderr.take().unwrap());
        let mut fuse = Self { process, said, directory };
        let line = fuse.line();
        if line == "mounted" {
            return Some(fuse);
        }
        println!("{line}");
        None
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// The file, for reading and writing.
    pub fn open(&self) -> File {
        File::options().read(true).write(true).open(self.directory.join(NAME)).unwrap()
    }

    /// From now on it takes requests and answers none.
    pub fn fall_silent(&mut self) {
        writeln!(self.process.stdin.as_ref().unwrap()).unwrap();
        assert_eq!(self.line(), "silent");
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // The kernel answers requests that wait, with an error.
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        // It fails if it was not mounted.
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH);
        std::fs::remove_dir(&self.directory).unwrap();
    }
}

#[test]
#[ignore = "a file system for others, in a process of its own"]
fn serves_a_file() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let Err(reason) = run(Path::new(&directory));
    eprintln!("skipped: {reason}");
}

fn run(directory: &Path) -> Result<std::convert::Infallible, String> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let device = device.map_err(|error| format!("cannot open /dev/fuse: {error}"))?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("test"), directory, Some("fuse"), flags, Some(&*options))
        .map_err(|errno| format!("cannot mount a FUSE file system: {errno}"))?;
    let silent = Arc::new(AtomicBool::new(false));
    thread::spawn({
        let silent = silent.clone();
        move || serve(device, &silent)
    });
    eprintln!("mounted");
    for _ in std::io::stdin().lines() {
        silent.store(true, Ordering::SeqCst);
        eprintln!("silent");
        thread::spawn(|| {
            thread::sleep(LIMIT);
            std::process::exit(1);
        });
    }
    let _ = umount2(directory, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    std::process::exit(0);
}

fn serve(mut device: File, silent: &AtomicBool) {
    let mut request = vec![0; 1 << 20];
    loop {
        // ENODEV when it is unmounted.
        let Ok(len) = device.read(&mut request) else { return };
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let opcode = word(4);
        if silent.load(Ordering::SeqCst) || [FORGET, INTERRUPT, BATCH_FORGET].contains(&opcode) {
            continue;
        }
        let name = request[40..len].split(|byte| *byte == 0).next().unwrap_or_default();
        let body = match opcode {
            // Version 7.31, and nothing that is optional.
            INIT => Ok([&[7u32, 31, 1 << 16, 0, 0, 1 << 16][..], &[0; 10]].concat()),
            LOOKUP if name == NAME.as_bytes() => {
                Ok([&[2u32, 0, 1, 0][..], &[0; 6], &attributes(2)].concat())
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR => Ok([&[0u32; 4][..], &attributes(word(16))].concat()),
            OPEN => Ok(vec![0; 4]),
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = match body {
            Ok(words) => (0, words.into_iter().flat_map(u32::to_ne_bytes).collect()),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(&request[8..16]);
        reply.extend(body);
        if device.write_all(&reply).is_err() {
            return;
        }
    }
}

/// `struct fuse_attr` of the directory, 1, or the file.
fn attributes(node: u32) -> [u32; 22] {
    let mut attributes = [0; 22];
    let mode = if node == 1 { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o600 };
    (attributes[0], attributes[2]) = (node, 1 << 16);
    // After three times of 64 bits, and their nanoseconds.
    (attributes[15], attributes[16], attributes[20]) = (mode, 1, 4096);
    attributes
}
