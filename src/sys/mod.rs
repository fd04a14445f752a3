//! One function per system call and ioctl.
//!
//! `unsafe` is allowed here because the kernel's contracts are unsafe. Each function takes what it can
//! from types (`BorrowedFd`), names the rest under `# Safety`, and turns errors into
//! [`Errno`](nix::errno::Errno).

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

pub(crate) mod async_safe;
pub(crate) mod eventfd;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod iommufd;
pub(crate) mod maps;
pub(crate) mod mm;
pub(crate) mod mmap_lock;
#[cfg(feature = "vfio-user")]
pub(crate) mod mount;
pub(crate) mod signal;
#[cfg(feature = "vfio-user")]
pub(crate) mod socket;
pub(crate) mod spy;
#[cfg(feature = "vfio-user")]
pub(crate) mod stream;
#[cfg(feature = "emulated")]
pub(crate) mod tun;
pub(crate) mod vfio;
pub(crate) mod vfio_dma;
pub(crate) mod vfio_feature;
pub(crate) mod vfio_irq;
pub(crate) mod vfio_reset;

/// The page size of this machine in bytes: 4, 16 or 64 KiB.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf reads a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}
