//! What the host does behind the back of a monitor: changes a device that another process has open.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::pci::{COMMAND, MEMORY};

/// Where vfio-pci has configuration space in a device's file: region 7 (Linux, drivers/vfio/pci/vfio_pci_priv.h).
const CONFIG: u64 = 7 << 40;

/// Enables or disables memory decoding of a device of a process. The device is the one with these identifiers, in which
/// the vendor's is the lower half. VFIO sees that, because it is done by the process's own file (`pidfd_getfd(2)`).
pub fn set(process: i32, identifiers: u32, on: bool) -> Result<()> {
    let pid = Pid::from_raw(process).context("0 is no process")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let is_vfio = fs::read_link(entry.path())?.to_string_lossy().contains("vfio");
        let Some(number) = entry.file_name().to_str().filter(|_| is_vfio).map(str::parse) else {
            continue;
        };
        let file = File::from(pidfd_getfd(&pidfd, number?, PidfdGetfdFlags::empty())?);
        let mut bytes = [0; 4];
        // A container or a group has nothing to read.
        if file.read_exact_at(&mut bytes, CONFIG).is_err()
            || u32::from_le_bytes(bytes) != identifiers
        {
            continue;
        }
        let mut command = [0; 2];
        file.read_exact_at(&mut command, CONFIG + COMMAND)?;
        let command = u16::from_le_bytes(command);
        let command = if on { command | MEMORY } else { command & !MEMORY };
        return Ok(file.write_all_at(&command.to_le_bytes(), CONFIG + COMMAND)?);
    }
    anyhow::bail!("process {process} has no device {identifiers:#x}")
}
