//! Whether a device is still there.

use super::Device;
use super::revocation::{FaultCause, GONE};
use crate::error::{ErrorKind, Result};

impl Device {
    /// Whether the device is gone: its configuration space reads all ones, or the connection to its server has
    /// ended. If so, this revokes all its windows, so that everything that still uses them reads all ones.
    ///
    /// All ones means that the vendor ID does, or the class code, which no device has (PCIe 5.0 §2.3.2): the kernel
    /// answers the vendor ID itself, and keeps answering it after the device was pulled. The value of another
    /// register is never a reason.
    ///
    /// A device that is gone does not come back: drop what holds it, [`close`](Self::close) it, and open the one
    /// that took its place.
    ///
    /// A device in [low power](super::LowPower) is woken to be asked.
    pub fn gone(&self) -> bool {
        let gone = self.is_gone();
        if gone {
            let changes = self.inner.each_window(None, |control| control.revoke(GONE));
            if !changes.errors.is_empty() {
                log::warn!("{} is gone: {changes}", self.name());
            }
        }
        gone
    }

    fn is_gone(&self) -> bool {
        if self.transport().is_gone() {
            return true;
        }
        let Ok(config) = self.config() else { return false };
        let is_gone = |ones: Result<bool>| match ones {
            Ok(ones) => ones,
            Err(error) => error.kind() == ErrorKind::Gone,
        };
        is_gone(config.vendor_id().map(|id| id == u16::MAX))
            || is_gone(config.class_code().map(|class| class == 0xff_ffff))
    }

    /// What explains a fault now.
    pub(super) fn fault_cause(&self) -> FaultCause {
        if self.is_gone() {
            return FaultCause::Gone;
        }
        let Ok(config) = self.config() else { return FaultCause::Unknown };
        if config.memory_decoding().is_ok_and(|on| !on) {
            FaultCause::DecodingOff
        } else if config.is_awake().is_ok_and(|awake| !awake) {
            FaultCause::LowPower
        } else {
            FaultCause::Unknown
        }
    }
}
