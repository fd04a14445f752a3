//! A server of ours in a thread of this process, or in a process of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_remap::Result;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Edu, Emulated, Nvme, Server};
use vfio_remap::transport::{Transport, VfioUser};

const SOCKET: &str = "VFIO_REMAP_TEST_SOCKET";
const MODEL: &str = "VFIO_REMAP_TEST_MODEL";

/// A path that nothing is at.
pub fn path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name =
        format!("vfio-remap-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    std::env::temp_dir().join(name)
}

/// Serves one client with edu.
pub fn edu() -> (PathBuf, JoinHandle<Result<()>>) {
    let path = path();
    let server = Server::bind(&path, Emulated::new(Edu::new()).unwrap()).unwrap();
    (path, std::thread::spawn(move || server.serve()))
}

/// Runs `f` with a client of a server that serves edu in another thread.
pub fn with_edu<T>(f: impl FnOnce(VfioUser) -> T) -> T {
    let (path, server) = edu();
    let result = f(VfioUser::connect(path).unwrap());
    server.join().unwrap().unwrap();
    result
}

/// A server in a process of its own, killed when it is dropped: this program once more, with the
/// test [`serves`].
pub struct Process {
    pub child: Child,
    pub path: PathBuf,
}

impl Process {
    pub fn start() -> Self {
        Self::of("edu")
    }

    /// A server of an NVMe controller, whose doorbells are mapped.
    pub fn nvme() -> Self {
        Self::of("nvme")
    }

    fn of(model: &str) -> Self {
        let path = path();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "support::server::serves"])
            .env(SOCKET, &path)
            .env(MODEL, model)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !is_listened_at(&path) {
            assert!(start.elapsed() < Duration::from_secs(5), "it does not listen");
            std::thread::sleep(Duration::from_millis(1));
        }
        Self { child, path }
    }

    pub fn connect(&self) -> VfioUser {
        VfioUser::connect(&self.path).unwrap()
    }
}

/// Whether a server listens at `path`: the socket is there before it does. `/proc/net/unix` has flags in
/// its fourth column, of which one is `__SO_ACCEPTCON`.
fn is_listened_at(path: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let path = path.to_str().unwrap();
    let all = std::fs::read_to_string("/proc/net/unix").unwrap();
    all.lines()
        .any(|line| line.ends_with(path) && line.split_ascii_whitespace().nth(3) == Some(ACCEPTS))
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Nothing if it was not started by [`Process`].
#[test]
#[ignore = "a server for others, in a process of its own"]
fn serves() {
    let Some(path) = std::env::var_os(SOCKET) else { return };
    let device = match std::env::var(MODEL).as_deref() {
        Ok("nvme") => {
            let namespace = Namespace::memory(1 << 20, 512).unwrap();
            Emulated::new(Nvme::new(vec![namespace]))
        }
        _ => Emulated::new(Edu::new()),
    };
    let server = Server::bind(path, device.unwrap()).unwrap();
    loop {
        server.serve().unwrap();
    }
}

/// The names of its regions and interrupts are the same whoever is asked.
pub fn same_shape(one: &dyn Transport, other: &dyn Transport) {
    for index in 0..one.info().region_count {
        let (one, other) = (one.region(index).ok(), other.region(index).ok());
        assert_eq!(one, other, "region {index}");
    }
    for index in 0..one.info().irq_count {
        let (one, other) = (one.irq(index).unwrap(), other.irq(index).unwrap());
        assert_eq!(one, other, "interrupt {index}");
    }
}
