//! Interrupts of a PCI device behind a server. The client changes configuration space as vfio-pci does in the
//! kernel, so that drivers see no difference.
//!
//! A device must not raise an INTx that nobody has connected: SPDK then reports a fatal error. A device sends
//! MSI and MSI-X only while the capability is enabled: so do SPDK and the models of QEMU.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
};

use super::client::VfioUser;
use super::connection::Request;
use super::protocol::wire::{self, IrqSet, command};
use crate::error::{Error, ErrorKind, Result};
use crate::transport::{IrqInfo, Transport, irq_index};

/// More vectors than any interrupt has (MSI-X: 2048).
const MAX_VECTORS: u32 = 1 << 16;

/// The region that holds configuration space.
pub(super) const CONFIG: u32 = 7;

const COMMAND: u64 = 0x04;
const STATUS: u64 = 0x06;
const CAPABILITIES: u64 = 0x34;
/// In the command register (PCI 3.0 §6.2.2).
const INTERRUPT_DISABLE: u16 = 1 << 10;
/// In the status register.
const HAS_CAPABILITIES: u16 = 1 << 4;
/// Most capabilities that fit between the header and the end of 256 bytes.
const MAX_CAPABILITIES: u32 = 48;

const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;
/// Message control, in both capabilities (PCI 3.0 §6.8.1.3, §6.8.2.3).
const CONTROL: u64 = 2;
const MSI_ENABLE: u16 = 1 << 0;
/// How many vectors are enabled, as a power of two.
const MSI_COUNT: u16 = 7 << 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

/// Interrupts as the client has set them up.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    /// Where the capabilities are.
    msi: Option<u64>,
    msix: Option<u64>,
    /// The vectors that are connected, of INTx, MSI and MSI-X.
    connected: [BTreeSet<u32>; 3],
}

impl Interrupts {
    /// The vectors of an index; `None` if configuration space does not control it.
    fn of(&mut self, index: u32) -> Option<&mut BTreeSet<u32>> {
        self.connected.get_mut(index as usize)
    }

    /// Whether vectors of an index are connected, and none that is not in `vectors`.
    fn are_all_of(&mut self, index: u32, vectors: &Range<u32>) -> bool {
        self.of(index).is_some_and(|connected| {
            !connected.is_empty() && connected.iter().all(|vector| vectors.contains(vector))
        })
    }
}

impl VfioUser {
    fn interrupts(&self) -> MutexGuard<'_, Interrupts> {
        self.interrupts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether configuration space can be read and written.
    pub(super) fn has_config(&self) -> bool {
        let config = self.region(CONFIG);
        self.info.pci && config.is_ok_and(|config| config.readable && config.writable)
    }

    /// Disables what an earlier user may have left enabled: nobody has connected an interrupt yet.
    pub(super) fn quiet_interrupts(&self) -> Result<()> {
        if !self.has_config() {
            return Ok(());
        }
        let mut interrupts = self.interrupts();
        let found = self.unless_rejected(self.find_capabilities())?;
        (interrupts.msi, interrupts.msix) = found.unwrap_or_default();
        for index in [irq_index::MSIX, irq_index::MSI, irq_index::INTX] {
            // Without such a register there is no such interrupt.
            self.unless_rejected(self.disable(&interrupts, index))?;
        }
        Ok(())
    }

    /// Where the capabilities of MSI and MSI-X are.
    fn find_capabilities(&self) -> Result<(Option<u64>, Option<u64>)> {
        let (mut msi, mut msix) = (None, None);
        let status = self.config_u16(STATUS)?;
        if status == u16::MAX || status & HAS_CAPABILITIES == 0 {
            return Ok((None, None));
        }
        let mut at = self.config_u16(CAPABILITIES)? & 0xfc;
        for _ in 0..MAX_CAPABILITIES {
            if at < 0x40 {
                break;
            }
            let [id, next] = self.config_u16(at.into())?.to_le_bytes();
            match id {
                MSI => msi = msi.or(Some(at.into())),
                MSIX => msix = msix.or(Some(at.into())),
                _ => {}
            }
            at = u16::from(next) & 0xfc;
        }
        Ok((msi, msix))
    }

    fn config_u16(&self, offset: u64) -> Result<u16> {
        let mut bytes = [0; 2];
        self.read_at(CONFIG, offset, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Changes a register unless it has that value already, or reads as all ones: no device answers then.
    fn change(&self, register: u64, change: impl FnOnce(u16) -> u16) -> Result<()> {
        let value = self.config_u16(register)?;
        let changed = change(value);
        if value == u16::MAX || value == changed {
            return Ok(());
        }
        self.write_at(CONFIG, register, &changed.to_le_bytes())
    }

    fn disable(&self, interrupts: &Interrupts, index: u32) -> Result<()> {
        match (index, interrupts.msi, interrupts.msix) {
            (irq_index::INTX, ..) => self.change(COMMAND, |value| value | INTERRUPT_DISABLE),
            (irq_index::MSI, Some(at), _) => self.change(at + CONTROL, |value| value & !MSI_ENABLE),
            (irq_index::MSIX, _, Some(at)) => {
                self.change(at + CONTROL, |value| value & !MSIX_ENABLE)
            }
            _ => Ok(()),
        }
    }

    fn enable(&self, interrupts: &Interrupts, index: u32) -> Result<()> {
        match (index, interrupts.msi, interrupts.msix) {
            (irq_index::INTX, ..) => self.change(COMMAND, |value| value & !INTERRUPT_DISABLE),
            (irq_index::MSI, Some(at), _) => {
                let last = interrupts.connected[1].last().copied().unwrap_or(0);
                let wanted = (last + 1).checked_next_power_of_two().unwrap_or(1 << 31);
                self.change(at + CONTROL, |value| {
                    let count = wanted.trailing_zeros().min(u32::from(value >> 1 & 7)) as u16;
                    value & !MSI_COUNT | count << 4 | MSI_ENABLE
                })
            }
            (irq_index::MSIX, _, Some(at)) => {
                self.change(at + CONTROL, |value| value & !MSIX_MASK_ALL | MSIX_ENABLE)
            }
            _ => Ok(()),
        }
    }

    /// Asks what an interrupt index offers.
    pub(super) fn query_irq(&self, index: u32) -> Result<IrqInfo> {
        let object = || self.irq_name(index);
        if index >= self.info.irq_count {
            return Err(Error::new(ErrorKind::NotFound, "query", object())
                .with_reason(format!("the device has {}", self.info.irq_count)));
        }
        let argsz = wire::IrqInfo::SIZE as u32;
        let ask = wire::IrqInfo { argsz, index, ..Default::default() };
        let request = Request {
            command: command::DEVICE_GET_IRQ_INFO,
            body: [&ask.encode(), &[]],
            reply: wire::IrqInfo::SIZE,
            ..Request::default()
        };
        let reply = self.connection.exchange(request, "query", object())?;
        let (answer, _) = wire::IrqInfo::decode(&reply.body).unwrap_or_default();
        if answer.index != index || answer.count > MAX_VECTORS {
            let reason =
                format!("it claims {} vectors of interrupt {}", answer.count, answer.index);
            return Err(self.connection.malformed(reason, "query", object()));
        }
        let has = |flag| answer.flags & flag != 0;
        Ok(IrqInfo {
            count: answer.count,
            eventfd: has(VFIO_IRQ_INFO_EVENTFD),
            maskable: has(VFIO_IRQ_INFO_MASKABLE),
            automasked: has(VFIO_IRQ_INFO_AUTOMASKED),
            noresize: has(VFIO_IRQ_INFO_NORESIZE),
        })
    }

    /// Connects vectors, enables what sends them, and unmasks them. In as many messages as the server takes
    /// descriptors, so that a failure may leave the first vectors connected.
    pub(super) fn connect_irqs(
        &self,
        index: u32,
        start: u32,
        fds: &[Option<BorrowedFd<'_>>],
    ) -> Result<()> {
        let end = u32::try_from(fds.len()).ok().and_then(|count| start.checked_add(count));
        let vectors = start..end.unwrap_or(u32::MAX);
        let maskable = self.check_irq(index, &vectors, "connect")?.maskable;
        let most = self.capabilities.fds;
        if most == 0 && fds.iter().any(Option::is_some) {
            let object = self.irq_name(index);
            return Err(Error::new(ErrorKind::Unsupported, "connect", object)
                .with_reason("the server takes no file descriptors (max_msg_fds is 0)")
                .with_advice("poll the device instead"));
        }
        let mut interrupts = self.interrupts();
        let has_config = self.has_config();
        if has_config && fds.iter().all(Option::is_none) && interrupts.are_all_of(index, &vectors) {
            // Before the last of them is disconnected.
            self.disable(&interrupts, index)?;
        }
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut start = start;
        // Runs of vectors with an eventfd, and of vectors without: no descriptors at all disconnect.
        for run in fds.chunk_by(|one, next| one.is_some() == next.is_some()) {
            for part in run.chunks(most.max(1)) {
                let fds: Vec<BorrowedFd<'_>> = part.iter().flatten().copied().collect();
                let count = part.len() as u32;
                self.set(IrqSet { argsz: 0, flags, index, start, count }, &fds, "connect")?;
                start += count;
            }
        }
        if !has_config {
            return Ok(());
        }
        let Some(connected) = interrupts.of(index) else { return Ok(()) };
        let mut added = BTreeSet::new();
        for (vector, fd) in vectors.zip(fds) {
            match fd {
                Some(_) => added.insert(vector),
                None => connected.remove(&vector),
            };
        }
        connected.extend(&added);
        if added.is_empty() {
            return Ok(());
        }
        self.enable(&interrupts, index)?;
        self.set_masked(index, &added, false, maskable)
    }

    /// Undoes what [`connect_irqs`](Self::connect_irqs) has done, for all vectors.
    pub(super) fn disconnect_irqs(&self, index: u32) -> Result<()> {
        let maskable = self.irq(index)?.maskable;
        let mut interrupts = self.interrupts();
        let connected = interrupts.of(index).map(std::mem::take).unwrap_or_default();
        let mut undone = Ok(());
        if !connected.is_empty() {
            undone = self.disable(&interrupts, index);
            if index != irq_index::INTX && undone.is_ok() {
                undone = self.set_masked(index, &connected, true, maskable);
            }
        }
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        let all = IrqSet { argsz: 0, flags, index, start: 0, count: 0 };
        self.set(all, &[], "disconnect").and(undone)
    }

    /// Sets up again what a reset has disabled, as the kernel does.
    pub(super) fn restore_interrupts(&self) -> Result<()> {
        if !self.has_config() {
            return Ok(());
        }
        let interrupts = self.interrupts();
        for (index, connected) in (0..).zip(&interrupts.connected) {
            if !connected.is_empty() {
                self.enable(&interrupts, index)?;
                let maskable = self.irq(index)?.maskable;
                self.set_masked(index, connected, false, maskable)?;
            } else if index == irq_index::INTX {
                self.unless_rejected(self.disable(&interrupts, index))?;
            }
        }
        Ok(())
    }

    /// Masks vectors, or unmasks them. A server may reject that if it does not say that they can be masked.
    fn set_masked(
        &self,
        index: u32,
        vectors: &BTreeSet<u32>,
        masked: bool,
        maskable: bool,
    ) -> Result<()> {
        let (action, what) = match masked {
            true => (VFIO_IRQ_SET_ACTION_MASK, "mask"),
            false => (VFIO_IRQ_SET_ACTION_UNMASK, "unmask"),
        };
        let flags = VFIO_IRQ_SET_DATA_NONE | action;
        for Range { start, end } in runs(vectors) {
            let set = IrqSet { argsz: 0, flags, index, start, count: end - start };
            let done = self.set(set, &[], what);
            if maskable {
                done?;
            } else {
                self.unless_rejected(done)?;
            }
        }
        Ok(())
    }

    /// `None` if the server has rejected it, or the device does not have it, and the connection goes on.
    fn unless_rejected<T>(&self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                let late = error.kind() == ErrorKind::TimedOut && error.errno().is_none();
                if late || self.connection.has_failed() {
                    return Err(error);
                }
                log::debug!("{error}");
                Ok(None)
            }
        }
    }
}

/// The ranges that vectors make up.
fn runs(vectors: &BTreeSet<u32>) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for &vector in vectors {
        match runs.last_mut() {
            Some(run) if run.end == vector => run.end += 1,
            _ => runs.push(vector..vector + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_that_follow_one_another_are_a_run() {
        assert_eq!(runs(&BTreeSet::from([0, 1, 3, 7, 8, 9])), [0..2, 3..4, 7..10]);
        assert_eq!(runs(&BTreeSet::new()), []);
    }
}
