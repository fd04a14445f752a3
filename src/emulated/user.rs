//! Users of a device: the program that it is in, and clients of a server. A device may have several at once;
//! each has its own mappings and eventfds.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use super::signal::Signaller;
use crate::transport::vfio_user::protocol::version::MAX_DMA_MAPS;

/// How much memory of files a user may have mapped here, in bytes: more than machines have, and a small part of the
/// address space.
const MAX_MAPPED: u64 = 1 << 40;

/// One user of a device, and its limits.
pub(super) struct User {
    signaller: Signaller,
    mappings: Allowance,
    files: Allowance,
    mapped: Allowance,
}

/// What a DMA mapping counts towards the limits of its user, in addition to one mapping.
#[derive(Clone, Copy, Default)]
pub(super) struct Cost {
    /// How many files.
    pub(super) files: u32,
    /// How much of them is mapped in this process, in bytes.
    pub(super) mapped: u64,
}

/// How much more of something a user may have.
struct Allowance(AtomicU64);

impl Allowance {
    fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes so many; false if fewer are left.
    fn take(&self, count: u64) -> bool {
        let less = |left: u64| left.checked_sub(count);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn give_back(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

impl User {
    /// A user that may have `files` mappings that came with a file.
    pub(super) fn new(files: u32) -> Arc<Self> {
        Arc::new(Self {
            signaller: Signaller::new(),
            mappings: Allowance(AtomicU64::new(MAX_DMA_MAPS.into())),
            files: Allowance(AtomicU64::new(files.into())),
            mapped: Allowance(AtomicU64::new(MAX_MAPPED)),
        })
    }

    /// How many more DMA mappings it may have.
    pub(super) fn available_mappings(&self) -> u32 {
        // At most what it began with.
        self.mappings.left() as u32
    }

    /// Whether it may have this much more of its files mapped here, in bytes.
    pub(super) fn may_map(&self, bytes: u64) -> bool {
        bytes <= self.mapped.left()
    }

    /// Counts a mapping. ENOSPC if there are too many, EMFILE if too many came with a file, ENOMEM if too much of
    /// files is mapped.
    pub(super) fn add_mapping(&self, cost: Cost) -> Result<(), Errno> {
        if !self.mappings.take(1) {
            return Err(Errno::ENOSPC);
        }
        if !self.files.take(cost.files.into()) {
            self.mappings.give_back(1);
            return Err(Errno::EMFILE);
        }
        if !self.mapped.take(cost.mapped) {
            self.remove_mapping(Cost { mapped: 0, ..cost });
            return Err(Errno::ENOMEM);
        }
        Ok(())
    }

    pub(super) fn remove_mapping(&self, cost: Cost) {
        self.mappings.give_back(1);
        self.files.give_back(cost.files.into());
        self.mapped.give_back(cost.mapped);
    }

    /// Signals an eventfd of this user, without waiting.
    pub(super) fn signal(&self, eventfd: &Arc<OwnedFd>) {
        self.signaller.signal(eventfd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_mapping_takes_nothing_of_the_allowances() {
        let user = User::new(2);
        let cost = |files, mapped| Cost { files, mapped };
        assert_eq!(user.add_mapping(cost(1, MAX_MAPPED + 1)), Err(Errno::ENOMEM));
        assert_eq!(user.add_mapping(cost(3, 0)), Err(Errno::EMFILE));
        assert_eq!(user.add_mapping(cost(2, MAX_MAPPED)), Ok(()));
        assert!(!user.may_map(1));
        assert_eq!(user.add_mapping(cost(1, 0)), Err(Errno::EMFILE));
        assert_eq!(user.add_mapping(cost(0, 0)), Ok(()));
        assert_eq!(user.available_mappings(), MAX_DMA_MAPS - 2);
        user.remove_mapping(cost(2, MAX_MAPPED));
        user.remove_mapping(cost(0, 0));
        assert!(user.may_map(MAX_MAPPED) && !user.may_map(MAX_MAPPED + 1));
        assert_eq!(user.available_mappings(), MAX_DMA_MAPS);
    }
}
