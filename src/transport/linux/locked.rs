//! The limit on locked memory (RLIMIT_MEMLOCK), named before the kernel answers a bare ENOMEM.
//!
//! Pages that are mapped for DMA count against it, but for processes with CAP_IPC_LOCK. Asking for the
//! limit takes longer than mapping a page, so it is asked for once, and again when what is mapped has
//! reached it, or when the kernel knew better.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::error::{Error, ErrorKind};

/// `capabilities(7)`
const CAP_IPC_LOCK: u32 = 14;

/// What is counted against the limit, and apart from what others count.
pub(super) struct Counter {
    /// The bytes that this process has mapped for DMA so.
    mapped: AtomicU64,
    /// How many that may become, as far as was known when it was last asked for.
    allowed: AtomicU64,
    /// Whether the process's own figure of locked memory counts, too.
    of_process: bool,
}

/// Of type 1 containers: with all else that the process has locked.
pub(super) static CONTAINERS: Counter = Counter::new(true);

/// Of iommufd: with what other processes of the user have mapped so, which nobody tells.
pub(super) static IOMMUFD: Counter = Counter::new(false);

impl Counter {
    const fn new(of_process: bool) -> Self {
        Self { mapped: AtomicU64::new(0), allowed: AtomicU64::new(0), of_process }
    }
}

/// Bytes that are mapped, as long as this lives.
pub(super) struct Locked {
    counter: &'static Counter,
    size: u64,
}

/// More than the limit allows.
pub(super) struct Exceeded {
    /// What the process would have locked, in bytes.
    need: u64,
    limit: u64,
}

impl Locked {
    /// `size` bytes more.
    #[inline]
    pub(super) fn new(counter: &'static Counter, size: u64) -> Result<Self, Exceeded> {
        let locked = Self { counter, size };
        let before = counter.mapped.fetch_add(size, Ordering::Relaxed);
        if before.saturating_add(size) <= counter.allowed.load(Ordering::Relaxed) {
            return Ok(locked);
        }
        locked.ask(before)
    }

    /// Asks for the limit anew: `before` were mapped, and now these are, too.
    #[cold]
    fn ask(self, before: u64) -> Result<Self, Exceeded> {
        let Counter { allowed, of_process, .. } = self.counter;
        let mapped = before.saturating_add(self.size);
        let Some(limit) = Limit::ask() else {
            allowed.store(u64::MAX, Ordering::Relaxed);
            return Ok(self);
        };
        let others = if *of_process { limit.locked.saturating_sub(before) } else { 0 };
        allowed.store(limit.limit.saturating_sub(others), Ordering::Relaxed);
        let need = mapped.saturating_add(others);
        if need <= limit.limit { Ok(self) } else { Err(Exceeded { need, limit: limit.limit }) }
    }

    /// The kernel has refused to lock them for want of memory: the limit, if it is that.
    pub(super) fn refused(self) -> Option<Exceeded> {
        let Self { counter, size } = self;
        drop(self);
        counter.allowed.store(0, Ordering::Relaxed);
        Self::new(counter, size).err()
    }
}

impl Locked {
    /// Takes what another has over, of the same counter.
    pub(super) fn join(&mut self, other: Self) {
        self.size += other.size;
        std::mem::forget(other);
    }

    /// Gives `size` bytes back.
    pub(super) fn part(&mut self, size: u64) {
        let size = size.min(self.size);
        self.size -= size;
        self.counter.mapped.fetch_sub(size, Ordering::Relaxed);
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.counter.mapped.fetch_sub(self.size, Ordering::Relaxed);
    }
}

impl Exceeded {
    pub(super) fn error(&self, object: String) -> Error {
        let Self { need, limit } = self;
        Error::new(ErrorKind::LockedMemory, "map for DMA", object)
            .with_errno(Errno::ENOMEM)
            .because(format!(
                "the process would have {need} bytes of memory locked, and may have {limit} (RLIMIT_MEMLOCK)"
            ))
            .remedy(format!(
                "raise it: prlimit --pid {} --memlock={need}, ulimit -l, or LimitMEMLOCK= of its unit",
                std::process::id()
            ))
    }
}

struct Limit {
    limit: u64,
    /// What the process has locked, as the kernel counts it.
    locked: u64,
}

impl Limit {
    /// `None` where there is none, or it does not hold for this process.
    fn ask() -> Option<Self> {
        let (limit, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
        if limit == RLIM_INFINITY {
            return None;
        }
        Self::read(limit, &std::fs::read_to_string("/proc/self/status").ok()?)
    }

    fn read(limit: u64, status: &str) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let capabilities = u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?;
        if capabilities & 1 << CAP_IPC_LOCK != 0 {
            return None;
        }
        let kibibytes: u64 = field("VmLck:")?.split_ascii_whitespace().next()?.parse().ok()?;
        Some(Self { limit, locked: kibibytes.saturating_mul(1024) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_locked_is_read_and_a_privileged_process_has_no_limit() {
        let status = "Name:\tx\nVmLck:\t      64 kB\nCapEff:\t0000000000000400\n";
        let limit = Limit::read(1 << 20, status).unwrap();
        assert_eq!((limit.limit, limit.locked), (1 << 20, 64 << 10));
        assert!(Limit::read(1 << 20, &status.replace("0400", "4000")).is_none());
        assert!(Limit::read(1 << 20, "").is_none());
    }
}
