//! `cargo lab vfio-user`: tests the emulated NVMe controller with Linux's nvme driver, and the
//! emulated network card with its igb driver ([`network`]), through QEMU's vfio-user-pci.
//!
//! `examples/serve` serves the controller, whose first namespace is a file. The guest's
//! `lab/guest/vfio-user` uses it. The guest's memory is a memfd, a memfd of huge pages, or a
//! file on a disk. At the end the server is killed, so that data that was not flushed is lost,
//! and the file is checked.
//!
//! With `--starts`, several guests use the same server, one after another.

mod network;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{Ending, Lab};
use crate::cache::{self, Store};
use crate::command;
use crate::cpio::Archive;
use crate::huge_pages::{self, HugePages};
use crate::kernels::{Image, Kernel};
use crate::modules;
use crate::payload;
use crate::root::Root;
use crate::ui;

const INIT: &str = include_str!("../guest/vfio-user");
/// The directory of test data, in the root of each file system.
const DATA: &str = "data";
/// The size of the first namespace in bytes.
const DISK: u64 = 64 << 20;
/// The size of the guest's memory in bytes.
const MEMORY: u64 = 512 << 20;
/// The log must be complete. For the options see
/// [`machine::kernel_command_line`](crate::machine::kernel_command_line).
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 no_timer_check ignore_loglevel log_buf_len=4M printk.devkmsg=on";
/// The file systems of which our server maps files, as `stat -f` names them.
const DISKS: [&str; 4] = ["ext2/ext3", "xfs", "btrfs", "f2fs"];

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Memfd,
    /// A memfd of pages of 2 MiB.
    HugePages,
    /// A file on a disk.
    File,
}

impl Memory {
    const ALL: [Self; 3] = [Self::Memfd, Self::HugePages, Self::File];

    fn name(self) -> &'static str {
        match self {
            Self::Memfd => "memfd",
            Self::HugePages => "huge-pages",
            Self::File => "file",
        }
    }

    /// What QEMU is told; the file is to be made in `directory`.
    fn object(self, directory: &Path) -> String {
        let common = format!("id=memory,size={MEMORY},share=on");
        match self {
            Self::Memfd => format!("memory-backend-memfd,{common}"),
            Self::HugePages => {
                format!("memory-backend-memfd,{common},hugetlb=on,hugetlbsize={}", huge_pages::SIZE)
            }
            Self::File => {
                let path = directory.join("memory");
                format!("memory-backend-file,{common},mem-path={}", path.display())
            }
        }
    }

    /// Why this machine does not have it.
    fn is_missing(self, directory: &Path, pages: Option<&HugePages>) -> Result<Option<String>> {
        Ok(match self {
            Self::Memfd => None,
            Self::HugePages => pages.is_none().then(|| {
                let count = MEMORY / huge_pages::SIZE;
                format!("the kernel does not reserve {count} pages of 2 MiB for us")
            }),
            Self::File => {
                let output =
                    command::output(Command::new("stat").args(["-f", "-c", "%T"]).arg(directory))?;
                let name = output.trim();
                (!DISKS.contains(&name)).then(|| {
                    format!("{} is on {name}, which our server does not map", directory.display())
                })
            }
        })
    }
}

/// What all boots of a guest have in common.
struct Guest<'a> {
    lab: &'a Lab,
    kernel: &'static Kernel,
    image: Image,
    initramfs: Vec<u8>,
    program: PathBuf,
}

impl<'a> Guest<'a> {
    /// `None`, with a warning, if there is no QEMU or no kernel for it.
    fn new(
        lab: &'a Lab,
        store: &Store,
        kernel: &'static Kernel,
        initramfs: impl FnOnce(&Image) -> Result<Vec<u8>>,
    ) -> Result<Option<Self>> {
        if !lab.root.has_vfio_user() {
            ui::warning("skipped: vfio-user, since the mirror has no QEMU of 10.1 or newer");
            return Ok(None);
        }
        let Some(image) = kernel.image(store)? else {
            ui::warning(&format!(
                "skipped: vfio-user, since the mirror does not have kernel {} any more",
                kernel.name
            ));
            return Ok(None);
        };
        let program = payload::host_example("serve")?;
        fs::create_dir_all(&lab.logs)?;
        let initramfs = initramfs(&image)?;
        Ok(Some(Self { lab, kernel, image, initramfs, program }))
    }

    /// A guest with the emulated NVMe controller.
    fn with_disks(lab: &'a Lab, store: &Store, kernel: &'static Kernel) -> Result<Option<Self>> {
        Self::new(lab, store, kernel, |image| disk_guest(image, &lab.busybox, &lab.root))
    }

    /// One boot with the device at `socket`; the output of its payload, if it went well. `more`
    /// is added to the kernel's command line. It is never booted again: if QEMU crashes or the
    /// guest stands still here, that may be our server's doing.
    fn boot(
        &self,
        memory: Memory,
        work: &Path,
        socket: &Path,
        label: &str,
        more: &str,
    ) -> Result<Option<String>> {
        let (root, image) = (&self.lab.root, &self.image);
        let initramfs = work.join("initramfs");
        let console = work.join("console");
        fs::write(&initramfs, &self.initramfs)?;
        let mut qemu = qemu(root, image, &initramfs, &console, socket);
        qemu.arg("-object").arg(memory.object(work));
        qemu.args(["-append", &format!("{KERNEL_COMMAND_LINE} {more}")]);
        let what = format!("linux {} with vfio-user-pci of QEMU {}", image.version, root.version);
        let label = format!("{}-vfio-user-{label}", self.kernel.name);
        let outcome = self.lab.run(&mut qemu, work, &console, &what, &label)?;
        let complaints = outcome.complaints();
        let seconds = outcome.took.as_secs_f32();
        if matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty() {
            ui::status("Passed", &format!("vfio-user: {what}, {label} in {seconds:.1} s"));
            return Ok(Some(outcome.output));
        }
        let log = outcome.log_path.display();
        // The complaints describe any other ending.
        let status = match outcome.ending {
            Ending::Exited(_) => format!("{}\n", outcome.ending),
            _ => String::new(),
        };
        ui::error(&format!("vfio-user: {label}: {status}{complaints}the kernel log is {log}"));
        Ok(None)
    }
}

/// Boots a guest with a disk once with each sort of memory, and one with a network card.
/// Whether it went well, or there is no QEMU for it.
pub fn test(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    let Some(guest) = Guest::with_disks(lab, store, kernel)? else { return Ok(true) };
    let mut passed = network::test(lab, store, kernel)?;
    for memory in Memory::ALL {
        let work = cache::work_directory(&lab.logs, "boot-of-")?;
        let reserved = match memory {
            Memory::HugePages => HugePages::reserve(MEMORY / huge_pages::SIZE)?,
            _ => None,
        };
        if let Some(reason) = memory.is_missing(work.path(), reserved.as_ref())? {
            ui::warning(&format!("skipped: vfio-user with {}, since {reason}", memory.name()));
            continue;
        }
        // In /tmp: a socket's path is short.
        let short = tempfile::tempdir()?;
        let socket = short.path().join("nvme");
        let disk = short.path().join("disk");
        let second = ["--namespace", "memory:64M,block=4096"];
        let server = serve_disk(&guest.program, &socket, &disk, &second)?;
        let booted = guest.boot(memory, work.path(), &socket, memory.name(), "")?.is_some();
        // SIGKILL: no cache is written back.
        drop(server);
        if booted {
            inspect(&lab.root, &disk, short.path()).context("the guest has left a bad disk")?;
        }
        passed &= booted;
    }
    Ok(passed)
}

/// Boots guests one after another, all with the same server: each finds what those before
/// have written. Whether all went well, or there is no QEMU for it.
pub fn starts(lab: &Lab, store: &Store, kernel: &'static Kernel, count: u32) -> Result<bool> {
    let Some(guest) = Guest::with_disks(lab, store, kernel)? else { return Ok(true) };
    let work = cache::work_directory(&lab.logs, "boot-of-")?;
    let short = tempfile::tempdir()?;
    let socket = short.path().join("nvme");
    let disk = short.path().join("disk");
    let server = serve_disk(&guest.program, &socket, &disk, &[])?;
    for start in 1..=count {
        let more = format!("lab.start={start}");
        if guest.boot(Memory::Memfd, work.path(), &socket, "starts", &more)?.is_none() {
            ui::error(&format!("vfio-user: start {start} of {count} failed"));
            return Ok(false);
        }
    }
    server.end(&socket)?;
    command::output(lab.root.command("usr/sbin/e2fsck").args(["-f", "-n"]).arg(&disk))?;
    Ok(true)
}

/// Serves an NVMe controller whose first namespace is the file `disk`, with more arguments.
fn serve_disk(program: &Path, socket: &Path, disk: &Path, more: &[&str]) -> Result<Server> {
    let namespace = format!("file:{},size={DISK}", disk.display());
    let arguments = [&["--namespace", &namespace], more].concat();
    Server::start(program, "nvme", socket, &arguments, Stdio::null())
}

/// The server. Dropping this kills it.
struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts it, and waits until it listens.
    fn start(
        program: &Path,
        device: &str,
        socket: &Path,
        arguments: &[&str],
        stdin: Stdio,
    ) -> Result<Self> {
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args([device, "--socket"])
            .arg(socket)
            .args(arguments)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run setpriv (package util-linux)")?;
        let stdout = child.stdout.take().context("standard output is a pipe")?;
        let mut server = Self { child, stdout: BufReader::new(stdout) };
        // It writes one line when it listens, and none if it ends before.
        let mut line = String::new();
        server.stdout.read_line(&mut line)?;
        ensure!(line.contains("is served at"), "the server does not start: {line}");
        Ok(server)
    }

    /// Ends it by SIGTERM, and returns the rest of its output.
    fn end(mut self, socket: &Path) -> Result<String> {
        ensure!(self.child.try_wait()?.is_none(), "the server has ended by itself");
        let process = self.child.id().to_string();
        command::output(Command::new("kill").args(["-s", "TERM", &process]))?;
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the server ended with {status} after SIGTERM");
        ensure!(!fs::exists(socket)?, "the server left its socket behind");
        Ok(rest)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The machine, whose memory is shared with the server. The caller adds the memory and the
/// kernel's command line.
fn qemu(root: &Root, image: &Image, initramfs: &Path, console: &Path, socket: &Path) -> Command {
    let path = socket.display();
    let device = format!(
        r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}},"addr":"04.0"}}"#
    );
    let mut command = root.qemu();
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-M", "q35,memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", "2", "-m", "512M"])
        .args(["-device", &device])
        .arg("-kernel")
        .arg(image.vmlinux())
        .arg("-initrd")
        .arg(initramfs)
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "file:/dev/stdout"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

/// The initramfs of the guest with disks.
fn disk_guest(image: &Image, busybox: &Path, root: &Root) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in
        ["bin", "data", "dev", "lab", "lab/bin", "lab/modules", "lib", "lib64", "mnt", "proc"]
    {
        archive.directory(directory);
    }
    for directory in ["lib/x86_64-linux-gnu", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(busybox)?);
    archive.file("lab/bin/mke2fs", &read(&root.path("usr/sbin/mke2fs"))?);
    archive.file("lib64/ld-linux-x86-64.so.2", &read(&root.loader())?);
    for library in LIBRARIES {
        let path = format!("lib/x86_64-linux-gnu/{library}");
        archive.file(&path, &read(&root.library(library))?);
    }
    for module in image.modules(&modules::ON_DEMAND)? {
        let name = module.file_name().context("a module is a file")?.to_string_lossy();
        archive.file(&format!("lab/modules/{name}"), &read(&module)?);
    }
    for (name, size) in FILES {
        archive.file(&format!("{DATA}/{name}"), &content(size));
    }
    Ok(archive.finish())
}

/// What mke2fs needs.
const LIBRARIES: [&str; 6] = [
    "libblkid.so.1",
    "libc.so.6",
    "libcom_err.so.2",
    "libe2p.so.2",
    "libext2fs.so.2",
    "libuuid.so.1",
];

/// The files of test data: smaller than a block, larger than a block, larger than a
/// transfer.
const FILES: [(&str, usize); 3] = [("small", 100), ("middle", 5000), ("large", 10 << 20)];

/// `size` bytes that do not repeat.
fn content(size: usize) -> Vec<u8> {
    // Marsaglia's xorshift.
    let mut state = size as u64 | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(size).collect()
}

/// Checks the file system of the first namespace, and its files.
fn inspect(root: &Root, disk: &Path, directory: &Path) -> Result<()> {
    command::output(root.command("usr/sbin/e2fsck").args(["-f", "-n"]).arg(disk))?;
    for copy in [DATA, "copy"] {
        for (name, size) in FILES {
            let into: PathBuf = directory.join("found");
            let request = format!("dump /{copy}/{name} {}", into.display());
            command::output(root.command("usr/sbin/debugfs").arg("-R").arg(request).arg(disk))?;
            let found = fs::read(&into).with_context(|| format!("there is no {copy}/{name}"))?;
            if found != content(size) {
                bail!("{copy}/{name} differs from what was written");
            }
            fs::remove_file(into)?;
        }
    }
    Ok(())
}
