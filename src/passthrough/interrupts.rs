//! Interrupts: what the guest has programmed, what the kernel signals, and what the monitor delivers.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::device::Action;
use super::warnings::{Cause, Warnings};
use crate::Device;
use crate::device::{Interrupt, Vectors};
use crate::error::{Error, Result};
use crate::sys::eventfd;

/// The address and the data of an MSI, as the guest has written them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Message {
    /// The address that the device writes to.
    pub address: u64,
    /// What it writes.
    pub data: u32,
}

/// The interrupts of a device.
///
/// Each vector has one eventfd for the life of the device, so that the monitor can disconnect it at any time. While the
/// guest has a vector masked, the kernel goes on signalling its eventfd, and the counter is the pending bit.
#[derive(Debug)]
pub(super) struct Interrupts {
    /// What the guest has enabled, and the number of its vectors.
    enabled: Option<(Interrupt, u32)>,
    /// What is set up in the kernel. `None` also if that has failed.
    vectors: Option<Vectors>,
    eventfds: Vec<Option<OwnedFd>>,
    /// What the monitor was told to deliver.
    connected: Vec<Option<Message>>,
    /// Vectors that the kernel could not set up. They are not tried again until the guest changes the kind.
    failed: BTreeSet<u32>,
    /// The eventfd of the INTx, and the one that unmasks it.
    intx: Option<(OwnedFd, OwnedFd)>,
    intx_connected: bool,
    warnings: Warnings,
}

impl Interrupts {
    /// For the device `name`.
    pub(super) fn new(name: &str) -> Self {
        Self {
            enabled: None,
            vectors: None,
            eventfds: Vec::new(),
            connected: Vec::new(),
            failed: BTreeSet::new(),
            intx: None,
            intx_connected: false,
            warnings: Warnings::new(name),
        }
    }

    /// Changes the kind of interrupt to what the guest has enabled. Messages follow by [`update`](Self::update).
    pub(super) fn enable(
        &mut self,
        device: &Device,
        wanted: Option<(Interrupt, u32)>,
        actions: &mut Vec<Action>,
    ) {
        if self.enabled == wanted {
            return;
        }
        for (vector, message) in (0..).zip(&mut self.connected) {
            if message.take().is_some() {
                actions.push(Action::Disconnect { vector });
            }
        }
        if std::mem::take(&mut self.intx_connected) {
            actions.push(Action::DisconnectIntx);
        }
        self.vectors = None;
        self.failed.clear();
        for fd in self.eventfds.iter().flatten().chain(self.intx.iter().map(|(fd, _)| fd)) {
            // Nothing of the old kind is delivered later.
            let _ = eventfd::take(fd);
        }
        self.enabled = wanted;
        match wanted {
            Some((Interrupt::Intx, _)) => {
                self.announce_intx(actions);
                self.set_up_intx(device);
            }
            // All at once: the kernel cannot add any later.
            Some((Interrupt::Msi, count)) => match self.set_up_msi(device, count) {
                Ok(vectors) => self.vectors = Some(vectors),
                Err(error) => self.warnings.warn(Cause::Msi, &error),
            },
            _ => {}
        }
    }

    /// Has the monitor deliver the INTx. [`set_up_intx`](Self::set_up_intx) follows.
    pub(super) fn announce_intx(&mut self, actions: &mut Vec<Action>) {
        self.enabled = Some((Interrupt::Intx, 1));
        if self.intx.is_none() {
            match make().and_then(|eventfd| Ok((eventfd, make()?))) {
                Ok(made) => self.intx = Some(made),
                Err(error) => return self.warnings.warn(Cause::Intx, &error),
            }
        }
        self.intx_connected = true;
        actions.push(Action::ConnectIntx);
    }

    /// Has the kernel signal the INTx, if it is what the guest has enabled.
    pub(super) fn set_up_intx(&mut self, device: &Device) {
        let Some((eventfd, resample)) = &self.intx else { return };
        if self.vectors.is_some() || !self.intx_connected {
            return;
        }
        let set_up = || {
            let mut vectors = device.vectors(Interrupt::Intx, 1)?;
            vectors.resample_by(copy(resample)?)?;
            vectors.connect(0, copy(eventfd)?)?;
            Ok(vectors)
        };
        match set_up() {
            Ok(vectors) => self.vectors = Some(vectors),
            Err(error) => self.warnings.warn(Cause::Intx, &error),
        }
    }

    fn set_up_msi(&mut self, device: &Device, count: u32) -> Result<Vectors> {
        let set_up = |count: u32| device.vectors(Interrupt::Msi, count as usize);
        // Without interrupt remapping there is one.
        let mut vectors = set_up(count).or_else(|error| {
            self.warnings.warn(Cause::FewVectors, &error);
            set_up(1)
        })?;
        for vector in 0..vectors.count() {
            vectors.connect(vector, copy(eventfd_of(&mut self.eventfds, vector)?)?)?;
        }
        Ok(vectors)
    }

    /// The vectors in `range` send what `message` returns for each; `None` if it is masked.
    pub(super) fn update(
        &mut self,
        device: &Device,
        range: Range<u32>,
        message: impl Fn(u32) -> Option<Message>,
        actions: &mut Vec<Action>,
    ) {
        let Some((kind @ (Interrupt::Msi | Interrupt::MsiX), count)) = self.enabled else { return };
        for vector in range.start..range.end.min(count) {
            let new = message(vector);
            let old = self.connected.get(vector as usize).copied().flatten();
            let action = match (old, new) {
                (None, Some(_)) if self.failed.contains(&vector) => continue,
                (None, Some(message)) => match self.set_up(device, kind, vector) {
                    Ok(()) => Action::Connect { vector, message },
                    Err(error) => {
                        self.warnings.warn(Cause::Vector, &error);
                        self.failed.insert(vector);
                        continue;
                    }
                },
                (Some(old), Some(message)) if old != message => Action::Reroute { vector, message },
                (Some(_), None) => Action::Disconnect { vector },
                _ => continue,
            };
            if self.connected.len() <= vector as usize {
                self.connected.resize(vector as usize + 1, None);
            }
            self.connected[vector as usize] = new;
            actions.push(action);
        }
    }

    /// Has the kernel signal a vector.
    fn set_up(&mut self, device: &Device, kind: Interrupt, vector: u32) -> Result<()> {
        let number = vector as usize;
        let is_set_up = |vectors: &Vectors| vectors.fd(number).is_some();
        if self.vectors.as_ref().is_some_and(is_set_up) {
            return Ok(());
        }
        let vectors = match &mut self.vectors {
            Some(vectors) => vectors,
            none => none.insert(device.vectors_at(kind, &[number])?),
        };
        vectors.connect(number, copy(eventfd_of(&mut self.eventfds, number)?)?)?;
        Ok(())
    }

    /// The eventfd of a vector; `None` if it was never connected.
    pub(super) fn eventfd(&self, vector: u32) -> Option<BorrowedFd<'_>> {
        self.eventfds.get(vector as usize)?.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn intx(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.intx.as_ref().map(|(eventfd, resample)| (eventfd.as_fd(), resample.as_fd()))
    }

    /// Whether a masked vector has fired.
    pub(super) fn is_pending(&self, vector: u32) -> bool {
        let is_connected = self.connected.get(vector as usize).is_some_and(Option::is_some);
        !is_connected && self.eventfd(vector).is_some_and(eventfd::is_signalled)
    }
}

fn make() -> Result<OwnedFd> {
    eventfd::new().map_err(|errno| Error::os(errno, "make", "an eventfd"))
}

/// Another descriptor of an eventfd. It needs no `/proc`, as [`Vectors::set_eventfd`] does to look at what it is given.
fn copy(eventfd: &OwnedFd) -> Result<OwnedFd> {
    eventfd.try_clone().map_err(|error| Error::io(&error, "duplicate", "an eventfd"))
}

fn eventfd_of(eventfds: &mut Vec<Option<OwnedFd>>, vector: usize) -> Result<&OwnedFd> {
    if eventfds.len() <= vector {
        eventfds.resize_with(vector + 1, || None);
    }
    match &mut eventfds[vector] {
        Some(eventfd) => Ok(eventfd),
        none => Ok(none.insert(make()?)),
    }
}
