//! Low power.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::signals::{eventfd, wait};
use super::{Device, Inner, Note};
use crate::error::Result;
use crate::sys::fork;

/// A device that sleeps. Dropping this wakes it.
///
/// Meanwhile
/// - an access through a [`Window`](super::Window) raises SIGBUS, asleep or woken, until this is dropped or
///   [`woken`](Self::woken) has come;
/// - an access through the kernel, to a [`Bar::trapped`](super::Bar::trapped) register or to
///   [`Config`](super::Config), wakes the device and works, and so do calls that set up interrupts or reset
///   it. The device falls asleep again afterwards, unless it was to tell of waking;
/// - it raises no interrupts, and does no DMA.
///
/// What the device forgets in its sleep is up to it: the kernel keeps its configuration space, and no
/// more.
pub struct LowPower {
    device: Arc<Inner>,
    wakeup: Option<OwnedFd>,
    slot: usize,
    generation: u32,
}

impl Device {
    /// Lets the device sleep, until what this gives is dropped (vfio-pci, Linux 6.1). The kernel takes it
    /// to the lowest power state that the machine has for it: D3cold, D3hot, or none at all.
    ///
    /// # Errors
    /// `Unsupported` where the kernel or the transport does not offer it; `InUse` where the device sleeps
    /// already.
    pub fn low_power(&self) -> Result<LowPower> {
        self.sleep(None)
    }

    /// As [`low_power`](Self::low_power), until something wakes the device: the device itself, or anybody
    /// who accesses it through the kernel. It stays awake then, and [`LowPower::woken`] tells.
    ///
    /// # Errors
    /// As [`low_power`](Self::low_power).
    pub fn low_power_until_woken(&self) -> Result<LowPower> {
        self.sleep(Some(eventfd()?))
    }

    fn sleep(&self, wakeup: Option<OwnedFd>) -> Result<LowPower> {
        let slot = self.inner.only(Note::LowPower)?;
        if let Err(error) = self.transport().enter_low_power(wakeup.as_ref().map(AsFd::as_fd)) {
            self.inner.notes().try_remove(slot);
            return Err(error);
        }
        let generation = fork::generation();
        Ok(LowPower { device: self.inner.clone(), wakeup, slot, generation })
    }
}

impl LowPower {
    /// Waits until something has woken the device; false when the time is over, and for a device that
    /// was not asked to tell. Once it has come, windows work.
    ///
    /// # Errors
    /// `Os` where the descriptor cannot be read.
    pub fn woken(&self, timeout: Duration) -> Result<bool> {
        let name = || format!("the wake-up of {}", self.device.info.name);
        match &self.wakeup {
            Some(wakeup) => Ok(wait(wakeup, timeout, name)? > 0),
            None => Ok(false),
        }
    }

    /// Readable once something has woken the device; `None` where it was not asked to tell.
    pub fn wakeup_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wakeup.as_ref().map(AsFd::as_fd)
    }

    /// Wakes the device, as dropping does, and says what came of it.
    ///
    /// # Errors
    /// What the transport answers; dropping the value retries the wake-up.
    pub fn wake(self) -> Result<()> {
        self.device.transport.exit_low_power()
    }
}

impl Drop for LowPower {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        // To a device that is awake it does nothing.
        if let Err(error) = self.device.transport.exit_low_power() {
            log::warn!("a device sleeps until it is closed: {error}");
        }
        self.device.notes().try_remove(self.slot);
    }
}

impl fmt::Debug for LowPower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LowPower({})", self.device.info.name)
    }
}
