//! Features (NVMe Base 1.4 §5.21.1) that can be set, and are set again after a reset of the controller.

use std::time::Duration;

use vfio_remap::{Error, ErrorKind, Result};

use super::super::admin::{Admin, AdminCommand};
use super::super::command::{Command, admin, feature};
use super::Controller;

/// The unit of the time of [`Controller::set_interrupt_coalescing`], and the most units and completions.
const TIME_UNIT: Duration = Duration::from_micros(100);
const MOST_UNITS: u32 = 255;
const MOST_COMPLETIONS: u16 = 256;

impl Controller {
    /// Enables or disables the volatile write cache. The setting is restored after a reset of the controller.
    ///
    /// # Errors
    /// `Unsupported` if it has none; the controller's error.
    pub fn set_write_cache(&self, on: bool) -> Result<()> {
        if !self.identity.has_write_cache {
            return Err(Error::new(ErrorKind::Unsupported, "set", "the write cache")
                .with_reason(format!("{} has none", self.name())));
        }
        self.set_feature(feature::VOLATILE_WRITE_CACHE, on.into())
    }

    /// Whether the volatile write cache is enabled.
    pub fn write_cache(&self) -> Result<bool> {
        Ok(self.identity.has_write_cache && self.feature(feature::VOLATILE_WRITE_CACHE)? & 1 != 0)
    }

    /// Lets the controller delay an interrupt until it reports `completions`, 1 to 256, or until `time` has passed
    /// since the first of them: up to 25.5 ms, in steps of 100 µs, rounded up. It is advice; a controller may ignore
    /// it. A time of zero ends it. The setting is restored after a reset of the controller.
    ///
    /// It trades latency for fewer interrupts: use it for queues with many outstanding commands, together with
    /// [`IoQueue::wait_for`](crate::IoQueue::wait_for).
    ///
    /// # Errors
    /// `OutOfRange` for other values; the controller's error: not all controllers let it be changed (QEMU's, as of
    /// 11.1, do not).
    pub fn set_interrupt_coalescing(&self, completions: u16, time: Duration) -> Result<()> {
        let units = time.as_nanos().div_ceil(TIME_UNIT.as_nanos());
        let units = u32::try_from(units).ok().filter(|units| *units <= MOST_UNITS);
        match units {
            Some(units) if (1..=MOST_COMPLETIONS).contains(&completions) => {
                let value = units << 8 | u32::from(completions - 1);
                self.set_feature(feature::INTERRUPT_COALESCING, value)
            }
            _ => Err(Error::new(ErrorKind::OutOfRange, "set", "interrupt coalescing")
                .with_reason(format!("{completions} completions, {time:?}"))
                .with_advice("use 1 to 256 completions, and at most 25.5 ms")),
        }
    }

    /// The values of [`set_interrupt_coalescing`](Self::set_interrupt_coalescing).
    pub fn interrupt_coalescing(&self) -> Result<(u16, Duration)> {
        let value = self.feature(feature::INTERRUPT_COALESCING)?;
        Ok(((value & 0xff) as u16 + 1, TIME_UNIT * (value >> 8 & 0xff)))
    }

    fn feature(&self, feature: u8) -> Result<u32> {
        let command = Command::new(admin::GET_FEATURES, 0).dwords_10(feature.into(), 0);
        let operation = "get the features of";
        let request = AdminCommand { operation, command, with_data: false };
        self.admin(|admin| admin.execute(&request))
    }

    /// Sets a feature, and keeps its value for resets.
    fn set_feature(&self, feature: u8, value: u32) -> Result<()> {
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        // The lock is held, so no reset comes in between.
        set(&mut state.admin, feature, value)?;
        state.features.insert(feature, value);
        Ok(())
    }
}

pub(super) fn set(admin: &mut Admin, feature: u8, value: u32) -> Result<()> {
    let command = Command::new(admin::SET_FEATURES, 0).dwords_10(feature.into(), value);
    let operation = match feature {
        feature::VOLATILE_WRITE_CACHE => "set the write cache of",
        _ => "set the interrupt coalescing of",
    };
    admin.execute(&AdminCommand { operation, command, with_data: false }).map(drop)
}
