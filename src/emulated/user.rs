//! Users of a device: the program that it is in, and clients of a server. A device may have several at once;
//! each has its own mappings and eventfds.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;

use super::signal::Signaller;
use crate::transport::vfio_user::protocol::version::MAX_DMA_MAPS;

/// One user of a device, and its limits.
pub(super) struct User {
    signaller: Signaller,
    mappings: Allowance,
    files: Allowance,
}

/// How many more of something a user may have.
struct Allowance(AtomicU32);

impl Allowance {
    fn left(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes one; false if none is left.
    fn take(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn give_back(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl User {
    /// A user whose mappings may keep `files` files open here.
    pub(super) fn new(files: u32) -> Arc<Self> {
        Arc::new(Self {
            signaller: Signaller::new(),
            mappings: Allowance(AtomicU32::new(MAX_DMA_MAPS)),
            files: Allowance(AtomicU32::new(files)),
        })
    }

    /// How many more DMA mappings it may have.
    pub(super) fn available_mappings(&self) -> u32 {
        self.mappings.left()
    }

    /// Counts a mapping, with a file or without. ENOSPC or EMFILE if there are too many.
    pub(super) fn add_mapping(&self, with_file: bool) -> Result<(), Errno> {
        if !self.mappings.take() {
            return Err(Errno::ENOSPC);
        }
        if with_file && !self.files.take() {
            self.mappings.give_back();
            return Err(Errno::EMFILE);
        }
        Ok(())
    }

    pub(super) fn remove_mapping(&self, with_file: bool) {
        self.mappings.give_back();
        if with_file {
            self.files.give_back();
        }
    }

    /// Signals an eventfd of this user, without waiting.
    pub(super) fn signal(&self, eventfd: &Arc<OwnedFd>) {
        self.signaller.signal(eventfd);
    }
}
