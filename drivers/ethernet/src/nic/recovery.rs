//! A card that was reset, by its driver or by others, or is gone.
//!
//! Each reset begins a generation. A queue that the card knew in an earlier one is unknown to it: none of
//! its memory is accessed any more. The queue notices when it is used next, and has the card know it again.

use std::sync::atomic::Ordering;

use vfio_remap::{Error, ErrorKind, IoRegisterBlock, Result};

use super::super::registers::Ring;
use super::{Direction, Nic, State};

impl Nic {
    /// How often the card was reset since it was brought up.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Resets the card, and brings it up as it was: also one that has failed to come up, such as a card that
    /// was gone and is back. Filters stay as they were. The link goes down meanwhile. Queues go on when they
    /// are used next: no frame that has come is lost, and those that were not sent are
    /// [counted](super::Transmitter::lost).
    ///
    /// It takes some 20 ms, and at most ten seconds.
    ///
    /// # Errors
    /// What it fails of: `Gone` if the card, or the one that was, is not there. Queues cannot be used until
    /// this succeeds.
    pub fn reset(&self) -> Result<()> {
        self.reset_locked(&mut self.state())
    }

    /// Resets the card, unless that was done since generation `seen`.
    pub(crate) fn recover(&self, seen: u32) -> Result<()> {
        let mut state = self.state();
        if self.generation() != seen {
            return state.failed.clone().map_or(Ok(()), Err);
        }
        self.reset_locked(&mut state).inspect_err(|error| log::error!("{}: {error}", self.name()))
    }

    /// Sets the card up again if others have reset it: nobody may have looked since.
    ///
    /// # Errors
    /// Why the card has failed, or what it fails of.
    pub(super) fn ensure_set_up(&self, state: &mut State) -> Result<()> {
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if self.hardware.is_set_up()? {
            return Ok(());
        }
        log::warn!("{}: something has reset it", self.name());
        self.reset_locked(state)
    }

    fn reset_locked(&self, state: &mut State) -> Result<()> {
        let result = self.bring_up_again(state);
        state.failed = result.as_ref().err().cloned();
        self.generation.fetch_add(1, Ordering::AcqRel);
        result
    }

    fn bring_up_again(&self, state: &mut State) -> Result<()> {
        // Counts are cleared by the reset.
        if let Err(error) = self.count(state) {
            log::info!("{}: {error}", self.name());
        }
        self.hardware.reset_any()?;
        let address = self.hardware.read_address()?;
        if address != self.hardware_address {
            return Err(Error::new(ErrorKind::Gone, "go on with", self.name()).with_reason(format!(
                "its address was {}, and is {address} now: it was removed, or another one is there",
                self.hardware_address
            )));
        }
        state.quiet_below = self.generation() + 1;
        for (direction, queue, _) in std::mem::take(&mut state.kept) {
            state.forget(direction, queue);
        }
        self.set_up(state)
    }

    /// Tells the card again of a queue that it knew in an earlier generation. The generation that it knows it
    /// in.
    ///
    /// # Errors
    /// Why the card has failed, or what it fails of.
    pub(crate) fn restart(
        &self,
        direction: Direction,
        ring: &IoRegisterBlock<Ring>,
        iova: u64,
        entries: usize,
    ) -> Result<u32> {
        let state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        self.tell(&state, direction, ring, iova, entries)?;
        Ok(self.generation())
    }

    /// Whether memory that the card was told of in a generation is out of its reach. If not, why the card has
    /// failed.
    pub(crate) fn is_quiet(&self, generation: u32) -> std::result::Result<(), Option<Error>> {
        let state = self.state();
        if generation < state.quiet_below { Ok(()) } else { Err(state.failed.clone()) }
    }
}
