//! Long commands, which write zeros in parts, so that other commands proceed meanwhile.

use std::collections::VecDeque;

use super::command::{COMPLETION, Status};
use super::fault::{Completion, Delivery};
use super::{COMMANDS_PER_POLL, Nvme};
use crate::emulated::Bus;
use crate::error::Result;

/// The cost limit of these commands for each poll, in written bytes.
const BUDGET: u64 = 1 << 20;

/// A command that makes blocks read as zeros.
#[derive(Debug)]
pub(super) struct Long {
    pub(super) zeros: Zeros,
    pub(super) completion: Completion,
    pub(super) delivery: Delivery,
}

#[derive(Debug)]
pub(super) struct Zeros {
    pub(super) namespace: u32,
    /// The remaining ranges: first block and count. All blocks exist.
    pub(super) ranges: VecDeque<(u64, u64)>,
    /// Whether the blocks must be durable when the command completes.
    pub(super) durable: bool,
}

impl Nvme {
    /// Continues these commands, one part of each in turn. Returns whether there were any.
    pub(super) fn continue_long(&mut self, bus: &Bus) -> Result<bool> {
        let any = !self.long.is_empty();
        let mut budget = BUDGET;
        for _ in 0..COMMANDS_PER_POLL {
            if budget == 0 {
                break;
            }
            let Some(mut long) = self.long.pop_front() else { break };
            match self.zero(&mut long.zeros, &mut budget) {
                Ok(false) => self.long.push_back(long),
                Ok(true) => self.finish(bus, long.delivery, long.completion)?,
                Err(status) => {
                    self.finish(bus, long.delivery, Completion { status, ..long.completion })?;
                }
            }
        }
        Ok(any)
    }

    /// Does a part of a command. Returns whether it was the last part.
    fn zero(&mut self, zeros: &mut Zeros, budget: &mut u64) -> std::result::Result<bool, Status> {
        let failed = |_| Status::INTERNAL_ERROR;
        let namespace = self.namespace(zeros.namespace)?;
        if let Some((block, count)) = zeros.ranges.front_mut() {
            let done = namespace.zero(*block, *count, budget).map_err(failed)?;
            (*block, *count) = (*block + done, *count - done);
            if *count == 0 {
                zeros.ranges.pop_front();
            }
        }
        if !zeros.ranges.is_empty() {
            return Ok(false);
        }
        if zeros.durable {
            namespace.sync().map_err(failed)?;
        }
        Ok(true)
    }

    /// Aborts a command of a submission queue. Returns false if it is not one of these.
    pub(super) fn abort(&mut self, bus: &Bus, queue: u16, id: u16) -> Result<bool> {
        let aborted = |long: &Long| (long.completion.queue, long.completion.id) == (queue, id);
        let Some(long) = self.long.iter().position(aborted).and_then(|at| self.long.remove(at))
        else {
            return Ok(false);
        };
        let completion = Completion { status: Status::ABORT_REQUESTED, ..long.completion };
        self.finish(bus, long.delivery, completion)?;
        Ok(true)
    }

    /// Drops commands that cannot complete, because the memory of their completion queue is not mapped.
    pub(super) fn drop_unreachable(&mut self, bus: &Bus) {
        let completions = &self.completions;
        self.long.retain(|long| {
            let queue = completions.get(&long.completion.to);
            queue.is_some_and(|queue| bus.can_write(queue.base, COMPLETION))
        });
    }
}
