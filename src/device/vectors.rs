//! Interrupts as file descriptors.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use super::signals::{eventfd, signal, take, wait};
use super::{Device, Inner, Note};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::transport::{IrqInfo, irq_index};

/// A kind of interrupt of a PCI device. A device uses one of them at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interrupt {
    /// The legacy interrupt: level-triggered and masked when it fires, to be unmasked when the cause
    /// is gone.
    Intx,
    /// Message-signalled interrupts (PCI 3.0 §6.8.1): up to 32 vectors.
    Msi,
    /// Message-signalled interrupts, extended (PCI 3.0 §6.8.2): up to 2048 vectors.
    MsiX,
}

impl Interrupt {
    fn index(self) -> u32 {
        match self {
            Self::Intx => irq_index::INTX,
            Self::Msi => irq_index::MSI,
            Self::MsiX => irq_index::MSIX,
        }
    }
}

/// How vectors were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Growth {
    /// Beside those in use, which went on firing (MSI-X on Linux 6.5 and newer).
    InPlace,
    /// All vectors were taken out of use and set up again. What fired meanwhile was lost, so every
    /// vector was signalled once: look for work at each.
    Rearmed,
}

/// Vectors of a device, each signalling an eventfd. Dropping them takes the interrupt out of use.
///
/// MSI and MSI-X are writes that the device starts: without
/// [`Config::set_bus_mastering`](super::Config::set_bus_mastering) none ever comes, and nothing says so. INTx does not need bus
/// mastering.
pub struct Vectors {
    device: Arc<Inner>,
    kind: Interrupt,
    info: IrqInfo,
    slots: Vec<Slot>,
    /// What unmasks an INTx, beside [`set_masked`](Self::set_masked).
    resample: Option<OwnedFd>,
    slot: usize,
    /// The process that set them up: see [`fork::generation`].
    generation: u32,
}

/// A vector's eventfd, which stays the same as long as there is the vector.
struct Slot {
    eventfd: Arc<OwnedFd>,
    /// Not set up, otherwise: a hole.
    enabled: bool,
}

impl Slot {
    fn new() -> Result<Self> {
        Ok(Self { eventfd: Arc::new(eventfd()?), enabled: true })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.enabled.then(|| self.eventfd.as_fd())
    }
}

/// One vector, to be waited for wherever it suits: in a thread of its own, or by an event loop, for which
/// its descriptor is readable once the vector has fired (`man 2 eventfd`).
///
/// It keeps neither the device nor its [`Vectors`], which may grow meanwhile. Once those are dropped, it
/// does not fire any more. Clones are the same vector: what one of them takes, the others do not.
///
/// With tokio it is what `AsyncFd` takes; the example `async_interrupts` shows it.
#[derive(Clone)]
pub struct Vector {
    eventfd: Arc<OwnedFd>,
    name: Arc<str>,
}

impl Vector {
    /// Waits until it has fired: how often since it was last asked, 0 when the time is over.
    ///
    /// # Errors
    /// `Os` where the kernel refuses to read the eventfd.
    pub fn wait(&self, timeout: Duration) -> Result<u64> {
        wait(&*self.eventfd, timeout, || self.name.to_string())
    }

    /// How often it has fired since it was last asked, without waiting. Its descriptor is not readable
    /// from then on, until it fires again.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn take(&self) -> Result<u64> {
        take(&*self.eventfd, || self.name.to_string())
    }
}

impl AsFd for Vector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl AsRawFd for Vector {
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

impl fmt::Debug for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Device {
    /// What a kind of interrupt offers; a count of 0 where the device has none of it.
    ///
    /// # Errors
    /// `Unsupported` where the transport has no interrupts; what it answers.
    pub fn interrupt(&self, kind: Interrupt) -> Result<IrqInfo> {
        self.transport().irq(kind.index())
    }

    /// Sets up the first `count` vectors.
    ///
    /// # Errors
    /// `OutOfRange` where the device has fewer, or none of that kind, or the machine has fewer to give
    /// (MSI without interrupt remapping: one), and says how many; what the kernel answers where another kind
    /// is in use.
    pub fn vectors(&self, kind: Interrupt, count: usize) -> Result<Vectors> {
        let info = self.interrupt(kind)?;
        check(kind, &info, count, self.name())?;
        let slots = (0..count).map(|_| Slot::new()).collect::<Result<Vec<_>>>()?;
        let slot = self.inner.only(Note::Vectors { kind, count })?;
        if let Err(error) = self.transport().set_irqs(kind.index(), 0, &borrowed(&slots)) {
            // A transport that does it in parts may have connected some.
            let _ = self.transport().set_irqs(kind.index(), 0, &[]);
            self.inner.notes().try_remove(slot);
            return Err(error);
        }
        let generation = fork::generation();
        let device = self.inner.clone();
        Ok(Vectors { device, kind, info, slots, resample: None, slot, generation })
    }
}

impl Inner {
    /// Notes what there can be one of: vectors of any kind, events, a low power state.
    pub(super) fn only(&self, note: Note) -> Result<usize> {
        let mut notes = self.notes();
        let alike = notes
            .iter()
            .find(|(_, other)| std::mem::discriminant(*other) == std::mem::discriminant(&note));
        match alike {
            None => Ok(notes.insert(note)),
            Some((_, other)) => {
                let (wanted, there) = (self.describe(&note), self.describe(other));
                Err(Error::new(
                    ErrorKind::InUse,
                    "set up",
                    format!("{wanted} of {}", self.info.name),
                )
                .because(format!("there are {there}"))
                .remedy("drop those first"))
            }
        }
    }
}

fn check(kind: Interrupt, info: &IrqInfo, count: usize, name: &str) -> Result<()> {
    let refuse = |reason: String, remedy: String| {
        let object = format!("{count} vectors of {kind:?} of {name}");
        Err(Error::new(ErrorKind::OutOfRange, "set up", object).because(reason).remedy(remedy))
    };
    match info.count as usize {
        0 => refuse(
            format!("the device has no {kind:?}"),
            "use another kind: Device::interrupt reports what it has".to_owned(),
        ),
        most if count == 0 || count > most => {
            refuse(format!("the device has {most}"), format!("ask for 1 to {most}"))
        }
        _ if !info.eventfd => {
            refuse("they cannot signal an eventfd".to_owned(), "use another kind".to_owned())
        }
        _ => Ok(()),
    }
}

fn borrowed(slots: &[Slot]) -> Vec<Option<BorrowedFd<'_>>> {
    slots.iter().map(Slot::fd).collect()
}

impl Vectors {
    /// How many there are, holes included.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Which kind they are.
    pub fn kind(&self) -> Interrupt {
        self.kind
    }

    /// The eventfd of a vector, to be watched by poll or epoll: readable once it has fired. `None` for a
    /// hole, and past the last.
    pub fn fd(&self, vector: usize) -> Option<BorrowedFd<'_>> {
        self.slots.get(vector)?.fd()
    }

    /// A vector to be waited for elsewhere.
    ///
    /// # Errors
    /// `OutOfRange` past the last. That of a hole fires once the vector has been put back in.
    pub fn vector(&self, vector: usize) -> Result<Vector> {
        self.one(vector, "hand out")?;
        let eventfd = self.slots[vector].eventfd.clone();
        Ok(Vector { eventfd, name: self.name(vector).into() })
    }

    /// Waits until a vector has fired: how often since it was last asked, 0 when the time is over.
    ///
    /// It waits no longer than `timeout`, whatever else has the eventfd: a server of a vfio-user device may
    /// change its status flags and its counter. (`preadv2(2)` with `RWF_NOWAIT`, Linux 5.8.)
    ///
    /// # Errors
    /// `OutOfRange` for a hole, and past the last.
    pub fn wait(&self, vector: usize, timeout: Duration) -> Result<u64> {
        wait(self.eventfd(vector)?, timeout, || self.name(vector))
    }

    /// How often a vector has fired since it was last asked, without waiting.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn take(&self, vector: usize) -> Result<u64> {
        take(self.eventfd(vector)?, || self.name(vector))
    }

    /// Adds vectors up to `count`.
    ///
    /// # Errors
    /// `OutOfRange` where the device or the machine has fewer, or there are as many already. Where vectors
    /// had to be set up again and that failed, the old ones are set up again.
    pub fn grow(&mut self, count: usize) -> Result<Growth> {
        check(self.kind, &self.info, count, &self.device.info.name)?;
        let before = self.count();
        if count <= before {
            return Err(Error::new(ErrorKind::OutOfRange, "add", self.name(count))
                .because(format!("there are {before} vectors")));
        }
        let added = (before..count).map(|_| Slot::new()).collect::<Result<Vec<_>>>()?;
        let transport = &self.device.transport;
        let index = self.kind.index();
        let growth = if self.info.noresize {
            let all: Vec<_> = borrowed(&self.slots).into_iter().chain(borrowed(&added)).collect();
            transport.set_irqs(index, 0, &[])?;
            let result = transport.set_irqs(index, 0, &all);
            if let Err(error) = result {
                let restored = transport.set_irqs(index, 0, &borrowed(&self.slots));
                // Whoever waits looks for work, whether or not more will be told.
                self.signal_all();
                return Err(match restored {
                    Ok(()) => error,
                    Err(_) => {
                        error.remedy("create the vectors again: the old ones are no longer set up")
                    }
                });
            }
            Growth::Rearmed
        } else {
            transport.set_irqs(index, before as u32, &borrowed(&added))?;
            Growth::InPlace
        };
        self.slots.extend(added);
        if growth == Growth::Rearmed {
            self.signal_all();
        }
        if let Some(note) = self.device.notes().get_mut(self.slot) {
            *note = Note::Vectors { kind: self.kind, count };
        }
        Ok(growth)
    }

    /// Takes a vector out, which leaves a hole, or puts it back in. What it has fired before is forgotten.
    ///
    /// # Errors
    /// `OutOfRange` past the last; what the kernel answers.
    pub fn set_enabled(&mut self, vector: usize, enabled: bool) -> Result<()> {
        self.one(vector, "set up")?;
        let slot = &self.slots[vector];
        if slot.enabled == enabled {
            return Ok(());
        }
        if enabled {
            take(&*slot.eventfd, || self.name(vector))?;
        }
        let fd = enabled.then(|| slot.eventfd.as_fd());
        self.device.transport.set_irqs(self.kind.index(), vector as u32, &[fd])?;
        self.slots[vector].enabled = enabled;
        Ok(())
    }

    /// Masks a vector, or unmasks it. An INTx is masked when it fires.
    ///
    /// # Errors
    /// What the transport answers: VFIO masks INTx only.
    pub fn set_masked(&self, vector: usize, masked: bool) -> Result<()> {
        let vectors = self.one(vector, "mask")?;
        self.device.transport.mask_irqs(self.kind.index(), vectors, masked)
    }

    /// Has an INTx unmasked whenever an eventfd is written, in place of [`set_masked`](Self::set_masked):
    /// see [`resample_fd`](Self::resample_fd).
    ///
    /// # Errors
    /// `Unsupported` where vectors are not masked when they fire, as MSI and MSI-X are not, or the
    /// transport cannot do it.
    pub fn enable_resample(&mut self) -> Result<()> {
        if !self.info.automasked {
            return Err(Error::new(ErrorKind::Unsupported, "unmask by an eventfd", self.name(0))
                .because("it is not masked when it fires")
                .remedy("nothing needs to be done between one interrupt and the next"));
        }
        if self.resample.is_none() {
            let eventfd = eventfd()?;
            let fd = Some(eventfd.as_fd());
            self.device.transport.unmask_irq_by(self.kind.index(), 0, fd)?;
            self.resample = Some(eventfd);
        }
        Ok(())
    }

    /// The eventfd that unmasks the INTx when it is written; `None` before
    /// [`enable_resample`](Self::enable_resample). A hypervisor gives it to KVM with that of the vector,
    /// as `resamplefd` of `KVM_IRQFD`: its guest's end of interrupt then unmasks the device's, and what
    /// is still asserted fires again.
    pub fn resample_fd(&self) -> Option<BorrowedFd<'_>> {
        self.resample.as_ref().map(AsFd::as_fd)
    }

    /// Fires a vector as the device would: for tests.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn trigger(&self, vector: usize) -> Result<()> {
        let vectors = self.one(vector, "trigger")?;
        self.device.transport.trigger_irqs(self.kind.index(), vectors)
    }

    /// One vector as a range, of those that there are.
    fn one(&self, vector: usize, operation: &'static str) -> Result<Range<u32>> {
        if vector < self.count() {
            return Ok(vector as u32..vector as u32 + 1);
        }
        Err(Error::new(ErrorKind::OutOfRange, operation, self.name(vector))
            .because(format!("there are {}", self.count()))
            .remedy("vectors are numbered from 0; Vectors::grow adds more if the device has them"))
    }

    fn eventfd(&self, vector: usize) -> Result<&OwnedFd> {
        self.one(vector, "wait for")?;
        let slot = &self.slots[vector];
        slot.enabled.then_some(&*slot.eventfd).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "wait for", self.name(vector))
                .because("it is not set up (a hole)")
                .remedy("put it back in: Vectors::set_enabled")
        })
    }

    fn signal_all(&self) {
        self.slots.iter().filter(|slot| slot.enabled).for_each(|slot| signal(&slot.eventfd));
    }

    fn name(&self, vector: usize) -> String {
        format!("vector {vector} of {:?} of {}", self.kind, self.device.info.name)
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        if let Err(error) = self.device.transport.set_irqs(self.kind.index(), 0, &[]) {
            log::warn!("interrupts stay set up until the device is closed: {error}");
        }
        self.device.notes().try_remove(self.slot);
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vectors of {:?} of {}", self.count(), self.kind, self.device.info.name)
    }
}
