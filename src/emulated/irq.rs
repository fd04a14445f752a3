//! Interrupts of a model: the eventfd of each vector, and masked interrupts.

use std::fs;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};

use super::user::User;
use crate::transport::IrqInfo;

/// An interrupt index and its vectors.
pub(super) struct Irq {
    info: IrqInfo,
    vectors: Vec<Vector>,
}

/// The eventfd that a vector signals, and the user that connected it.
pub(super) type Connection = (Arc<OwnedFd>, Arc<User>);

#[derive(Default)]
struct Vector {
    eventfd: Option<Connection>,
    masked: bool,
    /// It fired while it was masked.
    pending: bool,
    /// It is asserted, and fires again when it is unmasked (INTx).
    asserted: bool,
}

impl Irq {
    pub(super) fn new(info: IrqInfo) -> Self {
        let vectors = std::iter::repeat_with(Vector::default).take(info.count as usize).collect();
        Self { info, vectors }
    }

    pub(super) fn info(&self) -> IrqInfo {
        self.info
    }

    /// Whether any vector has an eventfd, so that the driver uses this interrupt.
    pub(super) fn is_connected(&self) -> bool {
        self.vectors.iter().any(|vector| vector.eventfd.is_some())
    }

    fn get(&mut self, vectors: Range<u32>) -> Result<&mut [Vector], Errno> {
        self.vectors.get_mut(vectors.start as usize..vectors.end as usize).ok_or(Errno::EINVAL)
    }

    /// Connects the vectors from `start` upwards to a user's eventfds and takes those out of `fds`. Returns the
    /// previous connections. EINVAL if there are more eventfds than vectors.
    pub(super) fn connect(
        &mut self,
        user: &Arc<User>,
        start: u32,
        fds: &mut [Option<Arc<OwnedFd>>],
    ) -> Result<Vec<Option<Connection>>, Errno> {
        let end = u32::try_from(fds.len()).ok().and_then(|count| start.checked_add(count));
        let vectors = self.get(start..end.ok_or(Errno::EINVAL)?)?;
        let connect = |(vector, fd): (&mut Vector, &mut Option<Arc<OwnedFd>>)| {
            let connection = fd.take().map(|eventfd| (eventfd, user.clone()));
            std::mem::replace(&mut vector.eventfd, connection)
        };
        Ok(vectors.iter_mut().zip(fds).map(connect).collect())
    }

    /// Disconnects and unmasks the vectors that a user has connected.
    pub(super) fn disconnect_user(&mut self, user: &Arc<User>) {
        for vector in &mut self.vectors {
            if vector.eventfd.as_ref().is_some_and(|(_, connected)| Arc::ptr_eq(connected, user)) {
                vector.disconnect();
            }
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

    /// Asserts a vector, which fires it, or deasserts it.
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
        let Some((eventfd, user)) = &self.eventfd else { return };
        self.masked = automasked;
        user.signal(eventfd);
    }

    fn disconnect(&mut self) {
        *self = Self { asserted: self.asserted, ..Self::default() };
    }
}

/// Whether a descriptor may be an eventfd, by its name in `/proc`. A call on the file itself could block for as
/// long as the server of its file system wants. Without `/proc` the mode decides: an eventfd has no file type;
/// pipes, sockets and files have one.
pub(super) fn may_be_eventfd(fd: &OwnedFd) -> bool {
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => fstat(fd).is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::eventfd;

    /// An interrupt with two vectors, and a function that returns how often each has fired since its last call.
    fn irq(automasked: bool) -> (Irq, impl Fn() -> [u64; 2]) {
        let info = IrqInfo { maskable: true, automasked, ..IrqInfo::eventfds(2) };
        let mut irq = Irq::new(info);
        let events = [0; 2].map(|_| eventfd::new().unwrap());
        let fds = events.iter().map(|event| Some(Arc::new(event.try_clone().unwrap())));
        irq.connect(&User::new(0), 0, &mut fds.collect::<Vec<_>>()).unwrap();
        (irq, move || [0, 1].map(|index: usize| eventfd::take(&events[index]).unwrap()))
    }

    #[test]
    fn a_masked_vector_fires_when_it_is_unmasked() {
        let (mut irq, fired) = irq(false);
        irq.mask(1..2, true).unwrap();
        irq.fire(0..2).unwrap();
        irq.fire(1..2).unwrap();
        assert_eq!(fired(), [1, 0]);
        irq.mask(0..2, false).unwrap();
        assert_eq!(fired(), [0, 1], "once, although it fired twice");
    }

    #[test]
    fn an_asserted_vector_fires_again_at_each_unmasking_until_it_is_deasserted() {
        let (mut irq, fired) = irq(true);
        irq.set_level(0, true).unwrap();
        irq.set_level(0, true).unwrap();
        assert_eq!(fired(), [1, 0]);
        irq.mask(0..1, false).unwrap();
        assert_eq!(fired(), [1, 0]);
        irq.set_level(0, false).unwrap();
        irq.mask(0..1, false).unwrap();
        assert_eq!(fired(), [0, 0]);
    }

    #[test]
    fn vectors_that_do_not_exist_and_files_other_than_eventfds_are_refused() {
        let (mut irq, fired) = irq(false);
        assert_eq!(irq.fire(1..3), Err(Errno::EINVAL));
        assert_eq!(irq.mask(Range { start: 2, end: 1 }, true), Err(Errno::EINVAL));
        let user = User::new(0);
        for start in [1, u32::MAX] {
            let refused = irq.connect(&user, start, &mut [None, None]);
            assert_eq!(refused.map(drop), Err(Errno::EINVAL));
        }
        let (_reader, writer) = std::io::pipe().unwrap();
        assert!(!may_be_eventfd(&writer.into()) && may_be_eventfd(&eventfd::new().unwrap()));
        irq.fire(0..2).unwrap();
        assert_eq!(fired(), [1, 1], "nothing has changed");
    }

    #[test]
    fn a_user_that_leaves_disconnects_its_own_vectors_only() {
        let (mut irq, fired) = irq(false);
        let other = User::new(0);
        let event = eventfd::new().unwrap();
        irq.connect(&other, 1, &mut [Some(Arc::new(event.try_clone().unwrap()))]).unwrap();
        irq.disconnect_user(&other);
        irq.fire(0..2).unwrap();
        assert_eq!((fired(), eventfd::take(event)), ([1, 0], Ok(0)));
    }
}
