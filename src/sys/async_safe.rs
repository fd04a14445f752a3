//! System calls for code that may run in a signal handler: no lock, no allocation, no cancellation point of
//! the C library, no interceptor of a sanitizer.
//!
//! They change `errno`, which a handler saves and restores.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::marker::PhantomData;

use libc::{c_long, syscall};
use nix::errno::Errno;

use super::mm::Access;
use super::spy::{self, Call};

type Result<T> = std::result::Result<T, Errno>;

/// The size of the kernel's `sigset_t` in bytes: 64 signals.
pub(crate) const SIGNAL_SET: usize = 8;

/// What a private mapping holds.
#[derive(Clone, Copy)]
pub(crate) enum Private {
    /// The bytes of this file from offset 0 on.
    File(i32),
    /// Zeros.
    Anonymous,
}

impl Private {
    fn flags_and_fd(self) -> (c_long, c_long) {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        match self {
            Self::File(fd) => (c_long::from(flags), c_long::from(fd)),
            Self::Anonymous => (c_long::from(flags | libc::MAP_ANONYMOUS), -1),
        }
    }
}

fn done(result: c_long) -> Result<usize> {
    Errno::result(result).map(|result| result as usize)
}

/// `mmap(address, size, prot, MAP_PRIVATE|MAP_NORESERVE|MAP_FIXED, file, 0)`: replaces what is mapped there
/// by private pages, in one step for the threads that access it.
///
/// # Safety
/// The range is the caller's to replace. Whoever accesses it expects no more of it than of a device.
pub(crate) unsafe fn replace(
    address: usize,
    size: usize,
    access: Access,
    with: Private,
) -> Result<()> {
    spy::call(Call::MapFixed { address, len: size })?;
    // SAFETY: by the contract.
    unsafe { map_private(address, size, access, with, libc::MAP_FIXED) }.map(drop)
}

/// As [`replace`], if nothing is mapped there (`MAP_FIXED_NOREPLACE`); EEXIST if something is.
pub(crate) fn fill_gap(address: usize, size: usize, access: Access, with: Private) -> Result<()> {
    spy::call(Call::FillGap { address })?;
    // SAFETY: nothing is replaced.
    let at = unsafe { map_private(address, size, access, with, libc::MAP_FIXED_NOREPLACE) }?;
    not_elsewhere(at, address, size)
}

/// `mmap(address, size, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE|MAP_FIXED_NOREPLACE)`: makes a hole
/// inaccessible, which counts neither as committed memory nor as data. EEXIST if something is mapped there.
pub(crate) fn plug_gap(address: usize, size: usize) -> Result<()> {
    spy::call(Call::ReserveAt { address })?;
    let (flags, fd) = Private::Anonymous.flags_and_fd();
    let flags = flags | c_long::from(libc::MAP_FIXED_NOREPLACE);
    let prot = c_long::from(libc::PROT_NONE);
    // SAFETY: nothing is replaced.
    let at = done(unsafe { syscall(libc::SYS_mmap, address, size, prot, flags, fd, 0 as c_long) })?;
    not_elsewhere(at, address, size)
}

/// A kernel before 4.17 takes the address of `MAP_FIXED_NOREPLACE` as a hint.
fn not_elsewhere(at: usize, address: usize, size: usize) -> Result<()> {
    if at == address {
        return Ok(());
    }
    // SAFETY: the mapping was just made, and nothing else has its address.
    let _ = unsafe { unmap(at, size) };
    Err(Errno::EEXIST)
}

/// As [`replace`], at an address that the kernel chooses.
pub(crate) fn map_elsewhere(size: usize, access: Access, with: Private) -> Result<usize> {
    spy::call(Call::Map { len: size })?;
    // SAFETY: no MAP_FIXED.
    unsafe { map_private(0, size, access, with, 0) }
}

/// `munmap(address, size)`
///
/// # Safety
/// The range is the caller's, and nothing uses it.
pub(crate) unsafe fn unmap(address: usize, size: usize) -> Result<()> {
    // SAFETY: by the contract.
    done(unsafe { syscall(libc::SYS_munmap, address, size) }).map(drop)
}

/// `msync(address, size, MS_ASYNC)`, which does nothing but look (`man 2 msync`): whether the range has no hole.
pub(crate) fn has_no_hole(address: usize, size: usize) -> bool {
    let flags = c_long::from(libc::MS_ASYNC);
    // SAFETY: no memory is involved.
    done(unsafe { syscall(libc::SYS_msync, address, size, flags) }) != Err(Errno::ENOMEM)
}

/// Whether the eight bytes around `address` can be read, found out without a signal: `rt_sigprocmask` reads them
/// (EFAULT) before it looks at what to do with them (EINVAL), and changes nothing. Not for a device's memory.
pub(crate) fn is_readable(address: usize) -> bool {
    let none = 0usize;
    // SAFETY: the kernel checks the address, and the invalid first argument keeps it from using the bytes.
    let result = unsafe {
        syscall(libc::SYS_rt_sigprocmask, c_long::from(-1), address & !7, none, SIGNAL_SET)
    };
    done(result) != Err(Errno::EFAULT)
}

/// `nanosleep` of 50 microseconds: lets threads of lower priority on the same processor get on.
pub(crate) fn nap() {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
    // SAFETY: the kernel reads the time.
    let _ = unsafe { syscall(libc::SYS_nanosleep, &raw const time, 0usize) };
}

/// # Safety
/// With `MAP_FIXED`, as [`replace`].
unsafe fn map_private(
    address: usize,
    size: usize,
    access: Access,
    with: Private,
    fixed: i32,
) -> Result<usize> {
    let (flags, fd) = with.flags_and_fd();
    let (prot, flags) = (c_long::from(access.prot()), flags | c_long::from(fixed));
    // SAFETY: without MAP_FIXED nothing is replaced; with it the range is the caller's, by the contract.
    done(unsafe { syscall(libc::SYS_mmap, address, size, prot, flags, fd, 0 as c_long) })
}

/// `mremap(old, size, size, MREMAP_MAYMOVE|MREMAP_FIXED, new)`: moves a mapping over another one, in one step
/// for the threads that access `new`. If it fails, up to Linux 6.16, `new` may have been unmapped.
///
/// # Safety
/// `old` is the caller's, and nothing uses it. As [`replace`] for `new`.
pub(crate) unsafe fn move_over(old: usize, size: usize, new: usize) -> Result<()> {
    spy::call(Call::MoveFixed { address: new, len: size })?;
    let flags = c_long::from(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: by the contract both ranges are the caller's.
    done(unsafe { syscall(libc::SYS_mremap, old, size, size, flags, new) }).map(drop)
}

/// `madvise(address, size, MADV_DONTFORK)`.
///
/// # Safety
/// The range is the caller's.
pub(crate) unsafe fn keep_from_children(address: usize, size: usize) -> Result<()> {
    let advice = c_long::from(libc::MADV_DONTFORK);
    // SAFETY: in this process the mapping does not change.
    done(unsafe { syscall(libc::SYS_madvise, address, size, advice) }).map(drop)
}

/// `munlock(address, size)`: see [`mm::munlock`](super::mm::munlock).
///
/// # Safety
/// The range is the caller's.
pub(crate) unsafe fn munlock(address: usize, size: usize) -> Result<()> {
    // SAFETY: the mapping does not change.
    done(unsafe { syscall(libc::SYS_munlock, address, size) }).map(drop)
}

/// `write(eventfd, 1)`. It does not wait if the eventfd is non-blocking.
pub(crate) fn signal_eventfd(fd: i32) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the kernel reads eight bytes. If the counter is full, it stays full.
    let _ = unsafe { syscall(libc::SYS_write, c_long::from(fd), one.as_ptr(), one.len()) };
}

/// `rt_sigprocmask(SIG_SETMASK, set)`: blocks the signals of `set` in this thread and no others. Returns the
/// set before.
pub(crate) fn block_signals(set: u64) -> u64 {
    let mut before = 0u64;
    // SAFETY: the kernel reads and writes eight bytes each.
    let _ = unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            c_long::from(libc::SIG_SETMASK),
            &raw const set,
            &raw mut before,
            SIGNAL_SET,
        )
    };
    before
}

/// While it lives, this thread gets no signal.
pub(crate) struct SignalsBlocked {
    before: u64,
    /// The mask is this thread's.
    _not_send: PhantomData<*const ()>,
}

impl SignalsBlocked {
    pub(crate) fn new() -> Self {
        Self { before: block_signals(!0), _not_send: PhantomData }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        block_signals(self.before);
    }
}

/// `rt_sigpending`: whether a signal waits until this thread does not block it any more.
pub(crate) fn is_pending(signal: i32) -> bool {
    let mut pending = 0u64;
    // SAFETY: the kernel writes eight bytes.
    let _ = unsafe { syscall(libc::SYS_rt_sigpending, &raw mut pending, SIGNAL_SET) };
    pending & 1 << (signal - 1) != 0
}

/// `tgkill(getpid(), gettid(), signal)`: the signal is pending for this thread. If it is blocked, it is
/// delivered when it no longer is.
pub(crate) fn raise(signal: i32) {
    // SAFETY: no memory is involved.
    let _ = unsafe {
        let thread = syscall(libc::SYS_gettid);
        syscall(libc::SYS_tgkill, syscall(libc::SYS_getpid), thread, c_long::from(signal))
    };
}
