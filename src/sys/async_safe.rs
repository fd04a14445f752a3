//! System calls for code that may run in a signal handler: no lock, no allocation, no cancellation point of
//! the C library, no interceptor of a sanitizer.
//!
//! They change `errno`, which a handler saves and restores.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use libc::{c_long, syscall};
use nix::errno::Errno;

use super::mm::Access;

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
    // SAFETY: by the contract.
    unsafe { map_private(address, size, access, with, libc::MAP_FIXED) }.map(drop)
}

/// As [`replace`], if nothing is mapped there (`MAP_FIXED_NOREPLACE`); EEXIST if something is.
pub(crate) fn fill_gap(address: usize, size: usize, access: Access, with: Private) -> Result<()> {
    // SAFETY: nothing is replaced.
    let at = unsafe { map_private(address, size, access, with, libc::MAP_FIXED_NOREPLACE) }?;
    if at == address {
        return Ok(());
    }
    // A kernel before 4.17 takes the address as a hint.
    // SAFETY: the mapping was made above, and nothing else has its address.
    let _ = unsafe { syscall(libc::SYS_munmap, at, size) };
    Err(Errno::EEXIST)
}

/// As [`replace`], by a mapping that is made elsewhere first: the calls that the kernel may refuse for lack
/// of memory replace nothing.
///
/// # Safety
/// As [`replace`].
pub(crate) unsafe fn replace_by_move(
    address: usize,
    size: usize,
    access: Access,
    with: Private,
) -> Result<()> {
    // SAFETY: no MAP_FIXED.
    let new = unsafe { map_private(0, size, access, with, 0) }?;
    // SAFETY: the mapping was made above, and by the contract the range is the caller's to replace.
    unsafe { move_over(new, size, address) }.inspect_err(|_| {
        // SAFETY: the mapping was made above, and nothing else has its address.
        let _ = unsafe { syscall(libc::SYS_munmap, new, size) };
    })
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

/// `tgkill(getpid(), gettid(), signal)`: the signal is pending for this thread. If it is blocked, it is
/// delivered when it no longer is.
pub(crate) fn raise(signal: i32) {
    // SAFETY: no memory is involved.
    let _ = unsafe {
        let thread = syscall(libc::SYS_gettid);
        syscall(libc::SYS_tgkill, syscall(libc::SYS_getpid), thread, c_long::from(signal))
    };
}
