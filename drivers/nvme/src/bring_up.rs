//! A controller from whatever state it is in to ready (NVMe Base 1.4 §7.6.1), and back to quiet.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::{Device, Error, ErrorKind, Result};

use super::admin::Admin;
use super::registers::{CLASS_CODE, Capabilities, Registers};

/// Mass storage, non-volatile memory, NVMe (PCI code and ID assignment, class 01h).
const CLASS: u32 = 0x01_0802;
/// The largest page that queues and transfers are made of, as a power of two: 1 MiB.
const LARGEST_PAGE: u32 = 20;

/// A device that is an NVMe controller. Dropped, it is left quiet: disabled, and without leave to start
/// accesses of its own, so that whoever opens it next finds it as after power on.
#[derive(Debug)]
pub struct Hardware {
    pub device: Arc<Device>,
    pub registers: Registers,
    pub capabilities: Capabilities,
}

impl Hardware {
    /// Looks at a device without changing anything but its memory decoding.
    pub fn find(device: Device, disable_delay: Duration) -> Result<Self> {
        let device = Arc::new(device);
        let config = device.config()?;
        if device.gone() {
            return Err(Error::new(ErrorKind::Gone, "find", device.name())
                .with_reason("its configuration space reads all ones"));
        }
        let class = config.read_u32(CLASS_CODE)? >> 8;
        if class != CLASS {
            return Err(Error::new(ErrorKind::Unsupported, "drive", device.name()).with_reason(
                format!(
                    "it is not an NVMe controller: its class is {class:#08x}, not {CLASS:#08x}"
                ),
            ));
        }
        config.set_memory_decoding(true)?;
        let registers = Registers::new(&device, disable_delay)?;
        let capabilities = registers.capabilities()?;
        let hardware = Self { device, registers, capabilities };
        let name = hardware.device.name();
        if !capabilities.has_nvm_commands() {
            return Err(Error::new(ErrorKind::Unsupported, "drive", name)
                .with_reason("it does not have the NVM command set (CAP.CSS)"));
        }
        if capabilities.entries() < 2 {
            return Err(Error::new(ErrorKind::Malformed, "drive", name).with_reason(
                "its queues have one entry (CAP.MQES is 0), of which none can be used",
            ));
        }
        let page_shift = capabilities.page_shift();
        if page_shift > LARGEST_PAGE {
            return Err(Error::new(ErrorKind::Unsupported, "drive", name)
                .with_reason(format!("its smallest page has 2^{page_shift} bytes (CAP.MPSMIN)")));
        }
        Ok(hardware)
    }

    /// Makes the controller's registers reachable again, if a fault or an absence has revoked the windows over
    /// them and the device is back: see [`Window::revoke`](vfio_remap::Window::revoke).
    ///
    /// # Errors
    /// `Gone` if it is not back, or if a window cannot be restored for ever: only [`Device::gone`] tells whether
    /// it still reaches memory.
    pub fn reach(&self) -> Result<()> {
        if self.device.gone() {
            return Err(Error::new(ErrorKind::Gone, "reach", self.device.name())
                .with_reason("its configuration space reads all ones, or its server has ended")
                .with_advice("plug it in again, and reset the controller, or close and open it"));
        }
        // A fault may be somebody else's who has switched it off.
        self.device.config()?.set_memory_decoding(true)?;
        self.device.restore().into_result().map(drop)
    }

    /// Brings the controller up with empty admin queues. `quiet` becomes true once it is disabled: from
    /// then on it reaches no memory that it was told of earlier.
    pub fn bring_up(&self, admin: &mut Admin, quiet: &mut bool) -> Result<()> {
        let timeout = self.capabilities.timeout();
        let config = self.device.config()?;
        // A reset of the function may have cleared both.
        config.set_memory_decoding(true)?;
        self.registers.disable(timeout)?;
        *quiet = true;
        config.set_bus_mastering(true)?;
        admin.reset()?;
        let (entries, submissions, completions) = admin.place();
        let page_shift = self.capabilities.page_shift();
        self.registers.enable(page_shift, entries, submissions, completions, timeout)
    }

    /// Takes the controller, which may have failed, to where nothing that it was told of matters: by
    /// its own reset, or else by that of the function.
    pub fn disable(&self) -> Result<()> {
        let timeout = self.capabilities.timeout();
        let Err(error) = self.registers.disable(timeout) else { return Ok(()) };
        log::warn!("nvme: {error}; the function is reset");
        let outage = self.device.reset()?;
        if !outage.is_over() {
            log::warn!("nvme: {outage}");
        }
        self.device.config()?.set_memory_decoding(true)?;
        self.registers.settle(timeout)?;
        self.registers.disable(timeout)
    }

    /// Has the controller reach no memory any more: disabled, or at least without leave to start
    /// accesses (PCI Local Bus 3.0 §6.2.2, bus mastering).
    ///
    /// # Errors
    /// Why neither can be had.
    pub fn quieten(&self) -> Result<()> {
        let reached = self.reach();
        if reached.is_err() && self.device.gone() {
            return Ok(());
        }
        let disabled = self.registers.disable(self.capabilities.timeout());
        // A window that is still revoked answers, but not for the controller.
        let disabled = reached.and(disabled);
        let muted = self.device.config().and_then(|config| {
            config.set_bus_mastering(false)?;
            // What is read comes after all that the device has written.
            config.vendor_id().map(drop)
        });
        for error in [&disabled, &muted].into_iter().filter_map(|result| result.as_ref().err()) {
            log::info!("nvme: {error}");
        }
        disabled.or(muted)
    }

    /// Gives up memory that the controller was told of: at once where it is quiet, and never otherwise.
    pub fn give_up<T>(&self, told: T) {
        if let Err(error) = self.quieten() {
            log::error!("nvme: {error}; memory that it may still reach is not released");
            std::mem::forget(told);
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // Said in the log.
        let _ = self.quieten();
    }
}
