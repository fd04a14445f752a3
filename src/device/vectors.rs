//! Interrupts as file descriptors.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;

use super::resample::Resample;
use super::signals::{eventfd, signal, take, wait};
use super::{Device, Holder, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, fork};
use crate::transport::{IrqInfo, irq_index};

/// A kind of interrupt of a PCI device. A device uses one of them at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interrupt {
    /// The legacy interrupt: level-triggered. VFIO masks it when it fires; unmask it after the cause is
    /// removed.
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

impl fmt::Display for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Intx => "INTx",
            Self::Msi => "MSI",
            Self::MsiX => "MSI-X",
        })
    }
}

/// How vectors were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Growth {
    /// The vectors in use were not disturbed (MSI-X on Linux 6.5 and newer).
    InPlace,
    /// All vectors were disabled and enabled again. Interrupts in between were lost, so every vector was
    /// signalled once: look for work at each.
    Reenabled,
}

/// Vectors of a device, each with an eventfd that it signals. Dropping them disables the interrupt.
///
/// MSI and MSI-X are writes that the device starts. Without
/// [`Config::set_bus_mastering`](super::Config::set_bus_mastering) they never arrive, and no error is reported.
/// INTx does not need bus mastering.
#[must_use = "dropping them disables the interrupt"]
pub struct Vectors {
    device: Arc<Inner>,
    kind: Interrupt,
    info: IrqInfo,
    slots: Vec<Slot>,
    /// The eventfd that unmasks an INTx.
    resample: Option<Resample>,
    slot: usize,
    /// The process that set them up: see [`fork::generation`].
    generation: u32,
}

/// A vector's eventfd, which stays the same while the vector exists.
///
/// A hole has none until it is enabled or handed out: a guest that uses vector 2047 alone takes one descriptor.
#[derive(Default)]
struct Slot {
    eventfd: OnceLock<Arc<OwnedFd>>,
    /// False for a hole: the vector is not set up. If true, there is an eventfd.
    enabled: bool,
}

impl Slot {
    fn new(enabled: bool) -> Result<Self> {
        if enabled { Ok(Self::enabled(eventfd()?)) } else { Ok(Self::default()) }
    }

    fn enabled(eventfd: OwnedFd) -> Self {
        Self { eventfd: Arc::new(eventfd).into(), enabled: true }
    }

    /// The eventfd, which is made if there is none.
    fn eventfd(&self) -> Result<&Arc<OwnedFd>> {
        match self.eventfd.get() {
            Some(eventfd) => Ok(eventfd),
            None => {
                let made = Arc::new(eventfd()?);
                // Another thread may have made one meanwhile: then that is it.
                Ok(self.eventfd.get_or_init(|| made))
            }
        }
    }

    /// The eventfd; `None` for a hole.
    fn connected(&self) -> Option<&OwnedFd> {
        self.eventfd.get().filter(|_| self.enabled).map(|eventfd| &**eventfd)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.connected().map(AsFd::as_fd)
    }
}

/// One vector, for a thread or an event loop of its own. Its descriptor is readable once the vector has fired
/// (`man 2 eventfd`).
///
/// It holds neither the device nor its [`Vectors`], which may grow meanwhile. Once those are dropped, it does
/// not fire any more. Clones are the same vector and share its counter.
///
/// tokio's `AsyncFd` accepts it; the example `async_interrupts` shows how.
#[must_use = "it does nothing by itself: wait for it"]
#[derive(Clone)]
pub struct Vector {
    eventfd: Arc<OwnedFd>,
    kind: Interrupt,
    name: Arc<str>,
}

impl Vector {
    /// Waits until it has fired. Returns how often it has fired since the last call: at least once.
    ///
    /// # Errors
    /// `TimedOut` after the time limit; `Os` if the eventfd cannot be read.
    pub fn wait(&self, timeout: Duration) -> Result<u64> {
        wait(&*self.eventfd, timeout, || self.name.to_string())
            .map_err(|error| advise(error, self.kind))
    }

    /// How often it has fired since the last call; `None` if it has not. Does not wait. Afterwards its
    /// descriptor is not readable until it fires again.
    ///
    /// # Errors
    /// `Os` if the eventfd cannot be read.
    pub fn take(&self) -> Result<Option<u64>> {
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
    /// What the device offers for a kind of interrupt; a count of 0 if it has none.
    ///
    /// # Errors
    /// `Unsupported` if the transport has no interrupts; the transport's error.
    pub fn interrupt(&self, kind: Interrupt) -> Result<IrqInfo> {
        self.transport().irq(kind.index())
    }

    /// Sets up the first `count` vectors.
    ///
    /// # Errors
    /// `OutOfRange` with the largest possible count, if the device has fewer, or none of that kind, or the
    /// machine offers fewer (MSI without interrupt remapping: one); the kernel's error if another kind is in
    /// use.
    pub fn vectors(&self, kind: Interrupt, count: usize) -> Result<Vectors> {
        self.vectors_where(kind, count, |_| true)
    }

    /// Sets up the vectors with these numbers. Those between them are holes, which
    /// [`Vectors::set_enabled`] and [`Vectors::set_eventfd`] fill.
    ///
    /// # Errors
    /// As [`vectors`](Self::vectors), for as many vectors as the highest number requires.
    pub fn vectors_at(&self, kind: Interrupt, numbers: &[usize]) -> Result<Vectors> {
        let count = numbers.iter().max().map_or(0, |highest| highest.saturating_add(1));
        self.vectors_where(kind, count, |number| numbers.contains(&number))
    }

    fn vectors_where(
        &self,
        kind: Interrupt,
        count: usize,
        enabled: impl Fn(usize) -> bool,
    ) -> Result<Vectors> {
        let info = self.interrupt(kind)?;
        check(kind, &info, count, self.name())?;
        let slots = (0..count).map(|it| Slot::new(enabled(it))).collect::<Result<Vec<_>>>()?;
        let slot = self.inner.insert_exclusive(Holder::Vectors { kind, count })?;
        if let Err(error) = self.inner.set_irqs(kind, 0, &borrowed(&slots)) {
            // A transport that connects in parts may have connected some.
            let _ = self.inner.set_irqs(kind, 0, &[]);
            self.inner.holders().try_remove(slot);
            return Err(error);
        }
        let generation = fork::generation();
        let device = self.inner.clone();
        Ok(Vectors { device, kind, info, slots, resample: None, slot, generation })
    }
}

impl Inner {
    /// Connects vectors. A transport may change configuration space for that, which nobody else may do meanwhile.
    fn set_irqs(&self, kind: Interrupt, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let _one = self.control_lock();
        self.transport.set_irqs(kind.index(), start, fds)
    }

    /// Adds a holder that there can be only one of: vectors of any kind, events, a low power state.
    pub(super) fn insert_exclusive(&self, holder: Holder) -> Result<usize> {
        let mut holders = self.holders();
        let alike = holders
            .iter()
            .find(|(_, other)| std::mem::discriminant(*other) == std::mem::discriminant(&holder));
        match alike {
            None => Ok(holders.insert(holder)),
            Some((_, other)) => {
                let (wanted, there) = (self.describe(&holder), self.describe(other));
                Err(Error::new(
                    ErrorKind::InUse,
                    "set up",
                    format!("{wanted} of {}", self.info.name),
                )
                .with_reason(format!("it already has {there}"))
                .with_advice("drop those first"))
            }
        }
    }
}

fn check(kind: Interrupt, info: &IrqInfo, count: usize, name: &str) -> Result<()> {
    let refuse = |reason: String, advice: String| {
        let object = format!("{count} vectors of {kind} of {name}");
        Err(Error::new(ErrorKind::OutOfRange, "set up", object)
            .with_reason(reason)
            .with_advice(advice))
    };
    match info.count as usize {
        0 => refuse(
            format!("the device has no {kind}"),
            "use another kind; Device::interrupt reports which the device has".to_owned(),
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

/// Adds to the error of a wait why a vector may not fire.
#[cold]
fn advise(error: Error, kind: Interrupt) -> Error {
    match (error.kind(), kind) {
        (ErrorKind::TimedOut, Interrupt::Intx) => {
            error.with_advice("unmask it after each interrupt: Vectors::set_masked")
        }
        (ErrorKind::TimedOut, Interrupt::Msi | Interrupt::MsiX) => {
            error.with_advice("check that the device may send it: Config::set_bus_mastering")
        }
        _ => error,
    }
}

fn borrowed(slots: &[Slot]) -> Vec<Option<BorrowedFd<'_>>> {
    slots.iter().map(Slot::fd).collect()
}

impl Vectors {
    /// How many vectors there are, including holes.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// The kind of interrupt.
    pub fn kind(&self) -> Interrupt {
        self.kind
    }

    /// The eventfd of a vector, for poll or epoll: readable once the vector has fired. `None` for a hole, and
    /// past the last.
    pub fn fd(&self, vector: usize) -> Option<BorrowedFd<'_>> {
        self.slots.get(vector)?.fd()
    }

    /// A vector as an object of its own.
    ///
    /// # Errors
    /// `OutOfRange` past the last; `Os` if no eventfd can be made for a hole. The vector of a hole fires once it is
    /// enabled.
    pub fn vector(&self, vector: usize) -> Result<Vector> {
        self.one(vector, "hand out")?;
        let eventfd = self.slots[vector].eventfd()?.clone();
        Ok(Vector { eventfd, kind: self.kind, name: self.name(vector).into() })
    }

    /// Waits until a vector has fired. Returns how often it has fired since the last call: at least once.
    ///
    /// It waits no longer than `timeout`, even if a vfio-user server, which shares the eventfd, changes its
    /// status flags or its counter (`preadv2(2)` with `RWF_NOWAIT`, Linux 5.8).
    ///
    /// # Errors
    /// `TimedOut` after the time limit; `OutOfRange` for a hole, and past the last; `Os` if the eventfd cannot
    /// be read.
    pub fn wait(&self, vector: usize, timeout: Duration) -> Result<u64> {
        wait(self.eventfd(vector)?, timeout, || self.name(vector))
            .map_err(|error| advise(error, self.kind))
    }

    /// How often a vector has fired since the last call; `None` if it has not. Does not wait.
    ///
    /// # Errors
    /// `OutOfRange` for a hole, and past the last; `Os` if the eventfd cannot be read.
    pub fn take(&self, vector: usize) -> Result<Option<u64>> {
        take(self.eventfd(vector)?, || self.name(vector))
    }

    /// Adds vectors up to `count`.
    ///
    /// # Errors
    /// `OutOfRange` if the device or the machine has fewer, or there are that many already. If all vectors have
    /// to be set up again and that fails, the old ones are set up again.
    pub fn grow(&mut self, count: usize) -> Result<Growth> {
        check(self.kind, &self.info, count, &self.device.info.name)?;
        let before = self.count();
        if count <= before {
            return Err(Error::new(ErrorKind::OutOfRange, "add", self.name(count))
                .with_reason(format!("there are {before} vectors")));
        }
        let added = (before..count).map(|_| Slot::new(true)).collect::<Result<Vec<_>>>()?;
        self.append(added)
    }

    /// Sets up `added` after the last vector.
    fn append(&mut self, added: Vec<Slot>) -> Result<Growth> {
        let before = self.count();
        let count = before + added.len();
        let (device, kind) = (&self.device, self.kind);
        let growth = if self.info.noresize {
            let all: Vec<_> = borrowed(&self.slots).into_iter().chain(borrowed(&added)).collect();
            device.set_irqs(kind, 0, &[])?;
            let result = device.set_irqs(kind, 0, &all);
            if let Err(error) = result {
                let restored = device.set_irqs(kind, 0, &borrowed(&self.slots));
                // Waiting threads look for work, even if no more interrupts follow.
                self.signal_all();
                return Err(match restored {
                    Ok(()) => error,
                    Err(_) => error
                        .with_advice("create the vectors again: the old ones are no longer set up"),
                });
            }
            Growth::Reenabled
        } else {
            device.set_irqs(kind, before as u32, &borrowed(&added))?;
            Growth::InPlace
        };
        self.slots.extend(added);
        if growth == Growth::Reenabled {
            self.signal_all();
        }
        if let Some(holder) = self.device.holders().get_mut(self.slot) {
            *holder = Holder::Vectors { kind: self.kind, count };
        }
        Ok(growth)
    }

    /// Enables a vector, or disables it, which leaves a hole. Enabling clears its counter.
    ///
    /// # Errors
    /// `OutOfRange` past the last; the kernel's error.
    pub fn set_enabled(&mut self, vector: usize, enabled: bool) -> Result<()> {
        self.one(vector, "set up")?;
        let slot = &self.slots[vector];
        if slot.enabled == enabled {
            return Ok(());
        }
        let mut fd = None;
        if enabled {
            let eventfd = slot.eventfd()?;
            take(&**eventfd, || self.name(vector))?;
            fd = Some(eventfd.as_fd());
        }
        self.device.set_irqs(self.kind, vector as u32, &[fd])?;
        self.slots[vector].enabled = enabled;
        Ok(())
    }

    /// Has a vector signal an eventfd of the caller from now on, for example one that a hypervisor watches, and
    /// enables it. The eventfd is duplicated. If `vector` is past the last, the vectors in between become holes.
    ///
    /// An interrupt that nobody has taken yet is signalled to the new eventfd. A [`Vector`] that was handed out
    /// before keeps the old eventfd, which does not fire any more.
    ///
    /// Types that have no [`AsFd`], as the eventfds of rust-vmm, have [`AsRawFd`]. A bare number has it, too: pass only
    /// that of an eventfd which is yours.
    ///
    /// # Errors
    /// `InvalidInput` if it is not an eventfd; as [`grow`](Self::grow), and then nothing has changed.
    pub fn set_eventfd(&mut self, vector: usize, eventfd: &impl AsRawFd) -> Result<Growth> {
        let eventfd = self.duplicate(vector, eventfd)?;
        self.connect(vector, eventfd)
    }

    /// As [`set_eventfd`](Self::set_eventfd), with a descriptor that is known to be an eventfd.
    pub(crate) fn connect(&mut self, vector: usize, eventfd: OwnedFd) -> Result<Growth> {
        let before = self.count();
        if vector >= before {
            check(self.kind, &self.info, vector.saturating_add(1), &self.device.info.name)?;
            let mut added: Vec<_> = (before..vector).map(|_| Slot::default()).collect();
            added.push(Slot::enabled(eventfd));
            return self.append(added);
        }
        self.device.set_irqs(self.kind, vector as u32, &[Some(eventfd.as_fd())])?;
        let old = std::mem::replace(&mut self.slots[vector], Slot::enabled(eventfd));
        if let Some(old) = old.connected()
            && take(old, || self.name(vector))?.is_some()
        {
            self.slots[vector].connected().into_iter().for_each(signal);
        }
        Ok(Growth::InPlace)
    }

    /// A descriptor of our own for an eventfd of the caller.
    fn duplicate(&self, vector: usize, eventfd: &impl AsRawFd) -> Result<OwnedFd> {
        let fd = eventfd.as_raw_fd();
        sys::eventfd::duplicate(fd).map_err(|errno| {
            let error = Error::os(errno, "connect", self.name(vector));
            match errno {
                Errno::EINVAL | Errno::EBADF => error
                    .into_kind(ErrorKind::InvalidInput)
                    .with_reason(format!("file descriptor {fd} is not an eventfd"))
                    .with_advice("pass one that eventfd(2) made"),
                _ => error,
            }
        })
    }

    /// Masks a vector, or unmasks it. VFIO masks an INTx when it fires.
    ///
    /// # Errors
    /// The transport's error: VFIO can mask INTx only.
    pub fn set_masked(&self, vector: usize, masked: bool) -> Result<()> {
        let vectors = self.one(vector, "mask")?;
        self.device.transport.mask_irqs(self.kind.index(), vectors, masked)
    }

    /// Makes an eventfd that unmasks the INTx when it is written, instead of [`set_masked`](Self::set_masked):
    /// see [`resample_fd`](Self::resample_fd).
    ///
    /// If the transport does not watch the eventfd (Linux VFIO does), a thread does until the vectors are dropped.
    ///
    /// # Errors
    /// `Unsupported` for MSI and MSI-X, which are not masked when they fire; `Os` if the thread cannot be made.
    pub fn enable_resample(&mut self) -> Result<()> {
        if self.resample.is_none() { self.resample_by(eventfd()?) } else { Ok(()) }
    }

    /// As [`enable_resample`](Self::enable_resample), with an eventfd of the caller, which is duplicated.
    ///
    /// # Errors
    /// As [`enable_resample`](Self::enable_resample); `InvalidInput` if it is not an eventfd. The eventfd before it
    /// then still unmasks, unless the transport refuses that one, too.
    pub fn set_resample_eventfd(&mut self, eventfd: &impl AsRawFd) -> Result<()> {
        let eventfd = self.duplicate(0, eventfd)?;
        self.resample_by(eventfd)
    }

    /// As [`set_resample_eventfd`](Self::set_resample_eventfd), with a descriptor that is known to be an eventfd.
    pub(crate) fn resample_by(&mut self, eventfd: OwnedFd) -> Result<()> {
        if !self.info.automasked {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "use an eventfd to unmask",
                self.name(0),
            )
            .with_reason("it is not masked when it fires")
            .with_advice("no unmasking is needed between interrupts"));
        }
        let transport = &self.device.transport;
        // The old one goes first: Linux watches one (EBUSY), and two threads would both unmask.
        if let Some(old) = &mut self.resample {
            old.stop(transport)?;
        }
        let old = self.resample.take();
        match Resample::new(transport, eventfd) {
            Ok(new) => self.resample = Some(new),
            Err(error) => {
                self.resample = old.and_then(|old| Resample::new(transport, old.into_fd()).ok());
                return Err(error);
            }
        }
        Ok(())
    }

    /// The eventfd that unmasks the INTx when it is written; `None` before
    /// [`enable_resample`](Self::enable_resample). A hypervisor passes it to KVM together with the vector's, as
    /// `resamplefd` of `KVM_IRQFD`. The guest's end of interrupt then unmasks the INTx, which fires again if it
    /// is still asserted.
    pub fn resample_fd(&self) -> Option<BorrowedFd<'_>> {
        self.resample.as_ref().map(Resample::fd)
    }

    /// Fires a vector as the device would. For tests.
    ///
    /// # Errors
    /// The transport's error.
    pub fn trigger(&self, vector: usize) -> Result<()> {
        let vectors = self.one(vector, "trigger")?;
        self.device.transport.trigger_irqs(self.kind.index(), vectors)
    }

    /// One vector as a range, after a check that it exists.
    fn one(&self, vector: usize, operation: &'static str) -> Result<Range<u32>> {
        if vector < self.count() {
            return Ok(vector as u32..vector as u32 + 1);
        }
        Err(Error::new(ErrorKind::OutOfRange, operation, self.name(vector))
            .with_reason(format!("there are {} vectors", self.count()))
            .with_advice(
                "vectors are numbered from 0; Vectors::grow adds more if the device has them",
            ))
    }

    fn eventfd(&self, vector: usize) -> Result<&OwnedFd> {
        self.one(vector, "wait for")?;
        let slot = &self.slots[vector];
        slot.connected().ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, "wait for", self.name(vector))
                .with_reason("it is not set up (a hole)")
                .with_advice("enable it: Vectors::set_enabled")
        })
    }

    fn signal_all(&self) {
        self.slots.iter().filter_map(Slot::connected).for_each(signal);
    }

    fn name(&self, vector: usize) -> String {
        format!("vector {vector} of {} of {}", self.kind, self.device.info.name)
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            return;
        }
        if let Err(error) = self.device.set_irqs(self.kind, 0, &[]) {
            log::warn!("interrupts stay set up until the device is closed: {error}");
        }
        self.device.holders().try_remove(self.slot);
    }
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vectors of {} of {}", self.count(), self.kind, self.device.info.name)
    }
}
