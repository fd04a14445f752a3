//! The PHY, and the link that it finds (82576 datasheet §3.5 and §8.2.4, 82574 datasheet §10.2.2.7).
//!
//! Its registers are those of IEEE 802.3 §22.2.4, reached by MDIC. Firmware reaches them, too: software
//! asks for them first.

use std::fmt;
use std::time::Duration;

use vfio_remap::{Error, ErrorKind, Result, try_poll_until};

use super::hardware::Hardware;
use super::model::Model;
use super::registers::{Mdi, Port};
use super::wait;

/// How long an access to a register of the PHY may take, and how long firmware may keep them to itself.
const ACCESS: Duration = Duration::from_millis(100);
const OWNERSHIP: Duration = Duration::from_secs(1);

/// Where the PHY is on its bus, in both cards.
const PHY: u8 = 1;
const WRITE: u8 = 1;
const READ: u8 = 2;

/// Registers (IEEE 802.3 table 22-6).
const CONTROL: u8 = 0;
const IDENTIFIER: [u8; 2] = [2, 3];
const ADVERTISEMENT: u8 = 4;
const GIGABIT_CONTROL: u8 = 9;

/// Control: negotiate again, be on, negotiate.
const RESTART: u16 = 1 << 9;
const POWER_DOWN: u16 = 1 << 11;
const NEGOTIATE: u16 = 1 << 12;
/// Advertisement: 10 and 100 Mb/s, half and full duplex; IEEE 802.3. No pause.
const ADVERTISED: u16 = 0xf << 5 | 1;
const ADVERTISEMENT_FIELDS: u16 = 0xfff;
/// Gigabit control: full duplex; the field, half duplex in it, which the MAC has not.
const GIGABIT_FULL: u16 = 1 << 9;
const GIGABIT_FIELD: u16 = 3 << 8;

/// A link that is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// In Mb/s: 10, 100 or 1,000.
    pub speed: u32,
    /// Whether both ends can send at the same time.
    pub full_duplex: bool,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let duplex = if self.full_duplex { "full" } else { "half" };
        write!(f, "{} Mb/s, {duplex} duplex", self.speed)
    }
}

impl Hardware {
    /// The link, if it is up (82576 datasheet §8.2.2).
    pub fn link(&self) -> Result<Option<Link>> {
        let status = self.port.read(Port::STATUS)?;
        if u32::from(status) == u32::MAX {
            self.check()?;
        }
        let speed = [10, 100, 1000, 1000][usize::from(status.speed() & 3)];
        Ok(status.link_up().then_some(Link { speed, full_duplex: status.full_duplex() }))
    }

    /// Has the PHY negotiate with the other end, from 10 Mb/s half duplex to 1 Gb/s full duplex.
    pub fn negotiate(&self) -> Result<()> {
        self.with_phy(|| {
            let advertised = self.read_phy(ADVERTISEMENT)? & !ADVERTISEMENT_FIELDS | ADVERTISED;
            self.write_phy(ADVERTISEMENT, advertised)?;
            let gigabit = self.read_phy(GIGABIT_CONTROL)? & !GIGABIT_FIELD | GIGABIT_FULL;
            self.write_phy(GIGABIT_CONTROL, gigabit)?;
            let control = self.read_phy(CONTROL)? & !POWER_DOWN;
            self.write_phy(CONTROL, control | NEGOTIATE | RESTART)
        })
    }

    /// The PHY's identifier, with its revision in the lowest four bits.
    pub fn phy_identifier(&self) -> Result<u32> {
        let [high, low] = IDENTIFIER;
        self.with_phy(|| Ok(u32::from(self.read_phy(high)?) << 16 | u32::from(self.read_phy(low)?)))
    }

    /// Runs `f` while the PHY's registers are software's, and this function's of the card.
    fn with_phy<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.model {
            Model::I82576 => self.with_semaphore(f),
            Model::I82574 => {
                self.own_mdio()?;
                let result = f();
                let given_back = self
                    .port
                    .update(Port::EXTCNF_CTRL, |control| control.with_software_owns_mdio(false));
                result.and_then(|value| given_back.map(|()| value))
            }
        }
    }

    /// 82574 datasheet §4.5.2: the bit can be set once it is nobody else's.
    fn own_mdio(&self) -> Result<()> {
        let owned = wait::until(OWNERSHIP, || {
            self.port.update(Port::EXTCNF_CTRL, |control| control.with_software_owns_mdio(true))?;
            Ok(self.port.read(Port::EXTCNF_CTRL)?.software_owns_mdio().then_some(()))
        })?;
        owned.ok_or_else(|| self.phy_taken("EXTCNF_CTRL"))
    }

    /// 82576 datasheet §4.6.1 and §4.6.2: a semaphore guards the register that says who has which resource.
    fn with_semaphore<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let function = self.port.read(Port::STATUS)?.function();
        // PHY 0 and 1 are bits 1 and 2; the firmware's are 16 further.
        let mine = 1u32 << (1 + (function & 1));
        let owned = wait::until(OWNERSHIP, || {
            self.with_sync(|sync| {
                let free = sync & (mine | mine << 16) == 0;
                (free.then_some(sync | mine), free.then_some(()))
            })
        })?;
        owned.ok_or_else(|| self.phy_taken("SW_FW_SYNC"))?;
        let result = f();
        let given_back = self.with_sync(|sync| (Some(sync & !mine), ()));
        result.and_then(|value| given_back.map(|()| value))
    }

    /// Looks at SW_FW_SYNC, and may change it, while nobody else does.
    fn with_sync<T>(&self, change: impl FnOnce(u32) -> (Option<u32>, T)) -> Result<T> {
        let port = &self.port;
        // Reading sets the first bit: who read it as 0 has it.
        wait::until(OWNERSHIP, || Ok((!port.read(Port::SWSM)?.software()).then_some(())))?
            .ok_or_else(|| self.phy_taken("SWSM.SMBI"))?;
        let owned = wait::until(OWNERSHIP, || {
            port.update(Port::SWSM, |semaphore| semaphore.with_firmware(true))?;
            Ok(port.read(Port::SWSM)?.firmware().then_some(()))
        });
        let result = match owned {
            Ok(Some(())) => port.read(Port::SW_FW_SYNC).and_then(|sync| {
                let (changed, value) = change(sync);
                changed.map_or(Ok(()), |sync| port.write(Port::SW_FW_SYNC, sync))?;
                Ok(value)
            }),
            Ok(None) => Err(self.phy_taken("SWSM.SWESMBI")),
            Err(error) => Err(error),
        };
        let release = |semaphore: super::registers::Semaphore| {
            semaphore.with_software(false).with_firmware(false)
        };
        let given_back = port.update(Port::SWSM, release);
        result.and_then(|value| given_back.map(|()| value))
    }

    fn phy_taken(&self, by: &str) -> Error {
        Error::new(ErrorKind::TimedOut, "reach", format!("the PHY of {}", self.name()))
            .with_reason(format!("firmware or another driver has it for {OWNERSHIP:?} ({by})"))
            .with_advice("reset the function")
    }

    fn read_phy(&self, register: u8) -> Result<u16> {
        let request = Mdi::new().with_register(register).with_phy(PHY).with_operation(READ);
        Ok(self.access_phy(request)?.data())
    }

    fn write_phy(&self, register: u8, data: u16) -> Result<()> {
        let request =
            Mdi::new().with_register(register).with_phy(PHY).with_operation(WRITE).with_data(data);
        self.access_phy(request).map(drop)
    }

    fn access_phy(&self, request: Mdi) -> Result<Mdi> {
        let register = request.register();
        self.port.write(Port::MDIC, request)?;
        let read = || self.port.read(Port::MDIC);
        let done = try_poll_until("the PHY", wait::limit(ACCESS), read, |mdi| mdi.ready())?;
        if done.error() {
            self.check()?;
            return Err(Error::new(
                ErrorKind::Malformed,
                "reach",
                format!("register {register} of the PHY of {}", self.name()),
            )
            .with_reason("the card says that it cannot (MDIC.E)"));
        }
        Ok(done)
    }
}
