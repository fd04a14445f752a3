//! While a call of this crate takes a device away, its windows are revoked, and it is no target of
//! peer-to-peer DMA.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::revocation::{ASLEEP, WindowChanges};
use super::{Device, Inner, window};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, Control, DmaMemory, Reasons};
use crate::transport::Transport;

/// What a reset did to the windows of the devices, and to their peer-to-peer mappings. Its `Display` is a
/// sentence.
#[derive(Debug, Default)]
#[must_use = "it has the errors: see is_over"]
#[non_exhaustive]
pub struct Outage {
    /// The windows that were revoked. A sealed window is not, and is an error here.
    pub revoked: WindowChanges,
    /// The windows that were restored. One that could not be stays revoked, and is an error here.
    pub restored: WindowChanges,
    /// How many peer-to-peer mappings were unmapped, and mapped again at the same IOVA.
    pub remapped: usize,
    /// Peer-to-peer mappings that could not be unmapped, so that the other device may have reached this one
    /// meanwhile; they are unmapped once more before they are mapped again. Or that could not be mapped again, with
    /// `Revoked` if their window is still revoked: the other device does not reach this one until a later restore or
    /// reset maps them. On iommufd it does not reach it either if the second attempt to unmap fails, because the
    /// kernel revokes the dma-buf; a later restore or reset tries again.
    pub lost: Vec<Error>,
}

impl Outage {
    /// Whether all is as it was.
    pub fn is_over(&self) -> bool {
        self.revoked.errors.is_empty() && self.restored.errors.is_empty() && self.lost.is_empty()
    }

    /// The first error of what was to be restored. Mappings of windows that are still revoked are not: their own
    /// restore maps them.
    pub(super) fn into_restored(self) -> Result<()> {
        let lost = self.lost.into_iter().filter(|error| error.kind() != ErrorKind::Revoked);
        self.restored.errors.into_iter().chain(lost).next().map_or(Ok(()), Err)
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.revoked.append(other.revoked);
        self.restored.append(other.restored);
        self.remapped += other.remapped;
        self.lost.append(&mut other.lost);
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { revoked, restored, remapped, lost } = self;
        write!(
            f,
            "revoked {} windows, restored {}, and mapped {remapped} peer-to-peer mappings again",
            revoked.changed(),
            restored.changed()
        )?;
        for error in revoked.errors.iter().chain(&restored.errors).chain(lost) {
            write!(f, "; {error}")?;
        }
        Ok(())
    }
}

/// Why a device is away, and who reaches it by peer-to-peer DMA.
#[derive(Default)]
pub(super) struct Absence {
    /// [`Reasons`] by which new windows are revoked. Changed while holders are locked.
    reasons: AtomicU8,
    /// Locked before holders, and while windows are restored: whoever holds it and finds a window that is not
    /// revoked, before and after it has looked at the pages, has seen those of the device.
    peers: Mutex<Slab<Arc<Peer>>>,
}

/// The device's peers, and the right to restore its windows.
pub(super) struct Peers<'a>(MutexGuard<'a, Slab<Arc<Peer>>>);

/// A window of a device, mapped for the DMA of another one.
struct Peer {
    transport: Arc<dyn Transport>,
    iova: u64,
    memory: DmaMemory,
    access: Access,
    state: Mutex<PeerState>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum PeerState {
    Mapped,
    Unmapped,
    /// It could not be unmapped. iommufd has an empty mapping if the kernel has since revoked the dma-buf.
    Unknown,
}

impl Peer {
    fn state(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmap(&self) -> Result<()> {
        let mut state = self.state();
        if *state == PeerState::Unmapped {
            return Ok(());
        }
        let result = self.transport.dma_unmap(self.iova, self.memory.size() as u64);
        *state = if result.is_ok() { PeerState::Unmapped } else { PeerState::Unknown };
        result
    }

    /// Maps it again, unless its window is revoked. Returns whether that was needed. All peers are locked.
    fn map(&self) -> Result<bool> {
        let state = *self.state();
        if state == PeerState::Mapped {
            return Ok(false);
        }
        // What could not be unmapped before is in the way.
        self.unmap()?;
        self.check()?;
        self.transport.dma_map(self.iova, &self.memory, self.access)?;
        *self.state() = PeerState::Mapped;
        // Windows are marked before their pages are replaced: it was the device that was mapped.
        if let Err(error) = self.check() {
            self.unmap()?;
            return Err(error);
        }
        Ok(true)
    }

    /// Fails if the window is revoked.
    fn check(&self) -> Result<()> {
        match self.memory.owner().downcast_ref::<window::Inner>() {
            Some(window) if window.mapping.control().is_revoked() => Err(revoked(window)),
            _ => Ok(()),
        }
    }
}

#[cold]
fn revoke_new(window: &Control, reasons: Reasons) {
    // Nothing is left if the source has been restored since.
    if !reasons.is_empty()
        && let Err(error) = window.revoke(reasons)
    {
        log::warn!("a window was mapped while its device is away: {error}");
    }
}

#[cold]
fn revoked(window: &window::Inner) -> Error {
    let object = format!("a window of {}", window.device_inner().info.name);
    Error::new(ErrorKind::Revoked, "map for DMA", object)
        .with_reason("the window is revoked, and does not reach its device")
        .with_advice("restore it first: Window::restore")
}

impl Peers<'_> {
    /// Maps again those that are not mapped. Returns how many, and why others are not.
    fn map(&self) -> (usize, Vec<Error>) {
        let (mut remapped, mut lost) = (0, Vec::new());
        for (_, peer) in self.0.iter() {
            match peer.map() {
                Ok(needed) => remapped += usize::from(needed),
                Err(error) => lost.push(error),
            }
        }
        (remapped, lost)
    }
}

/// A peer-to-peer mapping, among those of the device that is its target.
pub(super) struct PeerMapping {
    peer: Arc<Peer>,
    device: Arc<Inner>,
    slot: usize,
    /// An error if the window was revoked while it was mapped: what is mapped may be other pages.
    revoked: Option<Error>,
}

impl PeerMapping {
    /// Whether it reached the window's device when it was mapped. Otherwise the caller ends it.
    pub(super) fn check(&self) -> Result<()> {
        self.revoked.clone().map_or(Ok(()), Err)
    }

    /// Unmaps it, unless a reset has, and could not map it again.
    pub(super) fn end(&self) -> Result<()> {
        // A reset at the same time waits until it is unmapped, or has unmapped it.
        let mut peers = self.device.peers();
        let result = self.peer.unmap();
        peers.0.try_remove(self.slot);
        result
    }
}

impl Inner {
    fn peers(&self) -> Peers<'_> {
        Peers(self.absence.peers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Restores windows by `restore`, and maps the peers again that had to wait for them. Returns why others
    /// could not be mapped. Not for a child of `fork(2)`.
    pub(super) fn restoring<T>(&self, restore: impl FnOnce() -> T) -> (T, Vec<Error>) {
        let peers = self.peers();
        let result = restore();
        if !self.away().is_empty() {
            return (result, Vec::new());
        }
        let (remapped, mut lost) = peers.map();
        // Those of windows that are still revoked: their own restore maps them.
        lost.retain(|error| error.kind() != ErrorKind::Revoked);
        if remapped > 0 {
            log::debug!("{}: mapped {remapped} peer-to-peer mappings again", self.info.name);
        }
        (result, lost)
    }

    fn away(&self) -> Reasons {
        Reasons::from_bits(self.absence.reasons.load(Ordering::Relaxed))
    }

    pub(super) fn is_away_for(&self, reason: Reasons) -> bool {
        self.away().contains(reason)
    }

    fn set_away(&self, reasons: Reasons) {
        self.absence.reasons.store(reasons.bits(), Ordering::Relaxed);
    }

    /// Revokes a new window if the device is away, or if its source was revoked while it was made. Holders are locked,
    /// as while all windows are revoked: those see the new one from now on.
    #[inline(always)]
    pub(super) fn revoke_new(&self, window: &Control, source: Option<&Control>) {
        let away = self.away();
        if !away.is_empty() || source.is_some_and(Control::is_revoked) {
            let reasons = source.map_or(away, |source| away.and(source.reasons()));
            revoke_new(window, reasons);
        }
    }

    /// Takes the device away for this reason: unmaps peer-to-peer mappings, and revokes its windows.
    pub(super) fn take_away(&self, reason: Reasons) -> Outage {
        let mut outage = Outage::default();
        let peers = self.peers();
        {
            let _holders = self.holders();
            self.set_away(self.away().and(reason));
        }
        for (_, peer) in peers.0.iter() {
            outage.lost.extend(peer.unmap().err());
        }
        drop(peers);
        outage.revoked = self.each_window(None, |control| control.revoke(reason));
        log::debug!("{}: {outage}", self.info.name);
        outage
    }

    /// As [`take_away`](Self::take_away), for calls that return no [`Outage`]: undone if a window could not be
    /// revoked. A sealed one never can be.
    ///
    /// # Errors
    /// That of the window.
    pub(super) fn try_take_away(&self, reason: Reasons) -> Result<()> {
        let mut outage = self.take_away(reason);
        let errors = &outage.revoked.errors;
        if let Some(error) = errors.iter().find(|error| error.kind() != ErrorKind::Sealed).cloned()
        {
            self.bring_back(reason, &mut outage);
            return Err(error);
        }
        if !outage.is_over() {
            log::warn!("{}: {outage}", self.info.name);
        }
        Ok(())
    }

    /// Ends what [`take_away`](Self::take_away) began. The device is back if no other reason is left.
    pub(super) fn bring_back(&self, reason: Reasons, outage: &mut Outage) {
        let peers = self.peers();
        let left = {
            let _holders = self.holders();
            let left = self.away().without(reason);
            self.set_away(left);
            left
        };
        outage.restored.append(self.each_window(None, |control| control.restore(reason)));
        if left.is_empty() {
            let (remapped, mut lost) = peers.map();
            outage.remapped += remapped;
            outage.lost.append(&mut lost);
        }
        drop(peers);
        if outage.is_over() {
            log::debug!("{}: {outage}", self.info.name);
        } else {
            log::warn!("{}: {outage}", self.info.name);
        }
    }

    /// Brings the device back if it is away for this reason.
    ///
    /// # Errors
    /// That of a window or a peer that could not be restored. The outage is over nevertheless.
    pub(super) fn end_outage(&self, reason: Reasons) -> Result<()> {
        let mut outage = Outage::default();
        if self.is_away_for(reason) {
            self.bring_back(reason, &mut outage);
        }
        outage.into_restored()
    }
}

impl Device {
    /// As [`Inner::bring_back`], for a reason after which a device that a write had put to sleep may be awake. The
    /// control lock is held.
    pub(super) fn bring_back_awake(&self, reason: Reasons, outage: &mut Outage) {
        let slept = self.inner.is_away_for(ASLEEP);
        if slept && self.config().and_then(|config| config.is_awake()).unwrap_or(false) {
            self.inner.bring_back(ASLEEP, outage);
        }
        self.inner.bring_back(reason, outage);
    }
}

/// Maps memory for DMA by `map`. If it is a window, the mapping is registered with the window's device.
///
/// # Errors
/// `Revoked` for a window that is; that of `map`.
pub(super) fn map_peer<T>(
    transport: &Arc<dyn Transport>,
    memory: &DmaMemory,
    access: Access,
    map: impl FnOnce() -> Result<T>,
    iova_of: impl FnOnce(&T) -> u64,
) -> Result<(T, Option<PeerMapping>)> {
    let Some(window) = memory.owner().downcast_ref::<window::Inner>() else {
        return Ok((map()?, None));
    };
    let device = window.device_inner();
    // While it is held, the device is neither taken away nor brought back, and no window of it is restored.
    let mut peers = device.peers();
    let is_revoked = || window.mapping.control().is_revoked();
    if is_revoked() || !device.away().is_empty() {
        return Err(revoked(window));
    }
    let mapped = map()?;
    // Windows are marked before their pages are replaced.
    let revoked = is_revoked().then(|| revoked(window));
    let peer = Arc::new(Peer {
        transport: transport.clone(),
        iova: iova_of(&mapped),
        memory: memory.clone(),
        access,
        state: Mutex::new(PeerState::Mapped),
    });
    let slot = peers.0.insert(peer.clone());
    drop(peers);
    Ok((mapped, Some(PeerMapping { peer, device: device.clone(), slot, revoked })))
}
