//! How often handlers have revoked all windows of a group.

use super::atomic::{AtomicU64, Ordering, fence};

/// How often a handler has begun to revoke all windows of a group, and how often one has ended that.
#[derive(Debug, Default)]
pub(super) struct Sweeps {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Sweeps {
    /// Revokes all windows: `each` does. For signal handlers.
    pub(super) fn sweep(&self, each: impl FnOnce()) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        // Either `each` finds a window that a verb has made or changed, or the verb finds that this has begun.
        fence(Ordering::SeqCst);
        each();
        self.ended.fetch_add(1, Ordering::Release);
    }

    /// How many have ended.
    #[inline(always)]
    pub(super) fn swept(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether more have begun than this many. For a verb, after it has made or changed a window.
    #[inline(always)]
    pub(super) fn has_begun_more_than(&self, swept: u64) -> bool {
        fence(Ordering::SeqCst);
        self.begun.load(Ordering::Relaxed) != swept
    }
}
