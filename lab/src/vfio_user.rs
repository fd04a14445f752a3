//! `cargo lab vfio-user`: tests the emulated NVMe controller with Linux's nvme driver,
//! through QEMU's vfio-user-pci.
//!
//! `examples/serve.rs` serves the controller, whose first namespace is a file. The guest's
//! `lab/guest/vfio-user` uses it. At the end the server is killed, so that data that was
//! not flushed is lost, and the file is checked.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{Ending, Lab};
use crate::cache::{self, Store};
use crate::command;
use crate::cpio::Archive;
use crate::kernels::{Image, Kernel};
use crate::payload;
use crate::root::Root;
use crate::ui;

const INIT: &str = include_str!("../guest/vfio-user");
/// The directory of test data, in the root of each file system.
const DATA: &str = "data";
/// The size of the first namespace in bytes.
const DISK: u64 = 64 << 20;
/// The log must be complete. For the options see
/// [`machine::kernel_command_line`](crate::machine::kernel_command_line).
const KERNEL_COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 no_timer_check ignore_loglevel log_buf_len=4M printk.devkmsg=on";

/// Runs the test in one boot. Returns whether it passed, or was skipped because there is
/// no QEMU for it. The boot is never repeated: if QEMU crashes or the guest stalls, our
/// server may be the cause.
pub fn test(lab: &Lab, store: &Store, kernel: &'static Kernel) -> Result<bool> {
    if !lab.root.has_vfio_user() {
        ui::warning("skipped: vfio-user, since the mirror has no QEMU of 10.1 or newer");
        return Ok(true);
    }
    let Some(image) = kernel.image(store)? else {
        ui::warning(&format!(
            "skipped: vfio-user, since the mirror does not have kernel {} any more",
            kernel.name
        ));
        return Ok(true);
    };
    let program = payload::host_example("serve")?;
    let root = &lab.root;
    // In /tmp, since the path of a socket must be short.
    let short = tempfile::tempdir()?;
    let socket = short.path().join("nvme");
    let disk = short.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;

    fs::create_dir_all(&lab.logs)?;
    let work = cache::work_directory(&lab.logs, "boot-of-")?;
    let initramfs = work.path().join("initramfs");
    let console = work.path().join("console");
    fs::write(&initramfs, guest(&image, &lab.busybox, root)?)?;
    let server = Server::start(&program, &socket, &disk)?;
    let mut qemu = qemu(root, &image, &initramfs, &console, &socket);
    let what = format!("linux {} with vfio-user-pci of QEMU {}", image.version, root.version);
    let label = format!("{}-vfio-user", kernel.name);
    let outcome = lab.run(&mut qemu, work.path(), &console, &what, &label)?;
    // Kills it with SIGKILL, so that it does not write back its cache.
    drop(server);

    let complaints = outcome.complaints();
    if !matches!(outcome.ending, Ending::Exited(0)) || !complaints.is_empty() {
        let log = outcome.log_path.display();
        // The complaints describe any other ending.
        let status = match outcome.ending {
            Ending::Exited(_) => format!("{}\n", outcome.ending),
            _ => String::new(),
        };
        ui::error(&format!("vfio-user: {status}{complaints}the kernel log is {log}"));
        return Ok(false);
    }
    inspect(root, &disk, short.path()).context("the guest's disk has errors")?;
    let seconds = outcome.took.as_secs_f32();
    ui::status("Passed", &format!("vfio-user: {what} in {seconds:.1} s"));
    Ok(true)
}

/// The server. Dropping this kills it.
struct Server(Child);

impl Server {
    /// Starts it, and waits until it listens.
    fn start(program: &Path, socket: &Path, disk: &Path) -> Result<Self> {
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(["nvme", "--socket"])
            .arg(socket)
            .arg("--file")
            .arg(disk)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run setpriv (package util-linux)")?;
        let stdout = child.stdout.take().context("standard output is a pipe")?;
        let server = Self(child);
        // It writes one line when it listens, and none if it ends before.
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.contains("is served at"), "the server does not start: {line}");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The machine. Its memory is shared with the server.
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
        .args(["-object", "memory-backend-memfd,id=memory,size=512M,share=on"])
        .args(["-device", &device])
        .arg("-kernel")
        .arg(image.vmlinux())
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", KERNEL_COMMAND_LINE])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "file:/dev/stdout"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

/// The initramfs of the guest.
fn guest(image: &Image, busybox: &Path, root: &Root) -> Result<Vec<u8>> {
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
    for module in image.modules_on_demand()? {
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
