//! The card of a command.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::transport::{Binding, Sysfs, Vfio, VfioUser};
use vfio_remap::{Device, Error, ErrorKind, PciAddress, Result};
use vfio_remap_ethernet::{Link, Model, Nic, Settings};

use crate::guard::{Permit, permit};
use crate::options::Common;
use crate::peer::Peer;
use crate::say;
use crate::stop::Stop;
use crate::survey::Machine;
use crate::tap;

const EMULATED: &str = "emulated:";

/// How often a wait looks whether it should end.
pub const LOOK: Duration = Duration::from_millis(100);

/// A card that is up, the far end of its wire if it is emulated, and what undoes its binding to vfio-pci.
pub struct Card {
    pub nic: Arc<Nic>,
    /// What this process has to connect something to.
    pub wire: Option<Port>,
    /// Restored once the device is closed.
    binding: Option<Binding>,
}

/// Whether a device is emulated for this run only, with a wire that ends in this process.
pub fn has_wire(common: &Common, device: &str) -> bool {
    device.starts_with(EMULATED) && common.tap.is_none()
}

/// The shortest packet that each station takes (RFC 791 §3.2).
const LEAST_MTU: usize = 68;

/// Descriptors of a receive queue: room for all that a station may send before it is answered.
pub const RECEIVE_ENTRIES: u16 = 1024;

/// The settings that all commands begin with.
pub fn settings(common: &Common) -> Settings {
    let settings = Settings::DEFAULT.with_interrupts(true).with_mtu(common.mtu);
    settings.with_receive_entries(RECEIVE_ENTRIES)
}

/// The address of the `number`th emulated card.
pub fn emulated_address(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

impl Card {
    /// Brings the card up that the user has named.
    pub fn open(common: &Common, settings: Settings) -> Result<Self> {
        Found::find(common, &common.device, None)?.bring_up(settings)
    }

    /// Brings two cards up, in one address space for DMA if that can be: what one has received, the other sends
    /// without a copy then.
    pub fn open_two(common: &Common, names: [&str; 2], settings: Settings) -> Result<[Self; 2]> {
        let [first, second] = names;
        // The second may narrow the range of addresses: it is opened before the first has memory.
        let first = Found::find(common, first, None)?;
        let second = Found::find(common, second, Some(&first.device))?;
        Ok([first.bring_up(settings)?, second.bring_up(settings)?])
    }

    /// Waits for the link.
    pub fn link(&self, common: &Common, stop: &Stop) -> Result<Link> {
        wait_for_link(&self.nic, Duration::from_secs(common.link_timeout), stop)
    }

    /// Waits for the link. If the wire ends in this process, there is a station at the far end then.
    pub fn connect(&mut self, common: &Common, stop: &Stop) -> Result<Option<Peer>> {
        let peer = self.wire.take().map(|wire| Peer::start(wire, settings(common))).transpose()?;
        self.link(common, stop)?;
        peer.iter().try_for_each(|peer| peer.wait(stop))?;
        Ok(peer)
    }

    /// Runs a command, and closes the card, whether the command has failed or not.
    pub fn run<T>(mut self, command: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let done = command(&mut self);
        let Self { nic, binding, wire } = self;
        let closed = nic.close().map_err(Error::from);
        drop(wire);
        let restored = match (&closed, binding) {
            (Ok(()), Some(binding)) => binding.restore().map_err(Error::from),
            // The kernel would wait for the device to be closed.
            (Err(_), Some(binding)) => {
                let address = binding.device().address();
                say::aside(format_args!("nic: {address} stays bound to vfio-pci"));
                binding.keep();
                Ok(())
            }
            (_, None) => Ok(()),
        };
        done.and_then(|value| closed.and(restored).map(|()| value))
    }
}

/// The driver refuses such an MTU, too, and does not know the options of this program.
fn check_mtu(mtu: usize) -> Result<()> {
    if (LEAST_MTU..=Settings::MOST_MTU).contains(&mtu) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::OutOfRange, "use", format!("an MTU of {mtu}"))
        .with_reason("the cards have no such one")
        .with_advice(format!("pass --mtu {LEAST_MTU} to {}", Settings::MOST_MTU)))
}

/// Waits for the link of a card, unless it should end.
pub fn wait_for_link(nic: &Nic, limit: Duration, stop: &Stop) -> Result<Link> {
    // A limit beyond what the clock can say is none.
    let end = Instant::now().checked_add(limit);
    loop {
        stop.check("the wait for a link")?;
        let left = end.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
        match nic.wait_for_link(left.min(LOOK)) {
            Err(error) if error.kind() == ErrorKind::TimedOut && !left.is_zero() => {}
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                return Err(Error::new(ErrorKind::TimedOut, "use", nic.name())
                    .with_reason(format!("it has had no link for {} s", limit.as_secs()))
                    .with_advice(
                        "plug its cable in, look whether the other end is on, or wait longer \
                         (--link-timeout)",
                    ));
            }
            other => return other,
        }
    }
}

/// A device that is open, and may be none of the cards that the driver knows.
struct Found {
    device: Device,
    wire: Option<Port>,
    binding: Option<Binding>,
}

impl Found {
    /// Opens the device `name`; in the address space of another one, if it is of the same kind.
    fn find(common: &Common, name: &str, beside: Option<&Device>) -> Result<Self> {
        if let Some(model) = name.strip_prefix(EMULATED) {
            let (device, wire) = emulated(common, model, beside)?;
            return Ok(Self { device, wire, binding: None });
        }
        if common.tap.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "connect", name)
                .with_reason("it is not emulated, and has a wire of its own")
                .with_advice("leave --tap out, or use --device emulated:igb"));
        }
        if let Some(path) = name.strip_prefix("vfio-user:") {
            let device = Device::new(Arc::new(VfioUser::connect(path)?));
            return Ok(Self { device, wire: None, binding: None });
        }
        let address = address(name)?;
        let card = Sysfs::default().device(address)?;
        // Before it is taken from its driver.
        Model::from_ids(name, card.vendor_id()?, card.device_id()?, card.class_code()?)?;
        let usage = Machine::this()?.usage(address)?;
        let binding = match permit(name, &usage, common.yes_take_it)? {
            Permit::Open => None,
            Permit::Bind => Some(card.bind_vfio_pci()?),
        };
        let device = match beside {
            Some(other) if other.transport_as::<Vfio>().is_some() => other.open_beside(address)?,
            _ => Device::open(address)?,
        };
        Ok(Self { device, wire: None, binding })
    }

    fn bring_up(self, settings: Settings) -> Result<Card> {
        check_mtu(settings.mtu)?;
        let Self { device, wire, binding } = self;
        Ok(Card { nic: Nic::new(device, settings)?, wire, binding })
    }
}

/// An emulated card, and the far end of its wire, unless that is a TAP interface.
fn emulated(
    common: &Common,
    model: &str,
    beside: Option<&Device>,
) -> Result<(Device, Option<Port>)> {
    if model != "igb" {
        return Err(Error::new(ErrorKind::NotFound, "emulate", model)
            .with_reason("there is no such model of a network card")
            .with_advice("use emulated:igb"));
    }
    let other = beside.and_then(|other| other.transport_as::<Emulated>());
    let card = Igb::new(emulated_address(if other.is_some() { 2 } else { 1 }));
    let (card, far) = match &common.tap {
        Some(name) => (card.with_wire(tap::open(name)?), None),
        None => {
            let (near, far) = Port::pair();
            (card.with_wire(near), Some(far))
        }
    };
    let card = match other {
        Some(other) => other.beside(card)?,
        None => Emulated::new(card)?,
    };
    Ok((Device::new(Arc::new(card)), far))
}

fn address(name: &str) -> Result<PciAddress> {
    name.parse::<PciAddress>().map_err(|error| {
        Error::from(error).with_advice(
            "name emulated:igb, vfio-user:PATH, or a PCI address such as 0000:00:03.0 (lspci -D)",
        )
    })
}
