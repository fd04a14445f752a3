//! Creating and deleting pairs of queues, and the memory of queues that the controller may still reach.

use vfio_remap::{Error, Result};

use super::super::admin::{Admin, AdminCommand};
use super::super::command::{Command, admin};
use super::super::pair::QueuePair;
use super::{Controller, State};

impl Controller {
    /// Creates a pair of queues in the controller (NVMe Base 1.4 §5.3, §5.4). Returns the current generation.
    ///
    /// If it is unknown whether the controller has created them, the controller is reset.
    pub(in super::super) fn attach(&self, pair: &QueuePair, id: u16) -> Result<u32> {
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if let Err(error) = self.create(&mut state.admin, pair, id) {
            if state.admin.is_broken() {
                self.reset_after(&error, &mut state);
            }
            return Err(error);
        }
        state.attached.push(id);
        Ok(self.generation())
    }

    /// Creates a pair of queues. The admin queue is broken if the controller may be left with one of them.
    fn create(&self, admin: &mut Admin, pair: &QueuePair, id: u16) -> Result<()> {
        let (submissions, completions) = pair.addresses();
        let size = u32::from(pair.entries() - 1) << 16 | u32::from(id);
        let interrupt = self.vector(id).map_or(0, |vector| (vector as u32) << 16 | 1 << 1);
        let create = |opcode, iova, flags| AdminCommand {
            operation: "create a queue of",
            command: Command::new(opcode, 0).address(iova).dwords_10(size, flags | 1),
            with_data: false,
        };
        let first = create(admin::CREATE_COMPLETION_QUEUE, completions, interrupt);
        admin.execute(&first)?;
        let second = create(admin::CREATE_SUBMISSION_QUEUE, submissions, u32::from(id) << 16);
        admin.execute(&second).map(drop).inspect_err(|_| {
            if let Err(error) = delete(admin, &[admin::DELETE_COMPLETION_QUEUE], id) {
                log::warn!("nvme: {error}");
                admin.break_off();
            }
        })
    }

    /// Deletes a pair of queues, unless the controller was reset meanwhile. If the deletion fails, the
    /// controller is reset.
    pub(in super::super) fn detach(&self, id: u16, generation: u32, pair: &mut QueuePair) {
        let mut state = self.state();
        state.attached.retain(|attached| *attached != id);
        state.free.push(id);
        if self.generation() == generation && state.failed.is_none() {
            let opcodes = [admin::DELETE_SUBMISSION_QUEUE, admin::DELETE_COMPLETION_QUEUE];
            match delete(&mut state.admin, &opcodes, id) {
                Ok(()) => return,
                Err(error) => self.reset_after(&error, &mut state),
            }
        }
        self.keep(&mut state, pair);
    }

    /// Deletes the submission queues of a controller that still answers, as Linux does before a reset: QEMU
    /// (10.0 at least) may crash if it is disabled with outstanding commands.
    pub(super) fn stop_queues(&self, state: &mut State) {
        for id in std::mem::take(&mut state.attached) {
            let answers = state.failed.is_none() && !state.admin.is_broken();
            if !answers || self.check().is_err() {
                return;
            }
            if let Err(error) = delete(&mut state.admin, &[admin::DELETE_SUBMISSION_QUEUE], id) {
                log::info!("nvme: {error}");
            }
        }
    }

    /// Handles the memory of a pair of queues that could not be attached.
    pub(in super::super) fn discard(&self, pair: &mut QueuePair) {
        self.keep(&mut self.state(), pair);
    }

    /// Keeps the memory of a pair of queues and the buffers in its slots if the controller may still reach
    /// them. Otherwise their IOVAs could be reused at once.
    fn keep(&self, state: &mut State, pair: &mut QueuePair) {
        if state.quiet_below < self.generation() {
            state.kept.extend(pair.take_memory());
        }
    }

    fn reset_after(&self, error: &Error, state: &mut State) {
        log::warn!("nvme: {error}; the controller is reset");
        if let Err(error) = self.reset_locked(state) {
            log::error!("nvme: {error}");
        }
    }
}

/// Deletes queues, in the order of `opcodes`.
fn delete(admin: &mut Admin, opcodes: &[u8], id: u16) -> Result<()> {
    for opcode in opcodes {
        let command = Command::new(*opcode, 0).dwords_10(id.into(), 0);
        let operation = "delete a queue of";
        admin.execute(&AdminCommand { operation, command, with_data: false })?;
    }
    Ok(())
}
