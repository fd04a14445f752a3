//! The QEMU process: its command line, its output, and its end.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Context, Result};

use crate::kernels::Image;
use crate::machine::{self, Variant};
use crate::root::Root;

/// The QEMU command line. The kernel log goes to the first serial port. The payload writes
/// to the second, which is QEMU's standard output. QEMU runs in the directory `work`.
pub fn command(
    root: &Root,
    image: &Image,
    variant: Variant,
    work: &Path,
    initramfs: &Path,
    console: &Path,
) -> Command {
    let mut command = root.qemu();
    command
        .current_dir(work)
        .args(machine::qemu_arguments(variant))
        .arg("-kernel")
        .arg(image.vmlinux())
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &machine::kernel_command_line(variant)])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "file:/dev/stdout"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

/// A running QEMU. Dropping this kills it.
pub struct Qemu {
    pub child: Child,
    /// Its standard output. The channel is disconnected when QEMU ends.
    pub output: Receiver<Vec<u8>>,
}

impl Qemu {
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.spawn().context("cannot run setpriv (package util-linux)")?;
        let mut stdout = child.stdout.take().context("standard output is a pipe")?;
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, output })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only for a child that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
