//! Writes to configuration space after which a device answers no access to its memory BARs, or does so again.

use std::ops::Range;

use super::Outage;
use super::capabilities::Capability;
use super::config::{COMMAND, Config, EXPRESS, MEMORY_SPACE};
use super::revocation::{ASLEEP, DECODING, RESET};
use crate::error::{ErrorKind, Result};
use crate::space::Reasons;

const POWER_MANAGEMENT: u8 = 1;
/// The control and status register in the power management capability, and the bits that hold the state
/// (PCI Power Management 1.2 §3.2.4).
const CONTROL_STATUS: u64 = 4;
const POWER_STATE: u16 = 3;

/// The upper byte of the device control register in the PCI Express capability, and its bit that begins a function
/// level reset (PCIe 5.0 §7.5.3.4).
const DEVICE_CONTROL_HIGH: u64 = 9;
const EXPRESS_RESET: u8 = 1 << 7;

/// The capability of conventional PCI for a function level reset, its control register, and the bit that begins it
/// (PCI-SIG ECN "Advanced Capabilities for Conventional PCI").
const ADVANCED_FEATURES: u8 = 0x13;
const ADVANCED_CONTROL: u64 = 4;
const ADVANCED_RESET: u8 = 1 << 0;

/// Where the capabilities of the first 256 bytes can be (PCI 3.0 §6.7).
const CAPABILITIES: Range<u64> = 0x40..0x100;

/// Where configuration space has what takes the device away; `None` for a capability that the device does not have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Controls {
    /// The register of the power state.
    power: Option<u64>,
    /// The bytes that begin a function level reset, and the bits that do.
    resets: [Option<(u64, u8)>; 2],
}

/// What a write requests.
#[derive(Default)]
struct Effects {
    /// Whether the device decodes memory.
    decodes: Option<bool>,
    /// Whether it is in D0.
    wakes: Option<bool>,
    resets: bool,
}

impl Effects {
    /// Those that last: the reason, and whether the device answers.
    fn lasting(&self) -> impl Iterator<Item = (Reasons, bool)> {
        let all = [self.decodes.map(|on| (DECODING, on)), self.wakes.map(|on| (ASLEEP, on))];
        all.into_iter().flatten()
    }

    fn is_none(&self) -> bool {
        self.lasting().next().is_none() && !self.resets
    }
}

impl Config<'_> {
    /// Writes `data`. One, two or four naturally aligned bytes are one access.
    ///
    /// The command register and the power state decide whether the device answers accesses to its memory BARs. A
    /// write that clears memory decoding, or leaves D0, revokes the windows of the device first, as
    /// [`set_memory_decoding`](Self::set_memory_decoding) does: without that, the next access would raise SIGBUS. A
    /// write that enables decoding again, or returns to D0, restores them. The registers are read afterwards: if the
    /// device ignores the write, the windows are what they were.
    ///
    /// A write that begins a function level reset, by the PCI Express capability or the one for advanced features, does
    /// to windows and peer-to-peer mappings what [`Device::reset`](super::Device::reset) does. vfio-pci returns from
    /// the write when the reset is over.
    ///
    /// [`Region::write_at`](super::Region::write_at) and trapped registers write configuration space by this.
    /// [`Device::transport`](super::Device::transport) revokes nothing.
    ///
    /// # Errors
    /// As [`read_u8`](Self::read_u8). That of a window that could not be revoked: nothing is written then. That of a
    /// window or a peer-to-peer mapping that could not be restored: the write is made then, and
    /// [`Device::restore`](super::Device::restore) tries again. That of the read afterwards, if it was to restore the
    /// windows: they stay revoked, and the next such write tries again. A sealed window is no error.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let effects = self.effects_of(offset, data);
        // A child of `fork(2)` has no windows, and locks may be held for ever by a thread that only the parent has.
        if effects.is_none() || self.device.inner.is_inherited() {
            return self.put(offset, data);
        }
        let _one = self.device.control_lock();
        let begun = self.begin(&effects)?;
        let result = self.put(offset, data);
        let mut restored = Ok(());
        for (reason, answers) in effects.lasting() {
            let undo = result.is_err() && begun.contains(reason);
            restored = restored.and(self.settle(reason, answers, undo));
        }
        if effects.resets {
            let mut outage = Outage::default();
            self.device.bring_back_awake(RESET, &mut outage);
            restored = restored.and(outage.into_restored());
        }
        result.and(restored)
    }

    /// Takes the device away for what a write is about to do, or not at all.
    fn begin(&self, effects: &Effects) -> Result<Reasons> {
        let device = &self.device.inner;
        let mut begun = Reasons::default();
        let reset = effects.resets.then_some((RESET, false));
        for (reason, answers) in effects.lasting().chain(reset) {
            if answers || device.is_away_for(reason) {
                continue;
            }
            // If that cannot be read, it may answer.
            if reason != RESET && !self.answers(reason).unwrap_or(true) {
                continue;
            }
            if let Err(error) = device.try_take_away(reason) {
                for (reason, _) in effects.lasting().filter(|(it, _)| begun.contains(*it)) {
                    // What could not be restored is logged.
                    let _ = device.end_outage(reason);
                }
                return Err(error);
            }
            begun = begun.and(reason);
        }
        Ok(begun)
    }

    /// Brings the device back after a write, if it answers: the write requested that, or the device ignored it. If that
    /// cannot be read, only to `undo` what a failed write began.
    fn settle(&self, reason: Reasons, requested: bool, undo: bool) -> Result<()> {
        let device = &self.device.inner;
        match self.answers(reason) {
            Ok(true) => device.end_outage(reason),
            Err(_) if undo => device.end_outage(reason),
            Err(error) if device.is_away_for(reason) => {
                log::warn!("{}: windows stay revoked: {error}", self.device.name());
                if requested { Err(error) } else { Ok(()) }
            }
            Ok(false) | Err(_) => Ok(()),
        }
    }

    /// Whether the device answers accesses to its memory BARs, as far as this is about `reason`.
    fn answers(&self, reason: Reasons) -> Result<bool> {
        if reason == DECODING { self.memory_decoding() } else { self.is_awake() }
    }

    /// Whether the device is in D0; always, without power management.
    ///
    /// # Errors
    /// `Gone` if the register reads all ones; the transport's error.
    pub(super) fn is_awake(&self) -> Result<bool> {
        let Some(register) = self.controls()?.power else { return Ok(true) };
        Ok(self.present_u16(register)? & POWER_STATE == 0)
    }

    /// What a write requests, as far as it takes the device away or brings it back.
    fn effects_of(&self, offset: u64, data: &[u8]) -> Effects {
        let byte = |at| byte_at(at, offset, data);
        let decodes = byte(COMMAND).map(|byte| u16::from(byte) & MEMORY_SPACE != 0);
        let end = offset.saturating_add(data.len() as u64);
        let is_in_none = end <= CAPABILITIES.start || offset >= CAPABILITIES.end;
        let controls = if is_in_none { None } else { self.controls().ok() };
        let Some(Controls { power, resets }) = controls else {
            return Effects { decodes, ..Effects::default() };
        };
        let wakes = power.and_then(byte).map(|byte| u16::from(byte) & POWER_STATE == 0);
        let begins = |(at, bit)| byte(at).is_some_and(|byte| byte & bit != 0);
        Effects { decodes, wakes, resets: resets.into_iter().flatten().any(begins) }
    }

    fn controls(&self) -> Result<Controls> {
        let known = &self.device.inner.controls;
        if let Some(controls) = known.get() {
            return Ok(*controls);
        }
        let mut found = Controls::default();
        for capability in self.capabilities() {
            let Capability { id, offset } = match capability {
                Ok(capability) => capability,
                // Those before the fault in the list can be used.
                Err(error) if error.kind() == ErrorKind::Malformed => break,
                Err(error) => return Err(error),
            };
            let [express, advanced] = &mut found.resets;
            match id {
                POWER_MANAGEMENT => found.power = found.power.or(Some(offset + CONTROL_STATUS)),
                EXPRESS => {
                    *express = express.or(Some((offset + DEVICE_CONTROL_HIGH, EXPRESS_RESET)));
                }
                ADVANCED_FEATURES => {
                    *advanced = advanced.or(Some((offset + ADVANCED_CONTROL, ADVANCED_RESET)));
                }
                _ => {}
            }
        }
        Ok(*known.get_or_init(|| found))
    }
}

/// The byte that a write puts at `at`, if it covers that.
fn byte_at(at: u64, offset: u64, data: &[u8]) -> Option<u8> {
    let index = usize::try_from(at.checked_sub(offset)?).ok()?;
    data.get(index).copied()
}
