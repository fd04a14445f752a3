//! Interrupts as file descriptors.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

use super::{Device, Inner, Note};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, fork};
use crate::transport::{IrqInfo, irq_index};

/// A kind of interrupt of a PCI device. A device uses one of them at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
pub enum Growth {
    /// Beside those in use, which went on firing (MSI-X on Linux 6.5 and newer).
    InPlace,
    /// All vectors were taken out of use and set up anew. What fired meanwhile was lost, so every
    /// vector was signalled once: look for work at each.
    Rearmed,
}

/// Vectors of a device, each signalling an eventfd. Dropping them takes the interrupt out of use.
///
/// MSI and MSI-X are writes that the device starts: without
/// [`Config::set_bus_mastering`](super::Config::set_bus_mastering) none ever comes, and nothing says so. An
/// INTx needs no such leave.
pub struct Vectors {
    device: Arc<Inner>,
    kind: Interrupt,
    info: IrqInfo,
    /// `None` is a hole: a vector that is not set up.
    eventfds: Vec<Option<OwnedFd>>,
    /// What unmasks an INTx, beside [`set_masked`](Self::set_masked).
    resample: Option<OwnedFd>,
    slot: usize,
    /// The process that set them up: see [`fork::generation`].
    generation: u32,
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
        let eventfds = (0..count).map(|_| eventfd().map(Some)).collect::<Result<Vec<_>>>()?;
        let slot = self.inner.only(Note::Vectors { kind, count })?;
        if let Err(error) = self.transport().set_irqs(kind.index(), 0, &borrowed(&eventfds)) {
            // A transport that does it in parts may have connected some.
            let _ = self.transport().set_irqs(kind.index(), 0, &[]);
            self.inner.notes().try_remove(slot);
            return Err(error);
        }
        let generation = fork::generation();
        let device = self.inner.clone();
        Ok(Vectors { device, kind, info, eventfds, resample: None, slot, generation })
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
            "use another kind: Device::interrupt tells what it has".to_owned(),
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

pub(super) fn eventfd() -> Result<OwnedFd> {
    sys::eventfd::new().map_err(|errno| Error::os(errno, "make", "an eventfd"))
}

fn borrowed(eventfds: &[Option<OwnedFd>]) -> Vec<Option<BorrowedFd<'_>>> {
    eventfds.iter().map(|eventfd| eventfd.as_ref().map(AsFd::as_fd)).collect()
}

impl Vectors {
    /// How many there are, holes included.
    pub fn count(&self) -> usize {
        self.eventfds.len()
    }

    /// Which kind they are.
    pub fn kind(&self) -> Interrupt {
        self.kind
    }

    /// The eventfd of a vector, to be watched by poll, epoll, mio or tokio: readable once it has fired.
    /// `None` for a hole, and past the last.
    pub fn fd(&self, vector: usize) -> Option<BorrowedFd<'_>> {
        Some(self.eventfds.get(vector)?.as_ref()?.as_fd())
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
    /// had to be set up anew and that failed, the old ones are set up again.
    pub fn grow(&mut self, count: usize) -> Result<Growth> {
        check(self.kind, &self.info, count, &self.device.info.name)?;
        let before = self.count();
        if count <= before {
            return Err(Error::new(ErrorKind::OutOfRange, "add", self.name(count))
                .because(format!("there are {before} vectors")));
        }
        let added = (before..count).map(|_| eventfd().map(Some)).collect::<Result<Vec<_>>>()?;
        let transport = &self.device.transport;
        let index = self.kind.index();
        let growth = if self.info.noresize {
            let all: Vec<_> =
                borrowed(&self.eventfds).into_iter().chain(borrowed(&added)).collect();
            transport.set_irqs(index, 0, &[])?;
            let result = transport.set_irqs(index, 0, &all);
            if let Err(error) = result {
                let restored = transport.set_irqs(index, 0, &borrowed(&self.eventfds));
                // Whoever waits looks for work, whether or not more will be told.
                self.signal_all();
                return Err(match restored {
                    Ok(()) => error,
                    Err(_) => {
                        error.remedy("make the vectors anew: the old ones are not set up any more")
                    }
                });
            }
            Growth::Rearmed
        } else {
            transport.set_irqs(index, before as u32, &borrowed(&added))?;
            Growth::InPlace
        };
        self.eventfds.extend(added);
        if growth == Growth::Rearmed {
            self.signal_all();
        }
        if let Some(note) = self.device.notes().get_mut(self.slot) {
            *note = Note::Vectors { kind: self.kind, count };
        }
        Ok(growth)
    }

    /// Takes a vector out, which leaves a hole, or puts it back in, with an eventfd of its own anew.
    ///
    /// # Errors
    /// `OutOfRange` past the last; what the kernel answers.
    pub fn set_enabled(&mut self, vector: usize, enabled: bool) -> Result<()> {
        self.one(vector, "set up")?;
        let slot = &mut self.eventfds[vector];
        if slot.is_some() == enabled {
            return Ok(());
        }
        let wanted = if enabled { Some(eventfd()?) } else { None };
        let fd = wanted.as_ref().map(AsFd::as_fd);
        self.device.transport.set_irqs(self.kind.index(), vector as u32, &[fd])?;
        *slot = wanted;
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
            .remedy("they are counted from 0; Vectors::grow adds some where the device has more"))
    }

    fn eventfd(&self, vector: usize) -> Result<&OwnedFd> {
        self.one(vector, "wait for")?;
        self.eventfds[vector].as_ref().ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "wait for", self.name(vector))
                .because("it is a hole")
                .remedy("put it back in: Vectors::set_enabled")
        })
    }

    fn signal_all(&self) {
        self.eventfds.iter().flatten().for_each(signal);
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

/// The counter of an eventfd, once it is not zero or the time is over.
pub(super) fn wait(eventfd: &OwnedFd, timeout: Duration, name: impl Fn() -> String) -> Result<u64> {
    let end = Instant::now().checked_add(timeout);
    loop {
        let count = take(eventfd, &name)?;
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if count > 0 || left == Some(Duration::ZERO) {
            return Ok(count);
        }
        // Rounded up, so that the last millisecond is not spent in a loop.
        let left = left.unwrap_or(Duration::MAX).saturating_add(Duration::from_micros(999));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::os(errno, "wait for", name())),
        }
    }
}

/// Adds to the counter of an eventfd, without waiting.
fn signal(eventfd: &OwnedFd) {
    let Err(errno) = sys::eventfd::signal(eventfd) else { return };
    // Whoever else has the eventfd can make a write wait: by a thread, then, that holds nothing but it.
    log::debug!("an eventfd is signalled by a thread: {errno}");
    let Ok(eventfd) = eventfd.try_clone() else { return };
    let thread = thread::Builder::new().name("vfio-remap signal".to_owned());
    let thread = thread.spawn(move || {
        // A full counter is one that is told already; from zero the write does not wait.
        let _ = sys::eventfd::take(&eventfd);
        let _ = write(&eventfd, &1u64.to_ne_bytes());
    });
    if let Err(error) = thread {
        log::warn!("vectors that were set up again are not signalled: {error}");
    }
}

fn take(eventfd: &OwnedFd, name: impl Fn() -> String) -> Result<u64> {
    sys::eventfd::take(eventfd).map_err(|errno| Error::os(errno, "wait for", name()))
}

/// Something that the kernel says of the device as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The device has reported an uncorrectable error (PCIe AER). What it does from here on is not to
    /// be trusted; reset it. It reports where that is switched on:
    /// [`Config::set_error_reporting`](super::Config::set_error_reporting).
    Error,
    /// Somebody wants the device back: it is being unbound or removed. Let go of it: drop windows,
    /// buffers and vectors, and [`Device::close`] it. The kernel repeats this every ten seconds.
    Release,
}

/// The events of a device. Watch the descriptors, or ask.
///
/// A driver that does not ask for them keeps its device until it exits, and so long holds up whoever
/// unbinds it.
pub struct Events {
    device: Arc<Inner>,
    error: Option<OwnedFd>,
    release: Option<OwnedFd>,
    slot: usize,
    generation: u32,
}

impl Device {
    /// Asks to be told of errors and of requests to release the device, as far as it offers them.
    ///
    /// # Errors
    /// `Unsupported` where it offers neither.
    pub fn events(&self) -> Result<Events> {
        let connect = |index| -> Result<Option<OwnedFd>> {
            let info = self.transport().irq(index)?;
            if info.count == 0 || !info.eventfd {
                return Ok(None);
            }
            let eventfd = eventfd()?;
            self.transport().set_irqs(index, 0, &[Some(eventfd.as_fd())])?;
            Ok(Some(eventfd))
        };
        let slot = self.inner.only(Note::Events)?;
        let generation = fork::generation();
        // From here on, an error drops what was connected so far.
        let device = self.inner.clone();
        let mut events = Events { device, error: None, release: None, slot, generation };
        events.error = connect(irq_index::ERR)?;
        events.release = connect(irq_index::REQ)?;
        if events.error.is_none() && events.release.is_none() {
            return Err(Error::new(ErrorKind::Unsupported, "watch", self.name())
                .because("it tells neither of errors nor of requests to release it")
                .remedy("do without: its registers tell of errors, and nobody asks for it"));
        }
        Ok(events)
    }
}

impl Events {
    /// Readable when [`Event::Error`] has come; `None` where the device does not tell.
    pub fn error_fd(&self) -> Option<BorrowedFd<'_>> {
        self.error.as_ref().map(AsFd::as_fd)
    }

    /// Readable when [`Event::Release`] has come; `None` where the device does not tell.
    pub fn release_fd(&self) -> Option<BorrowedFd<'_>> {
        self.release.as_ref().map(AsFd::as_fd)
    }

    /// What has come since it was last asked, errors first; does not wait.
    ///
    /// # Errors
    /// `Os` where the descriptor cannot be read.
    pub fn poll(&self) -> Result<Option<Event>> {
        let name = || format!("events of {}", self.device.info.name);
        for (eventfd, event) in [(&self.error, Event::Error), (&self.release, Event::Release)] {
            if let Some(eventfd) = eventfd
                && take(eventfd, name)? > 0
            {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Waits for an event; `None` when the time is over.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    pub fn wait(&self, timeout: Duration) -> Result<Option<Event>> {
        let end = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.poll()? {
                return Ok(Some(event));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            let left = left.unwrap_or(Duration::MAX).saturating_add(Duration::from_micros(999));
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let fds = [&self.error, &self.release].into_iter().flatten();
            let mut fds: Vec<_> =
                fds.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    let object = format!("events of {}", self.device.info.name);
                    return Err(Error::os(errno, "wait for", object));
                }
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        for (eventfd, index) in [(&self.error, irq_index::ERR), (&self.release, irq_index::REQ)] {
            if eventfd.is_some()
                && let Err(error) = self.device.transport.set_irqs(index, 0, &[])
            {
                log::warn!("an event stays connected until the device is closed: {error}");
            }
        }
        self.device.notes().try_remove(self.slot);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Events({})", self.device.info.name)
    }
}
