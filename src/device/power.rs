//! Low power.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::revocation::POWER;
use super::signals::{eventfd, wait};
use super::{Device, Holder, Inner, Outage};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;

/// A device in a low power state. Dropping this wakes it.
///
/// While this lives
/// - [windows](super::Window) of the device are revoked: loads answer all ones, stores are dropped, until this is
///   dropped or [`woken`](Self::woken) has returned `Ok`, even if the device woke earlier. An access to a sealed
///   window raises SIGBUS;
/// - an access through the kernel, to a trapped register
///   ([`Region::trapped_register`](super::Region::trapped_register)) or to [`Config`](super::Config), wakes the
///   device and works, and so do calls that set up interrupts or reset it. The device sleeps again afterwards, unless this came from [`Device::low_power_until_woken`];
/// - the device raises no interrupts and does no DMA.
///
/// The device may lose its state. The kernel saves and restores configuration space, nothing else.
#[must_use = "dropping it wakes the device"]
pub struct LowPower {
    device: Arc<Inner>,
    wakeup: Option<OwnedFd>,
    slot: usize,
    generation: u32,
}

impl Device {
    /// Puts the device into a low power state until the returned value is dropped (vfio-pci, Linux 6.1). The
    /// kernel chooses the lowest state that the machine supports: D3cold, D3hot, or none.
    ///
    /// # Errors
    /// `Unsupported` if the kernel or the transport does not offer it; `InUse` if the device is in a low power
    /// state already.
    pub fn low_power(&self) -> Result<LowPower> {
        self.sleep(None)
    }

    /// As [`low_power`](Self::low_power), until something wakes the device: the device itself, or an access
    /// through the kernel. The device then stays awake, and [`LowPower::woken`] returns `Ok`.
    ///
    /// # Errors
    /// As [`low_power`](Self::low_power).
    pub fn low_power_until_woken(&self) -> Result<LowPower> {
        self.sleep(Some(eventfd()?))
    }

    fn sleep(&self, wakeup: Option<OwnedFd>) -> Result<LowPower> {
        let slot = self.inner.insert_exclusive(Holder::LowPower)?;
        let mut outage = self.inner.take_away(POWER);
        if let Err(error) = self.transport().enter_low_power(wakeup.as_ref().map(AsFd::as_fd)) {
            self.inner.bring_back(POWER, &mut outage);
            self.inner.holders().try_remove(slot);
            return Err(error);
        }
        let generation = fork::generation();
        Ok(LowPower { device: self.inner.clone(), wakeup, slot, generation })
    }
}

impl LowPower {
    /// Waits until something wakes the device. Once it has returned `Ok`, windows work.
    ///
    /// # Errors
    /// `TimedOut` after the time limit; `Unsupported` after [`Device::low_power`], which reports no wake-up;
    /// `Os` if the eventfd cannot be read. As [`wake`](Self::wake), if a window could not be restored.
    pub fn woken(&self, timeout: Duration) -> Result<()> {
        let name = || format!("the wake-up of {}", self.device.info.name);
        match &self.wakeup {
            Some(wakeup) => {
                wait(wakeup, timeout, name)?;
                self.end()
            }
            None => Err(Error::new(ErrorKind::Unsupported, "wait for", name())
                .with_reason("nothing reports it after Device::low_power")
                .with_advice("use Device::low_power_until_woken")),
        }
    }

    /// Readable once something has woken the device; `None` after [`Device::low_power`].
    pub fn wakeup_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wakeup.as_ref().map(AsFd::as_fd)
    }

    /// Wakes the device, as dropping does, and returns the result.
    ///
    /// # Errors
    /// The transport's error; the value is then dropped, which retries the wake-up. That of a window or a peer-to-peer
    /// mapping that could not be restored: the device is awake then, and [`Device::restore`] tries again.
    pub fn wake(self) -> Result<()> {
        self.device.transport.exit_low_power()?;
        self.end()
    }

    /// Ends the outage. vfio-pci wakes a device that was in D3hot by a write, too: it puts it into D0 before it
    /// suspends it (Linux 6.1, vfio_pci_core_runtime_suspend).
    fn end(&self) -> Result<()> {
        let device = Device { inner: self.device.clone() };
        let _one = device.control_lock();
        let mut outage = Outage::default();
        if self.device.is_away_for(POWER) {
            device.bring_back_awake(POWER, &mut outage);
        }
        outage.into_restored()
    }
}

impl Drop for LowPower {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        // This has no effect on a device that is awake.
        match self.device.transport.exit_low_power() {
            // What could not be restored is logged.
            Ok(()) => drop(self.end()),
            Err(error) => log::warn!("a device sleeps until it is closed: {error}"),
        }
        self.device.holders().try_remove(self.slot);
    }
}

impl fmt::Debug for LowPower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LowPower({})", self.device.info.name)
    }
}
