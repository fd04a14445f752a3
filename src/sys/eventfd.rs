//! Eventfds that are shared with an untrusted peer.
//!
//! An eventfd's status flags belong to the open file description, which every holder of the descriptor
//! shares. A peer can clear `O_NONBLOCK` and fill the counter at any time (`man 2 eventfd`). So no call
//! here depends on that flag, and none waits.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::errno::Errno;
#[cfg(feature = "passthrough")]
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{file, fork};

/// `eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)`.
pub(crate) fn new() -> Result<OwnedFd, Errno> {
    // Non-blocking for the program's own reads; nothing here relies on it.
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(OwnedFd::from)
}

/// `fcntl(fd, F_DUPFD_CLOEXEC)`, unless the copy is another file than an eventfd according to `/proc/self/fd`. Where
/// there is no `/proc`, as for a jailed hypervisor, the caller is trusted: the kernel refuses what is no eventfd when
/// a vector is connected to it.
///
/// # Errors
/// EINVAL if it is another file; EBADF if it is none.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no effect but a new descriptor, whatever `fd` is.
    let copy = Errno::result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: the kernel has just made the descriptor, for this call alone.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    match nix::fcntl::readlink(format!("/proc/self/fd/{}", copy.as_raw_fd()).as_str()) {
        Ok(link) if link != "anon_inode:[eventfd]" => Err(Errno::EINVAL),
        _ => Ok(copy),
    }
}

/// `poll(eventfd, POLLIN, 0)`: whether the counter is not zero.
#[cfg(feature = "passthrough")]
pub(crate) fn is_signalled(eventfd: impl AsFd) -> bool {
    let mut polled = [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// `preadv2(eventfd, 8 bytes, offset -1, RWF_NOWAIT)`: returns the counter and sets it to zero.
///
/// Unlike `read(2)`, it cannot wait, whatever the status flags are. An eventfd accepts `RWF_NOWAIT` since
/// Linux 5.8, and no offset but -1, the current one.
pub(crate) fn take(eventfd: impl AsFd) -> Result<u64, Errno> {
    let mut counter = [0; 8];
    let part = [IoSliceMut::new(&mut counter)];
    // The raw system call, because not every C library has preadv2. It takes the offset as two longs; if a
    // long has 64 bits, the lower one is the whole offset.
    // SAFETY: the kernel writes to one buffer, which is ours and lives until the call returns; IoSliceMut
    // has the layout of iovec.
    let done = unsafe {
        libc::syscall(
            libc::SYS_preadv2,
            eventfd.as_fd().as_raw_fd(),
            part.as_ptr(),
            part.len(),
            -1 as libc::c_long,
            -1 as libc::c_long,
            libc::RWF_NOWAIT,
        )
    };
    match Errno::result(done) {
        Ok(_) => Ok(u64::from_ne_bytes(counter)),
        Err(Errno::EAGAIN) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// Adds one to the counter, without waiting: a full counter stays full.
///
/// `write(2)` waits while the counter is full, and an eventfd does not support `RWF_NOWAIT` for writes
/// (EOPNOTSUPP). The kernel itself signals an eventfd without waiting, for example when an asynchronous
/// request completes (`IOCB_FLAG_RESFD`, `man 2 io_submit`). So this function submits a read of zero bytes,
/// which the kernel completes before the call returns.
///
/// # Errors
/// ENOSYS if the kernel has no `CONFIG_AIO`; the errno of a seccomp filter; EAGAIN past
/// `fs.aio-max-nr`; EINVAL if the descriptor is not an eventfd, or if this process is a child of the one
/// that signalled first.
pub(crate) fn signal(eventfd: impl AsFd) -> Result<(), Errno> {
    static QUEUE: OnceLock<Result<Queue, Errno>> = OnceLock::new();
    let queue = QUEUE.get_or_init(Queue::new).as_ref().map_err(|errno| *errno)?;
    queue.signal(eventfd.as_fd())
}

/// An AIO context of this process (`io_setup(2)`). It lives as long as the process: destroying one takes
/// milliseconds.
struct Queue {
    context: libc::c_ulong,
    /// The empty file that requests read.
    file: OwnedFd,
    /// The process that owns the context: a child of `fork(2)` does not inherit it.
    generation: u32,
}

/// `struct iocb` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion {
    data: u64,
    request: u64,
    results: [i64; 2],
}

impl Queue {
    /// How many completions the ring holds at least; the kernel rounds it up.
    const REQUESTS: libc::c_uint = 64;
    const ATTEMPTS: u32 = 16;
    const IOCB_CMD_PREAD: u16 = 0;
    const IOCB_FLAG_RESFD: u32 = 1;

    fn new() -> Result<Self, Errno> {
        let file = file::memory_file("vfio-remap-signal", 0)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes the one word.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, Self::REQUESTS, &mut context) };
        Errno::result(done)?;
        Ok(Self { context, file, generation: fork::generation() })
    }

    fn signal(&self, eventfd: BorrowedFd<'_>) -> Result<(), Errno> {
        if self.generation != fork::generation() {
            return Err(Errno::EINVAL);
        }
        let mut request = Request {
            opcode: Self::IOCB_CMD_PREAD,
            file: self.file.as_raw_fd() as u32,
            flags: Self::IOCB_FLAG_RESFD,
            eventfd: eventfd.as_raw_fd() as u32,
            ..Request::default()
        };
        let mut requests = [&raw mut request];
        let mut submit = || {
            // SAFETY: the array has one pointer, to a request of ours. The kernel writes `key` into it and
            // has copied the rest when the call returns. The request reads zero bytes, so its buffer is
            // never used.
            let done = unsafe {
                libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_mut_ptr())
            };
            Errno::result(done).map(drop)
        };
        // Completions stay in the kernel's ring until it is full (EAGAIN). Other threads may fill the room
        // that this one makes.
        for _ in 0..Self::ATTEMPTS {
            match submit() {
                Err(Errno::EAGAIN) => self.clear()?,
                other => return other,
            }
        }
        submit()
    }

    /// Discards completions from the ring.
    fn clear(&self) -> Result<(), Errno> {
        let mut completions = [Completion::default(); Self::REQUESTS as usize];
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most as many completions as the buffer holds, and reads the time.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0 as libc::c_long,
                completions.len(),
                completions.as_mut_ptr(),
                &raw const at_once,
            )
        };
        Errno::result(done).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::write;

    use super::*;

    /// An eventfd as a peer may leave it: blocking, with its counter at `counter`.
    fn hostile(counter: u64) -> OwnedFd {
        let eventfd = new().unwrap();
        fcntl(&eventfd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        if counter > 0 {
            write(&eventfd, &counter.to_ne_bytes()).unwrap();
        }
        eventfd
    }

    #[test]
    fn taking_does_not_wait_on_a_blocking_eventfd() {
        assert_eq!(take(hostile(0)), Ok(0));
        let eventfd = hostile(7);
        assert_eq!((take(&eventfd), take(&eventfd)), (Ok(7), Ok(0)));
    }

    #[test]
    fn signalling_does_not_wait_on_a_full_eventfd() {
        let full = u64::MAX - 1;
        let eventfd = hostile(full);
        signal(&eventfd).unwrap();
        signal(&eventfd).unwrap();
        assert!(take(&eventfd).unwrap() >= full);
        assert_eq!(take(&eventfd), Ok(0));
    }

    #[test]
    fn each_signal_counts_however_many_there_are() {
        let eventfd = hostile(0);
        for _ in 0..10_000 {
            signal(&eventfd).unwrap();
        }
        assert_eq!(take(&eventfd), Ok(10_000));
    }

    #[test]
    fn threads_may_signal_at_once() {
        let eventfd = hostile(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..2_000).for_each(|_| signal(&eventfd).unwrap()));
            }
        });
        assert_eq!(take(&eventfd), Ok(16_000));
    }

    #[test]
    fn other_files_cannot_be_signalled() {
        assert_eq!(signal(file::memory_file("test", 0).unwrap()), Err(Errno::EINVAL));
    }

    #[test]
    fn an_eventfd_alone_can_be_duplicated() {
        let eventfd = hostile(0);
        let copy = duplicate(eventfd.as_raw_fd()).unwrap();
        signal(&eventfd).unwrap();
        assert_eq!(take(copy), Ok(1));
        let file = file::memory_file("test", 0).unwrap();
        assert_eq!(duplicate(file.as_raw_fd()).map(drop), Err(Errno::EINVAL));
        assert_eq!(duplicate(-1).map(drop), Err(Errno::EBADF));
    }

    #[test]
    fn an_eventfd_can_be_duplicated_where_there_is_no_proc() {
        let eventfd = hostile(0);
        let jailed = || {
            let chroot = || {
                // SAFETY: the kernel reads the path, which ends with 0. There is no `/proc` in `/sys`.
                unsafe { libc::chroot(c"/sys".as_ptr()) == 0 }
            };
            // Without the capability: in a user namespace of its own, which the child's one thread may make.
            // SAFETY: the call changes the child alone.
            let inside = chroot() || unsafe { libc::unshare(libc::CLONE_NEWUSER) == 0 } && chroot();
            inside && duplicate(eventfd.as_raw_fd()).is_ok_and(|copy| signal_by_write(&copy))
        };
        // SAFETY: the child makes system calls, and takes no lock but the allocator's.
        assert!(unsafe { fork::holds_in_child(jailed) });
        assert_eq!(take(&eventfd), Ok(1));
    }

    fn signal_by_write(eventfd: &OwnedFd) -> bool {
        write(eventfd, &1u64.to_ne_bytes()).is_ok()
    }

    #[test]
    fn signalling_fails_in_a_child() {
        let eventfd = hostile(0);
        signal(&eventfd).unwrap();
        // SAFETY: the child makes a system call at most.
        assert!(unsafe { fork::holds_in_child(|| signal(&eventfd) == Err(Errno::EINVAL)) });
        assert_eq!(take(&eventfd), Ok(1));
    }
}
