//! Commands that take long: zeros, in parts, between the turns of other commands.

use std::collections::VecDeque;

use super::command::{COMPLETION, Status};
use super::fault::{Completion, Fate};
use super::{Nvme, TURN};
use crate::emulated::Bus;
use crate::error::Result;

/// What these commands may cost in a turn, in bytes that are written.
const BUDGET: u64 = 1 << 20;

/// A command that makes blocks read zeros.
#[derive(Debug)]
pub(super) struct Long {
    pub(super) zeros: Zeros,
    pub(super) completion: Completion,
    pub(super) fate: Fate,
}

#[derive(Debug)]
pub(super) struct Zeros {
    pub(super) namespace: u32,
    /// What is left: the first blocks, and how many from there on. They are there.
    pub(super) ranges: VecDeque<(u64, u64)>,
    /// Whether they are to last when the command ends.
    pub(super) lasting: bool,
}

impl Nvme {
    /// Carries on with these commands, each in its turn. Whether there were any.
    pub(super) fn carry_on(&mut self, bus: &Bus) -> Result<bool> {
        let any = !self.long.is_empty();
        let mut budget = BUDGET;
        for _ in 0..TURN {
            if budget == 0 {
                break;
            }
            let Some(mut long) = self.long.pop_front() else { break };
            match self.zero(&mut long.zeros, &mut budget) {
                Ok(false) => self.long.push_back(long),
                Ok(true) => self.finish(bus, long.fate, long.completion)?,
                Err(status) => {
                    self.finish(bus, long.fate, Completion { status, ..long.completion })?;
                }
            }
        }
        Ok(any)
    }

    /// Does a part of a command; whether it was the last.
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
        if zeros.lasting {
            namespace.sync().map_err(failed)?;
        }
        Ok(true)
    }

    /// Ends a command of a submission queue before its time, if it is one of these.
    pub(super) fn abort(&mut self, bus: &Bus, queue: u16, id: u16) -> Result<bool> {
        let aborted = |long: &Long| (long.completion.queue, long.completion.id) == (queue, id);
        let Some(long) = self.long.iter().position(aborted).and_then(|at| self.long.remove(at))
        else {
            return Ok(false);
        };
        let completion = Completion { status: Status::ABORT_REQUESTED, ..long.completion };
        self.finish(bus, long.fate, completion)?;
        Ok(true)
    }

    /// Drops what cannot be completed any more, since the memory of its completion queue is not there.
    pub(super) fn drop_unreachable(&mut self, bus: &Bus) {
        let completions = &self.completions;
        self.long.retain(|long| {
            let queue = completions.get(&long.completion.to);
            queue.is_some_and(|queue| bus.can_write(queue.base, COMPLETION))
        });
    }
}
