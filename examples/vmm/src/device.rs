//! A passed-through device: opening it, and performing the actions of the module `passthrough`.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vfio_remap::device::{Events, GuestMapping, Outage};
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Edu, Emulated, Nvme};
use vfio_remap::passthrough::{Action, Apertures, GuestDevice};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Access, Device, ErrorKind};

use crate::machine::{Interrupt, Machine};
use crate::pci::interrupt_line;

/// The interrupt line register of configuration space.
const INTERRUPT_LINE: u64 = 0x3c;
/// The size of the emulated controller's disk.
const DISK: u64 = 64 << 20;

/// A device that the guest has.
pub struct Passed {
    pub guest: GuestDevice<u32>,
    /// The pin of its INTx.
    line: u8,
    intx: Option<Interrupt>,
    /// The connected vectors of MSI or MSI-X.
    vectors: BTreeMap<u32, Interrupt>,
    /// The guest's memory, mapped for its DMA.
    memory: GuestMapping,
}

impl Passed {
    /// Opens a device for a slot of the bus, and its events, if it has any.
    pub fn open(
        source: &str,
        apertures: &Apertures,
        machine: &Machine,
        slot: u8,
    ) -> Result<(Self, Option<Events>)> {
        let device = open(source)?;
        if device.info().resettable && !device.info().reset_at_open {
            let outage = device.reset()?;
            report(&device, &outage);
        }
        let memory = device.dma()?.map_guest(&machine.memory, Access::ReadWrite)?;
        let events = match device.events() {
            Ok(events) => Some(events),
            Err(error) if error.kind() == ErrorKind::Unsupported => None,
            Err(error) => return Err(error.into()),
        };
        // One without PCI Express has no errors to report.
        let _ = device.config().and_then(|config| config.set_error_reporting(true));
        let mut guest = GuestDevice::new(device, apertures)?;
        let line = interrupt_line(slot);
        // A register without a function: firmware leaves the line there.
        let _ = guest.write_config(INTERRUPT_LINE, &[line]);
        let (intx, vectors) = (None, BTreeMap::new());
        Ok((Self { guest, line, intx, vectors, memory }, events))
    }

    /// Performs actions in order. A failure is reported; it leaves the device slower, or without an interrupt.
    pub fn perform(&mut self, machine: &Machine, actions: Vec<Action>) {
        for action in actions {
            if let Err(error) = self.act(machine, action) {
                eprintln!("vmm: {}: {error:#}", self.guest.device().name());
            }
        }
    }

    fn act(&mut self, machine: &Machine, action: Action) -> Result<()> {
        let guest = &mut self.guest;
        match action {
            Action::RemoveSlot(span) => guest.remove_slot(span, |slot| machine.remove_slot(*slot)),
            Action::Relocate(span) => {
                if let Some(report) = guest.relocate(span)? {
                    eprintln!("vmm: {}, {span}: {report}", guest.device().name());
                }
                Ok(())
            }
            Action::AddSlot(span) => guest.add_slot(span, |memory| machine.add_slot(memory)),
            Action::Connect { vector, message } | Action::Reroute { vector, message } => {
                if let Some(interrupt) = self.vectors.get(&vector) {
                    return machine.change_message(interrupt.gsi, message);
                }
                let eventfd = guest.eventfd(vector).context("there is no such vector")?;
                self.vectors.insert(vector, machine.connect_message(eventfd, message)?);
                Ok(())
            }
            Action::Disconnect { vector } => machine.disconnect(self.vectors.remove(&vector)),
            Action::ConnectIntx => {
                let (eventfd, resample) = guest.intx_eventfds().context("there is no INTx")?;
                self.intx = Some(machine.connect_pin(eventfd, Some(resample), self.line.into())?);
                Ok(())
            }
            Action::DisconnectIntx => machine.disconnect(self.intx.take()),
            Action::Reset => {
                let outage = guest.reset()?;
                report(guest.device(), &outage);
                Ok(())
            }
            other => bail!("{other:?} is not known here"),
        }
    }

    /// Takes the device away from the guest and closes it.
    pub fn release(mut self, machine: &Machine) -> Result<()> {
        let actions = self.guest.release();
        self.perform(machine, actions);
        drop(self.memory);
        Ok(self.guest.close()?)
    }
}

/// Says what a reset has taken from the device for good.
fn report(device: &Device, outage: &Outage) {
    if !outage.is_over() {
        eprintln!("vmm: {}: {outage}", device.name());
    }
}

/// Opens a device by the text of the command line.
fn open(source: &str) -> Result<Device> {
    Ok(match source.split_once(':') {
        Some(("vfio-user", path)) => Device::new(Arc::new(VfioUser::connect(path)?)),
        Some(("emulated", "edu")) => Device::new(Arc::new(Emulated::new(Edu::new())?)),
        Some(("emulated", "nvme")) => {
            let disk = Namespace::memory(DISK, 512)?;
            Device::new(Arc::new(Emulated::new(Nvme::new(vec![disk]))?))
        }
        Some(("emulated", other)) => bail!("there is no model {other}, only nvme and edu"),
        _ => Device::open(source)?,
    })
}
