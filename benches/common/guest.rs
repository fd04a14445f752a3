//! What benchmarks use in a guest of the lab.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vfio_remap::transport::{PciDevice, Sysfs};

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A device of the lab's machine, by its name.
pub fn lab_device(name: &str) -> Result<PciDevice> {
    let devices = std::env::var("LAB_DEVICES")?;
    let address = devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
        .ok_or_else(|| format!("the lab has no device {name}"))?;
    Ok(Sysfs::default().device(address)?)
}

/// Where the kernel describes a device.
pub fn sysfs_of(device: &PciDevice) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(device.address().to_string())
}

/// Loads the modules in a directory of the lab in order, up to the last one whose name ends in
/// `last`, with these parameters.
pub fn load_modules(directory: &str, last: &str, parameters: Option<&str>) -> Result<()> {
    let mut modules: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    modules.sort();
    for module in modules {
        let is_last = module.to_string_lossy().ends_with(last);
        let mut command = Command::new("insmod");
        output(command.arg(&module).args(parameters.filter(|_| is_last)))?;
        if is_last {
            return Ok(());
        }
    }
    Err(format!("this kernel has no module {last} in {directory}").into())
}

/// Runs a program and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot run {program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} failed, {}: {said}{error}", output.status).into());
    }
    Ok(said)
}
