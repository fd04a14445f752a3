//! Writes to configuration space after which a device answers no access to its memory BARs, or does so again.

use std::ops::Range;

use super::config::{COMMAND, Config, MEMORY_SPACE};
use super::revocation::{ASLEEP, DECODING};
use crate::error::Result;
use crate::space::Reasons;

const POWER_MANAGEMENT: u8 = 1;
/// The control and status register in the power management capability, and the bits that hold the state
/// (PCI Power Management 1.2 §3.2.4).
const CONTROL_STATUS: u64 = 4;
const POWER_STATE: u16 = 3;

/// Where the capabilities of the first 256 bytes can be (PCI 3.0 §6.7).
const CAPABILITIES: Range<u64> = 0x40..0x100;

impl Config<'_> {
    /// Writes `data`. One, two or four naturally aligned bytes are one access.
    ///
    /// The command register and the power state decide whether the device answers accesses to its memory BARs. A
    /// write that clears memory decoding, or leaves D0, revokes the windows of the device first, as
    /// [`set_memory_decoding`](Self::set_memory_decoding) does: without that, the next access would raise SIGBUS. A
    /// write that enables decoding again, or returns to D0, restores them. The registers are read afterwards: if the
    /// device ignores the write, the windows are what they were.
    ///
    /// Writes by trapped registers and by [`Device::transport`](super::Device::transport) revoke nothing.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8).
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let decodes =
            byte_at(COMMAND, offset, data).map(|byte| u16::from(byte) & MEMORY_SPACE != 0);
        let wakes = self.power_state_in(offset, data).map(|state| state == 0);
        let device = &self.device.inner;
        // A child of `fork(2)` has no windows, and locks may be held for ever by a thread that only the parent has.
        if (decodes.is_none() && wakes.is_none()) || device.is_inherited() {
            return self.put(offset, data);
        }
        let effects = [decodes.map(|on| (DECODING, on)), wakes.map(|on| (ASLEEP, on))];
        let _one = self.device.control_lock();
        let mut begun = Reasons::default();
        for (reason, answers) in effects.into_iter().flatten() {
            // If that cannot be read, it may answer.
            if !answers && !device.is_away_for(reason) && self.answers(reason).unwrap_or(true) {
                begun = begun.and(reason);
                let outage = device.take_away(reason);
                if !outage.is_over() {
                    log::warn!("{}: {outage}", self.device.name());
                }
            }
        }
        let result = self.put(offset, data);
        for (reason, _) in effects.into_iter().flatten() {
            let failed = result.is_err() && begun.contains(reason);
            if self.answers(reason).unwrap_or(failed) {
                device.end_outage(reason);
            }
        }
        result
    }

    /// Whether the device answers accesses to its memory BARs, as far as this is about `reason`.
    fn answers(&self, reason: Reasons) -> Result<bool> {
        if reason == DECODING { self.memory_decoding() } else { self.is_awake() }
    }

    /// Whether the device is in D0; always, without power management.
    ///
    /// # Errors
    /// As [`capability`](Self::capability).
    pub(super) fn is_awake(&self) -> Result<bool> {
        let Some(register) = self.power_register()? else { return Ok(true) };
        Ok(self.present_u16(register)? & POWER_STATE == 0)
    }

    /// The power state that a write requests, if it writes that.
    fn power_state_in(&self, offset: u64, data: &[u8]) -> Option<u16> {
        let end = offset.saturating_add(data.len() as u64);
        if end <= CAPABILITIES.start || offset >= CAPABILITIES.end {
            return None;
        }
        let register = self.power_register().ok().flatten()?;
        byte_at(register, offset, data).map(|byte| u16::from(byte) & POWER_STATE)
    }

    /// The register that holds the power state; `None` without power management.
    fn power_register(&self) -> Result<Option<u64>> {
        let known = &self.device.inner.power_register;
        if let Some(register) = known.get() {
            return Ok(*register);
        }
        let found = self.capability(POWER_MANAGEMENT)?;
        Ok(*known.get_or_init(|| found.map(|it| it.offset + CONTROL_STATUS)))
    }
}

/// The byte that a write puts at `at`, if it covers that.
fn byte_at(at: u64, offset: u64, data: &[u8]) -> Option<u8> {
    let index = usize::try_from(at.checked_sub(offset)?).ok()?;
    data.get(index).copied()
}
