//! The limit on locked memory (RLIMIT_MEMLOCK). The crate checks it before the kernel fails with a bare
//! ENOMEM.
//!
//! Pages that are mapped for DMA count against the limit, except in processes with CAP_IPC_LOCK. Querying
//! the limit takes longer than mapping a page. So it is queried once, and again when the mapped bytes
//! reach it or the kernel refuses a mapping.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::error::{Error, ErrorKind};

/// `capabilities(7)`
const CAP_IPC_LOCK: u32 = 14;

/// Counts bytes against the limit. Type 1 containers and iommufd are counted separately by the kernel.
pub(super) struct Counter {
    /// The bytes that this process has mapped for DMA.
    mapped: AtomicU64,
    /// The largest value of `mapped` that the limit allowed when it was last queried.
    allowed: AtomicU64,
    /// Whether other locked memory of the process counts too.
    of_process: bool,
}

/// For type 1 containers: all locked memory of the process counts together.
pub(super) static CONTAINERS: Counter = Counter::new(true);

/// For iommufd: DMA mappings of all processes of the user count together. Those of others cannot be
/// queried.
pub(super) static IOMMUFD: Counter = Counter::new(false);

impl Counter {
    pub(super) const fn new(of_process: bool) -> Self {
        Self { mapped: AtomicU64::new(0), allowed: AtomicU64::new(0), of_process }
    }
}

/// The bytes that one file has mapped. Dropping it subtracts them from the counter.
pub(super) struct Locked {
    counter: &'static Counter,
    bytes: AtomicU64,
}

/// The limit is exceeded.
pub(super) struct Exceeded {
    /// How many bytes the process would have locked.
    need: u64,
    limit: u64,
}

impl Locked {
    pub(super) fn nothing(counter: &'static Counter) -> Self {
        Self { counter, bytes: AtomicU64::new(0) }
    }

    /// Adds `size` bytes. An error says that the limit does not allow them; they are added all the same.
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
        self.counter.check(mapped, size)
    }

    /// Subtracts `size` bytes and saturates at zero: this file may unmap what another file has mapped.
    #[inline]
    pub(super) fn subtract(&self, size: u64) {
        let less = |bytes: u64| Some(bytes.saturating_sub(size));
        let before = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let before = before.unwrap_or_else(|before| before);
        self.counter.mapped.fetch_sub(size.min(before), Ordering::Relaxed);
    }

    /// After the kernel refused to lock `size` bytes with ENOMEM: whether they exceed the limit. They are
    /// already added.
    pub(super) fn exceeded(&self, size: u64) -> Option<Exceeded> {
        self.counter.check(self.counter.mapped.load(Ordering::Relaxed), size).err()
    }

    /// How many more bytes the limit allows, if there is one.
    pub(super) fn lockable_bytes(&self) -> Option<u64> {
        Limit::query().map(|limit| self.counter.left(&limit))
    }

    /// Why the kernel returned ENOMEM although the known locked memory is below the limit.
    pub(super) fn shortage(&self) -> String {
        match Limit::query() {
            // Mappings of the user's other processes count too, but cannot be queried.
            Some(Limit { limit, .. }) if !self.counter.of_process => format!(
                "the kernel is out of memory, or all processes of the user together would have more than \
                 {limit} bytes locked (RLIMIT_MEMLOCK)"
            ),
            _ => "the kernel is out of memory".to_owned(),
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

    /// How many more bytes `limit` allows.
    fn left(&self, limit: &Limit) -> u64 {
        let mapped = self.mapped.load(Ordering::Relaxed);
        // The process's own figure includes what is mapped.
        let used = if self.of_process { limit.locked.max(mapped) } else { mapped };
        limit.limit.saturating_sub(used)
    }

    /// Queries the limit, and checks that it allows `mapped` bytes. The last `size` of them are not
    /// mapped yet.
    #[cold]
    fn check(&self, mapped: u64, size: u64) -> Result<(), Exceeded> {
        let Some(limit) = Limit::query() else {
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
            .with_reason(format!(
                "the process would have {need} bytes of memory locked, and may have {limit} (RLIMIT_MEMLOCK)"
            ))
            .with_advice(format!(
                "raise it: prlimit --pid {} --memlock={need}, ulimit -l, or LimitMEMLOCK= of its unit",
                std::process::id()
            ))
    }
}

struct Limit {
    limit: u64,
    /// The locked memory of the process in bytes, as the kernel counts it.
    locked: u64,
}

impl Limit {
    /// `None` if there is no limit, or it does not apply to this process.
    fn query() -> Option<Self> {
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
    fn locked_memory_is_no_longer_lockable() {
        static OF_PROCESS: Counter = Counter::new(true);
        static APART: Counter = Counter::new(false);
        let limit = Limit { limit: 10 << 20, locked: 3 << 20 };
        for (counter, left) in [(&OF_PROCESS, 7 << 20), (&APART, 10 << 20)] {
            assert_eq!(counter.left(&limit), left);
            // The process's figure may be older.
            counter.mapped.store(11 << 20, Ordering::Relaxed);
            assert_eq!(counter.left(&limit), 0);
        }
    }

    #[test]
    fn locked_memory_is_read_and_a_privileged_process_has_no_limit() {
        let status = "Name:\tx\nVmLck:\t      64 kB\nCapEff:\t0000000000000400\n";
        let limit = Limit::read(1 << 20, status).unwrap();
        assert_eq!((limit.limit, limit.locked), (1 << 20, 64 << 10));
        assert!(Limit::read(1 << 20, &status.replace("0400", "4000")).is_none());
        assert!(Limit::read(1 << 20, "").is_none());
    }
}
