//! Admin commands (NVMe 1.4 §5).

use super::command::{Command, Outcome, Status};
use super::io::scatter;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::{MAX_ENTRIES, MAX_EVENTS, Nvme, QUEUES, VECTORS, identify};
use crate::emulated::Bus;

/// The feature Volatile Write Cache.
pub(super) const WRITE_CACHE: u8 = 0x06;
const QUEUE_COUNT: u8 = 0x07;
const INTERRUPT_COALESCING: u8 = 0x08;
const INTERRUPT_VECTOR: u8 = 0x09;
/// Of Interrupt Vector Configuration: the vector is exempt from coalescing.
const COALESCING_DISABLED: u32 = 1 << 16;
/// The count of submission and of completion queues, both zero-based.
const QUEUE_COUNTS: u32 = (QUEUES as u32 - 1) << 16 | (QUEUES as u32 - 1);

/// The default of a feature; `None` if it does not exist.
fn default(feature: u8) -> Option<u32> {
    Some(match feature {
        // Arbitration, power management, error recovery, write atomicity, events.
        0x01 | 0x02 | 0x05 | 0x0a | 0x0b => 0,
        INTERRUPT_COALESCING | INTERRUPT_VECTOR => 0,
        // The temperature threshold, in kelvins.
        0x04 => 343,
        WRITE_CACHE => 1,
        QUEUE_COUNT => QUEUE_COUNTS,
        _ => return None,
    })
}

impl Nvme {
    /// `None` for a command that completes later.
    pub(super) fn admin(&mut self, bus: &Bus, command: &Command) -> Result<Option<u32>, Status> {
        if command.is_fused_or_sgl() {
            return Err(Status::INVALID_FIELD);
        }
        match command.opcode() {
            0x00 => self.delete_submissions(command),
            0x01 => self.create_submissions(command),
            0x02 => self.log(bus, command),
            0x04 => self.delete_completions(command),
            0x05 => self.create_completions(command),
            0x06 => self.identify(bus, command),
            0x08 => self.abort_command(bus, command),
            0x09 => self.set_feature(command),
            0x0a => self.feature(command),
            0x0c if self.events.len() < MAX_EVENTS => {
                self.events.push(command.id());
                return Ok(None);
            }
            0x0c => Err(Status::TOO_MANY_EVENT_REQUESTS),
            _ => Err(Status::INVALID_OPCODE),
        }
        .map(Some)
    }

    fn send(&self, bus: &Bus, command: &Command, data: &[u8]) -> Outcome {
        scatter(bus, command, self.page(), data)?;
        Ok(0)
    }

    /// The address, the size and the number of a queue to create.
    fn new_queue(&self, command: &Command) -> Result<(u64, u16, u16), Status> {
        let (id, last) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let [base, _] = command.prps();
        if !(1..=QUEUES).contains(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if last == 0 || last >= MAX_ENTRIES {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if command.dword(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if !base.is_multiple_of(self.page() as u64) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        Ok((base, last + 1, id))
    }

    fn create_completions(&mut self, command: &Command) -> Outcome {
        let (base, size, id) = self.new_queue(command)?;
        if self.completions.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let vector = (command.dword(11) >> 16) as u16;
        if vector >= VECTORS {
            return Err(Status::INVALID_VECTOR);
        }
        let vector = (command.dword(11) & 2 != 0).then_some(vector);
        if let Some(doorbell) = self.doorbells.get(2 * usize::from(id) + 1) {
            doorbell.write(0);
        }
        self.completions.insert(id, CompletionQueue::new(base, size, vector));
        Ok(0)
    }

    fn create_submissions(&mut self, command: &Command) -> Outcome {
        let (base, size, id) = self.new_queue(command)?;
        if self.submissions.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let completions = (command.dword(11) >> 16) as u16;
        if completions == 0 || !self.completions.contains_key(&completions) {
            return Err(Status::INVALID_COMPLETION_QUEUE);
        }
        if let Some(doorbell) = self.doorbells.get(2 * usize::from(id)) {
            doorbell.write(0);
        }
        self.submissions.insert(id, SubmissionQueue { base, size, head: 0, completions });
        Ok(0)
    }

    /// Bit 0 of the result means that the command was not aborted: it is unknown or has completed.
    fn abort_command(&mut self, bus: &Bus, command: &Command) -> Outcome {
        let (queue, id) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let aborted = self.abort(bus, queue, id).map_err(|_| Status::INTERNAL_ERROR)?;
        Ok(u32::from(!aborted))
    }

    fn delete_submissions(&mut self, command: &Command) -> Outcome {
        let id = command.dword(10) as u16;
        let deleted = if id == 0 { None } else { self.submissions.remove(&id) };
        // Its commands end without a completion (NVMe 1.4 §5.6).
        self.long.retain(|long| long.completion.queue != id);
        deleted.map(|_| 0).ok_or(Status::INVALID_QUEUE_ID)
    }

    fn delete_completions(&mut self, command: &Command) -> Outcome {
        let id = command.dword(10) as u16;
        if id == 0 || !self.completions.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.submissions.values().any(|queue| queue.completions == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.completions.remove(&id);
        self.late.retain(|completion| completion.to != id);
        Ok(0)
    }

    fn identify(&mut self, bus: &Bus, command: &Command) -> Outcome {
        let (count, id) = (self.namespaces.len() as u32, command.namespace());
        let data = match command.dword(10) as u8 {
            0x00 => identify::namespace(self.namespace(id)?),
            0x01 => identify::controller(count, self.identity),
            0x02 if id < u32::MAX - 1 => identify::list(count, id),
            0x02 => return Err(Status::INVALID_NAMESPACE),
            0x03 => {
                self.namespace(id)?;
                identify::descriptors(id)
            }
            _ => return Err(Status::INVALID_FIELD),
        };
        self.send(bus, command, &data)
    }

    fn log(&mut self, bus: &Bus, command: &Command) -> Outcome {
        let (low, high) = (command.dword(10), command.dword(11));
        let page = identify::log(low & 0xff).ok_or(Status::INVALID_LOG_PAGE)?;
        let words = u64::from(low >> 16) | u64::from(high & 0xffff) << 16;
        let offset = u64::from(command.dword(12)) | u64::from(command.dword(13)) << 32;
        let rest = usize::try_from(offset).ok().and_then(|offset| page.get(offset..));
        let rest = rest.filter(|_| offset.is_multiple_of(4)).ok_or(Status::INVALID_FIELD)?;
        // Nothing is transferred past the end of the page.
        let len = usize::try_from((words + 1) * 4).unwrap_or(usize::MAX).min(rest.len());
        self.send(bus, command, &rest[..len])
    }

    fn feature(&mut self, command: &Command) -> Outcome {
        let feature = command.dword(10) as u8;
        let initial = default(feature).ok_or(Status::INVALID_FIELD)?;
        let vector = command.dword(11) as u16;
        match command.dword(10) >> 8 & 7 {
            0..=2 if feature == INTERRUPT_VECTOR && vector >= VECTORS => Err(Status::INVALID_FIELD),
            0 if feature == INTERRUPT_VECTOR && self.coalescing.is_exempt(vector) => {
                Ok(COALESCING_DISABLED | u32::from(vector))
            }
            0..=2 if feature == INTERRUPT_VECTOR => Ok(vector.into()),
            0 => Ok(self.features.get(&feature).copied().unwrap_or(initial)),
            1 | 2 => Ok(initial),
            // Changeable, for all namespaces together.
            3 => Ok(1 << 2),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn set_feature(&mut self, command: &Command) -> Outcome {
        let (feature, value) = (command.dword(10) as u8, command.dword(11));
        default(feature).ok_or(Status::INVALID_FIELD)?;
        if command.dword(10) & 1 << 31 != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match feature {
            QUEUE_COUNT if value & 0xffff == 0xffff || value >> 16 == 0xffff => {
                return Err(Status::INVALID_FIELD);
            }
            // All queues, independent of the request.
            QUEUE_COUNT => return Ok(QUEUE_COUNTS),
            WRITE_CACHE if value & 1 == 0 => self.flush_all(),
            INTERRUPT_COALESCING => self.coalescing.set(value),
            INTERRUPT_VECTOR if value as u16 >= VECTORS => return Err(Status::INVALID_FIELD),
            INTERRUPT_VECTOR => {
                let exempt = value & COALESCING_DISABLED != 0;
                self.coalescing.set_exempt(value as u16, exempt);
            }
            _ => {}
        }
        self.features.insert(feature, value);
        Ok(0)
    }
}
