//! Events of a device as a whole.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::signals::{eventfd, take, wait_until};
use super::{Device, Holder, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::transport::irq_index;

/// An event that the kernel reports for a device as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// The device has reported an uncorrectable error (PCIe AER). Do not trust it any more; reset it. Errors
    /// are reported only if [`Config::set_error_reporting`](super::Config::set_error_reporting) enabled that.
    Error,
    /// The device is being unbound or removed. Release it: drop windows, buffers and vectors, and
    /// [`Device::close`] it. The kernel repeats this event every ten seconds.
    Release,
}

/// The events of a device. The descriptor is readable while [`take`](Self::take) has an event to return.
///
/// Unbinding a device waits until its user closes it. A driver that does not watch for [`Event::Release`] makes
/// it wait until the driver exits.
#[must_use = "dropping it ends the watch"]
pub struct Events {
    device: Arc<Inner>,
    error: Option<OwnedFd>,
    release: Option<OwnedFd>,
    /// Watches both.
    both: Epoll,
    slot: usize,
    generation: u32,
}

impl Device {
    /// Watches for errors and for requests to release the device, as far as the device offers them.
    ///
    /// # Errors
    /// `Unsupported` if it offers neither.
    pub fn events(&self) -> Result<Events> {
        let failed = |errno| Error::os(errno, "watch", self.name());
        let both = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let connect = |both: &Epoll, index| -> Result<Option<OwnedFd>> {
            let info = self.transport().irq(index)?;
            if info.count == 0 || !info.eventfd {
                return Ok(None);
            }
            let eventfd = eventfd()?;
            both.add(&eventfd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(failed)?;
            self.transport().set_irqs(index, 0, &[Some(eventfd.as_fd())])?;
            Ok(Some(eventfd))
        };
        let slot = self.inner.insert_exclusive(Holder::Events)?;
        let generation = fork::generation();
        // If an error follows, dropping this disconnects what was connected.
        let device = self.inner.clone();
        let mut events = Events { device, error: None, release: None, both, slot, generation };
        events.error = connect(&events.both, irq_index::ERR)?;
        events.release = connect(&events.both, irq_index::REQ)?;
        if events.error.is_none() && events.release.is_none() {
            return Err(Error::new(ErrorKind::Unsupported, "watch", self.name())
                .with_reason("the device reports neither errors nor requests to release it")
                .with_advice("poll its status registers for errors instead"));
        }
        Ok(events)
    }
}

impl Events {
    /// Readable once [`Event::Error`] has come; `None` if the device does not offer it.
    pub fn error_fd(&self) -> Option<BorrowedFd<'_>> {
        self.error.as_ref().map(AsFd::as_fd)
    }

    /// Readable once [`Event::Release`] has come; `None` if the device does not offer it.
    pub fn release_fd(&self) -> Option<BorrowedFd<'_>> {
        self.release.as_ref().map(AsFd::as_fd)
    }

    /// The next event, errors first; `None` if there is none. Does not wait.
    ///
    /// # Errors
    /// `Os` if the eventfd cannot be read.
    pub fn take(&self) -> Result<Option<Event>> {
        for (eventfd, event) in [(&self.error, Event::Error), (&self.release, Event::Release)] {
            if let Some(eventfd) = eventfd
                && take(eventfd, || self.name())?.is_some()
            {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// `TimedOut` after the time limit; as [`take`](Self::take).
    pub fn wait(&self, timeout: Duration) -> Result<Event> {
        wait_until(self.as_fd(), timeout, || self.take(), || self.name())
    }

    fn name(&self) -> String {
        format!("events of {}", self.device.info.name)
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.both.0.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.both.0.as_raw_fd()
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
        self.device.holders().try_remove(self.slot);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Events({})", self.device.info.name)
    }
}
