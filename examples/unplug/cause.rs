//! What takes a device away.

use std::time::Duration;

use clap::ValueEnum;
use vfio_remap::transport::region_index;
use vfio_remap::{Device, Error, ErrorKind, Result};

use crate::served::Served;
use crate::until;

/// What takes the device away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cause {
    /// Memory decoding is switched off, as another holder of the device can do
    Decode,
    /// The device is put into D3hot
    D3,
    /// The server truncates the file behind the BAR
    Truncate,
    /// The device is reset by this crate
    Reset,
    /// Waits until the device is pulled, or its server ends
    Removal,
}

/// The command register and its bit for memory decoding (PCI 3.0 §6.2.2).
const COMMAND: u64 = 4;
const MEMORY: u16 = 2;
/// The capability of power management, the register in it that has the state, and the state
/// (PCI Power Management 1.2 §3.2.4).
const POWER_MANAGEMENT: u8 = 1;
const CONTROL_STATUS: u64 = 4;
const D3_HOT: u16 = 3;

impl Cause {
    /// Whether this program's own device can be taken away like this: its memory does not depend on its registers, it
    /// has no power management, and nobody removes it.
    pub fn is_for_its_own(self) -> bool {
        matches!(self, Self::Truncate | Self::Reset)
    }

    pub fn take_away(
        self,
        device: &Device,
        server: &mut Option<&mut Served>,
        patience: Duration,
    ) -> Result<()> {
        match self {
            Self::Decode => change(device, COMMAND, MEMORY, 0),
            Self::D3 => change(device, power_register(device)?, D3_HOT, D3_HOT),
            Self::Truncate => of_its_own(server)?.truncate(),
            Self::Reset => {
                let outage = device.reset()?;
                if outage.is_over() {
                    return Ok(());
                }
                Err(Error::new(ErrorKind::Os, "reset", device.name())
                    .with_reason(outage.to_string()))
            }
            Self::Removal => {
                say!("waiting until {} is removed", device.name());
                until("the device is removed", patience, || {
                    std::thread::sleep(Duration::from_millis(10));
                    device.gone()
                })
            }
        }
    }

    pub fn bring_back(self, device: &Device, server: &mut Option<&mut Served>) -> Result<()> {
        match self {
            Self::Decode => change(device, COMMAND, 0, MEMORY),
            Self::D3 => change(device, power_register(device)?, D3_HOT, 0),
            Self::Truncate => of_its_own(server)?.restore(),
            Self::Reset | Self::Removal => Ok(()),
        }
    }
}

fn of_its_own<'a>(server: &'a mut Option<&mut Served>) -> Result<&'a mut Served> {
    server.as_deref_mut().ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "truncate", "the memory of this device")
            .with_reason("only a server can do that")
            .with_advice("leave --device out")
    })
}

fn power_register(device: &Device) -> Result<u64> {
    let found = device.config()?.capability(POWER_MANAGEMENT)?;
    let capability = found.ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "put into D3", device.name())
            .with_reason("it has no power management")
    })?;
    Ok(capability.offset + CONTROL_STATUS)
}

/// Changes 16 bits of configuration space through the transport: the device's own methods would revoke its
/// windows before.
fn change(device: &Device, offset: u64, clear: u16, set: u16) -> Result<()> {
    let mut bytes = [0; 2];
    device.transport().read_at(region_index::CONFIG, offset, &mut bytes)?;
    let value = u16::from_le_bytes(bytes) & !clear | set;
    device.transport().write_at(region_index::CONFIG, offset, &value.to_le_bytes())
}
