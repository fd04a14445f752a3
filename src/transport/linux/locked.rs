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

/// Of iommufd: with what other processes of the user have mapped so, which cannot be queried.
pub(super) static IOMMUFD: Counter = Counter::new(false);

impl Counter {
    pub(super) const fn new(of_process: bool) -> Self {
        Self { mapped: AtomicU64::new(0), allowed: AtomicU64::new(0), of_process }
    }
}

/// What one file has mapped, counted until it is dropped.
pub(super) struct Locked {
    counter: &'static Counter,
    bytes: AtomicU64,
}

/// More than the limit allows.
pub(super) struct Exceeded {
    /// What the process would have locked, in bytes.
    need: u64,
    limit: u64,
}

impl Locked {
    pub(super) fn nothing(counter: &'static Counter) -> Self {
        Self { counter, bytes: AtomicU64::new(0) }
    }

    /// Counts `size` bytes more, whether or not the limit allows them, which it says.
    #[inline]
    pub(super) fn add(&self, size: u64) -> Result<(), Exceeded> {
        if size == 0 {
            return Ok(());
        }
        self.bytes.fetch_add(size, Ordering::Relaxed);
        let mapped = self.counter.mapped.fetch_add(size, Ordering::Relaxed).saturating_add(size);
        if mapped <= self.counter.allowed.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.counter.ask(mapped, size)
    }

    /// Counts `size` bytes less, but not less than none: what another file has mapped may be unmapped
    /// through this.
    #[inline]
    pub(super) fn subtract(&self, size: u64) {
        let less = |bytes: u64| Some(bytes.saturating_sub(size));
        let before = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let before = before.unwrap_or_else(|before| before);
        self.counter.mapped.fetch_sub(size.min(before), Ordering::Relaxed);
    }

    /// The kernel has refused to lock `size` bytes, which are counted, for want of memory: the limit, if it
    /// is that.
    pub(super) fn refused(&self, size: u64) -> Option<Exceeded> {
        self.counter.ask(self.counter.mapped.load(Ordering::Relaxed), size).err()
    }

    /// Why the kernel had no memory to lock, where what is known to be locked is below the limit.
    pub(super) fn shortage(&self) -> String {
        match Limit::ask() {
            // What other processes of the user have mapped counts, and cannot be queried.
            Some(Limit { limit, .. }) if !self.counter.of_process => format!(
                "memory is short, or the user's processes would have more than {limit} bytes locked \
                 together (RLIMIT_MEMLOCK)"
            ),
            _ => "memory is short".to_owned(),
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.counter.mapped.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

impl Counter {
    #[cfg(test)]
    pub(super) fn mapped(&self) -> u64 {
        self.mapped.load(Ordering::Relaxed)
    }

    /// Whether the limit, asked for anew, allows `mapped` bytes, the last `size` of which are not mapped yet.
    #[cold]
    fn ask(&self, mapped: u64, size: u64) -> Result<(), Exceeded> {
        let Some(limit) = Limit::ask() else {
            self.allowed.store(u64::MAX, Ordering::Relaxed);
            return Ok(());
        };
        let before = mapped.saturating_sub(size);
        let others = if self.of_process { limit.locked.saturating_sub(before) } else { 0 };
        self.allowed.store(limit.limit.saturating_sub(others), Ordering::Relaxed);
        let need = mapped.saturating_add(others);
        if need <= limit.limit { Ok(()) } else { Err(Exceeded { need, limit: limit.limit }) }
    }
}

impl Exceeded {
    pub(super) fn error(&self, object: String) -> Error {
        let Self { need, limit } = self;
        Error::new(ErrorKind::LockedMemory, "map for DMA", object)
            .with_errno(Errno::ENOMEM as i32)
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
