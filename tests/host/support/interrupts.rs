//! A device of interrupts alone, which the test fires, and which may misuse the eventfds that it is given.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{read, write};
use vfio_remap::transport::{DeviceInfo, IrqInfo, RegionInfo, Transport};
use vfio_remap::{Error, Result};

/// The most that an eventfd counts.
pub const FULL: u64 = u64::MAX - 1;

#[derive(Debug, Default)]
pub struct Interrupts {
    noresize: bool,
    /// How many vectors there are, if not eight.
    count: Option<u32>,
    /// Whether it watches an eventfd that unmasks, one at a time as Linux does.
    watches: bool,
    watched: Mutex<Option<OwnedFd>>,
    /// Whether it refuses the next one.
    refuses: AtomicBool,
    /// Index, vector and eventfd.
    connected: Mutex<Vec<(u32, u32, OwnedFd)>>,
    /// What it fills each eventfd with as it spoils it, if it does.
    spoils: Option<u64>,
    /// Those it has spoiled.
    spoiled: Mutex<Vec<OwnedFd>>,
}

impl Interrupts {
    /// Spoils each eventfd once, when it is given it first.
    pub fn spoiled(counter: u64) -> Self {
        Self { spoils: Some(counter), ..Self::default() }
    }

    /// Whether vectors are added by connecting all of them again.
    pub fn with_noresize(self, noresize: bool) -> Self {
        Self { noresize, ..self }
    }

    pub fn with_count(self, count: u32) -> Self {
        Self { count: Some(count), ..self }
    }

    /// Watches an eventfd that unmasks.
    pub fn watching(self) -> Self {
        Self { watches: true, ..self }
    }

    /// Refuses the next eventfd that would unmask.
    pub fn refuse_once(&self) {
        self.refuses.store(true, Ordering::Relaxed);
    }

    /// How often the eventfd that unmasks was signalled since the last call; `None` if there is none.
    pub fn unmasked(&self) -> Option<u64> {
        let watched = self.watched.lock().unwrap();
        let mut counter = [0; 8];
        let read = |fd: &OwnedFd| read(fd, &mut counter).map_or(0, |_| u64::from_ne_bytes(counter));
        watched.as_ref().map(read)
    }

    /// The vectors of an index that are connected, in order.
    pub fn connected(&self, index: u32) -> Vec<u32> {
        let connected = self.connected.lock().unwrap();
        let mut vectors: Vec<_> =
            connected.iter().filter(|(i, ..)| *i == index).map(|(_, vector, _)| *vector).collect();
        vectors.sort_unstable();
        vectors
    }

    pub fn fire(&self, index: u32, vector: u32) {
        let connected = self.connected.lock().unwrap();
        let found = connected.iter().find(|(i, v, _)| (*i, *v) == (index, vector));
        write(&found.expect("it is connected").2, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Transport for Interrupts {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("interrupts", 0)
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::trapped(4))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn irq(&self, _: u32) -> Result<IrqInfo> {
        let mut info = IrqInfo::eventfds(self.count.unwrap_or(8));
        info.noresize = self.noresize;
        info.automasked = self.watches;
        Ok(info)
    }

    fn unmask_irq_by(&self, index: u32, _: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let refuse =
            |errno| Err(Error::from_errno(errno, "unmask by an eventfd", format!("{index}")));
        let mut watched = self.watched.lock().unwrap();
        match fd {
            _ if !self.watches => return refuse(libc::EOPNOTSUPP),
            Some(_) if self.refuses.swap(false, Ordering::Relaxed) => return refuse(libc::ENOMEM),
            Some(_) if watched.is_some() => return refuse(libc::EBUSY),
            _ => *watched = fd.map(|fd| fd.try_clone_to_owned().unwrap()),
        }
        Ok(())
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let mut connected = self.connected.lock().unwrap();
        if fds.is_empty() {
            connected.retain(|(old, ..)| *old != index);
        }
        for (vector, fd) in (start..).zip(fds) {
            connected.retain(|(i, v, _)| (*i, *v) != (index, vector));
            let Some(fd) = fd else { continue };
            let fd = fd.try_clone_to_owned().unwrap();
            let mut spoiled = self.spoiled.lock().unwrap();
            if let Some(counter) = self.spoils
                && !spoiled.iter().any(|old| same(old, &fd))
            {
                spoil(&fd, counter);
                spoiled.push(fd.try_clone().unwrap());
            }
            connected.push((index, vector, fd));
        }
        Ok(())
    }
}

/// What any holder of an eventfd can do to it: make it blocking, and fill it.
pub fn spoil(eventfd: impl AsFd, counter: u64) {
    fcntl(&eventfd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    if counter > 0 {
        write(&eventfd, &counter.to_ne_bytes()).unwrap();
    }
}

/// Whether two descriptors are the same eventfd: its number is shown with the descriptor.
fn same(one: &OwnedFd, other: &OwnedFd) -> bool {
    let id = |fd: &OwnedFd| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
        info.unwrap().lines().find(|line| line.starts_with("eventfd-id")).map(str::to_owned)
    };
    id(one) == id(other)
}
