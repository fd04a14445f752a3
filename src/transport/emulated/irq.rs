//! Interrupts of a model: which eventfd each vector signals, and what waits behind a mask.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::write;

use crate::transport::IrqInfo;

/// An interrupt index.
#[derive(Debug)]
pub(super) struct Line {
    info: IrqInfo,
    vectors: Vec<Vector>,
}

#[derive(Debug, Default)]
struct Vector {
    eventfd: Option<OwnedFd>,
    masked: bool,
    /// It fired while it was masked.
    pending: bool,
    /// It is asserted, and fires again when it is unmasked (INTx).
    asserted: bool,
}

impl Line {
    pub(super) fn new(info: IrqInfo) -> Self {
        let vectors = std::iter::repeat_with(Vector::default).take(info.count as usize).collect();
        Self { info, vectors }
    }

    pub(super) fn info(&self) -> IrqInfo {
        self.info
    }

    /// Whether any vector has an eventfd: the driver uses this interrupt.
    pub(super) fn is_connected(&self) -> bool {
        self.vectors.iter().any(|vector| vector.eventfd.is_some())
    }

    fn get(&mut self, vectors: Range<u32>) -> Result<&mut [Vector], Errno> {
        self.vectors.get_mut(vectors.start as usize..vectors.end as usize).ok_or(Errno::EINVAL)
    }

    /// Connects the vectors from `start` on; EINVAL where one of the files is no eventfd, or they are
    /// more than the vectors.
    pub(super) fn connect(&mut self, start: u32, fds: Vec<Option<OwnedFd>>) -> Result<(), Errno> {
        let end = u32::try_from(fds.len()).ok().and_then(|count| start.checked_add(count));
        let vectors = self.get(start..end.ok_or(Errno::EINVAL)?)?;
        if fds.iter().flatten().any(|fd| !may_be_eventfd(fd)) {
            return Err(Errno::EINVAL);
        }
        for (vector, eventfd) in vectors.iter_mut().zip(fds) {
            vector.eventfd = eventfd;
        }
        Ok(())
    }

    /// Takes all vectors out of use, and unmasks them.
    pub(super) fn disconnect(&mut self) {
        for vector in &mut self.vectors {
            *vector = Vector { asserted: vector.asserted, ..Vector::default() };
        }
    }

    pub(super) fn mask(&mut self, vectors: Range<u32>, masked: bool) -> Result<(), Errno> {
        let automasked = self.info.automasked;
        for vector in self.get(vectors)? {
            vector.masked = masked;
            if !masked && (std::mem::take(&mut vector.pending) || vector.asserted) {
                vector.fire(automasked);
            }
        }
        Ok(())
    }

    /// Fires vectors, once.
    pub(super) fn fire(&mut self, vectors: Range<u32>) -> Result<(), Errno> {
        let automasked = self.info.automasked;
        self.get(vectors)?.iter_mut().for_each(|vector| vector.fire(automasked));
        Ok(())
    }

    /// Asserts a vector, which fires, or takes that back.
    pub(super) fn set_level(&mut self, vector: u32, asserted: bool) -> Result<(), Errno> {
        let automasked = self.info.automasked;
        let end = vector.checked_add(1).ok_or(Errno::EINVAL)?;
        for vector in self.get(vector..end)? {
            let was = std::mem::replace(&mut vector.asserted, asserted);
            if asserted && !was {
                vector.fire(automasked);
            } else if !asserted {
                vector.pending = false;
            }
        }
        Ok(())
    }
}

impl Vector {
    fn fire(&mut self, automasked: bool) {
        if self.masked {
            self.pending = true;
            return;
        }
        let Some(eventfd) = &self.eventfd else { return };
        self.masked = automasked;
        if let Err(error) = signal(eventfd) {
            log::debug!("an interrupt was lost: {error}");
        }
    }
}

/// Eventfds are anonymous inodes, whose mode names no type. Pipes, sockets and files, which might make
/// a write wait, are not.
fn may_be_eventfd(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == 0)
}

/// Adds one to the eventfd. A counter that is full has signalled already, and would make the write
/// wait.
fn signal(eventfd: &OwnedFd) -> io::Result<()> {
    let mut ready = [PollFd::new(eventfd.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::ZERO)? > 0 {
        write(eventfd, &1u64.to_ne_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    /// A line of two vectors, and how often each has fired since asked last.
    fn line(automasked: bool) -> (Line, impl Fn() -> [u64; 2]) {
        let info = IrqInfo { maskable: true, automasked, ..IrqInfo::eventfds(2) };
        let mut line = Line::new(info);
        let events = [0; 2].map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let fds = events.iter().map(|event| Some(event.as_fd().try_clone_to_owned().unwrap()));
        line.connect(0, fds.collect()).unwrap();
        (line, move || [0, 1].map(|index: usize| events[index].read().unwrap_or(0)))
    }

    #[test]
    fn a_masked_vector_fires_when_it_is_unmasked() {
        let (mut line, fired) = line(false);
        line.mask(1..2, true).unwrap();
        line.fire(0..2).unwrap();
        line.fire(1..2).unwrap();
        assert_eq!(fired(), [1, 0]);
        line.mask(0..2, false).unwrap();
        assert_eq!(fired(), [0, 1], "once, however often it fired");
    }

    #[test]
    fn an_asserted_line_fires_again_at_each_unmasking_until_it_is_served() {
        let (mut line, fired) = line(true);
        line.set_level(0, true).unwrap();
        line.set_level(0, true).unwrap();
        assert_eq!(fired(), [1, 0]);
        line.mask(0..1, false).unwrap();
        assert_eq!(fired(), [1, 0]);
        line.set_level(0, false).unwrap();
        line.mask(0..1, false).unwrap();
        assert_eq!(fired(), [0, 0]);
    }

    #[test]
    fn vectors_that_do_not_exist_and_files_that_are_no_eventfds_are_refused() {
        let (mut line, fired) = line(false);
        assert_eq!(line.fire(1..3), Err(Errno::EINVAL));
        assert_eq!(line.mask(Range { start: 2, end: 1 }, true), Err(Errno::EINVAL));
        assert_eq!(line.connect(u32::MAX, vec![None, None]), Err(Errno::EINVAL));
        let (_reader, writer) = std::io::pipe().unwrap();
        assert_eq!(line.connect(0, vec![None, Some(writer.into())]), Err(Errno::EINVAL));
        line.fire(0..2).unwrap();
        assert_eq!(fired(), [1, 1], "nothing has changed");
    }
}
