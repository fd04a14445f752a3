//! The admin queue: one command at a time, with at most a page of data.

use std::time::{Duration, Instant};

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, IovaPlacement};
use vfio_remap::{Device, Error, ErrorKind, Result};

use super::command::{Command, admin, feature};
use super::doorbells::Doorbells;
use super::pair::{Completion, QueuePair, QueueShape};
use super::status::Status;

/// Entries of the admin queues. The controller's limit (CAP.MQES) is for I/O queues; admin queues may have up
/// to 4096 (NVMe Base 1.4 §3.1.8).
const ENTRIES: u16 = 32;
/// The size of the data of a command, in bytes.
pub const PAGE: usize = 4096;
/// How many Asynchronous Event Requests are outstanding, if the controller allows that many.
const EVENT_REQUESTS: usize = 4;
/// The tag of Asynchronous Event Requests. Other commands have smaller tags.
const EVENT: u64 = u64::MAX;

pub struct Admin {
    name: String,
    pair: QueuePair,
    /// The data page; `None` while the controller has it, or if the controller never returned it.
    page: Option<DmaBuffer>,
    timeout: Duration,
    /// Counts commands, so that a late completion is not taken for that of the next command.
    next: u64,
    /// The events: double word 0 of the completions.
    events: Vec<u32>,
    /// How many Asynchronous Event Requests are outstanding.
    waiting: usize,
    space: DmaSpace,
}

/// A command of the admin queue.
#[derive(Clone, Copy)]
pub struct AdminCommand {
    /// The verb for errors.
    pub operation: &'static str,
    pub command: Command,
    /// Whether it transfers data, and gets the page for it.
    pub with_data: bool,
}

impl Admin {
    pub fn new(
        device: &Device,
        space: &DmaSpace,
        stride: u64,
        page_shift: u32,
        timeout: Duration,
    ) -> Result<Self> {
        let shape =
            QueueShape { entries: ENTRIES, page_shift, max_transfer: PAGE, acknowledge_after: 1 };
        Ok(Self {
            name: device.name().to_owned(),
            pair: QueuePair::new(space, Doorbells::new(device, 0, stride)?, &shape)?,
            page: Some(page(space)?),
            timeout,
            next: 0,
            events: Vec::new(),
            waiting: 0,
            space: space.clone(),
        })
    }

    /// The entries and the addresses of the queues, for the registers.
    pub fn place(&self) -> (u32, u64, u64) {
        let (submissions, completions) = self.pair.addresses();
        (u32::from(self.pair.entries()), submissions, completions)
    }

    /// Empties the queues after a reset of the controller.
    pub fn reset(&mut self) -> Result<()> {
        self.pair.end_all(true, |_| {});
        self.pair.reset();
        self.waiting = 0;
        if self.page.is_none() {
            self.page = Some(page(&self.space)?);
        }
        Ok(())
    }

    /// Takes all memory that the controller knows: see [`QueuePair::take_memory`].
    pub fn take_memory(&mut self) -> Vec<DmaBuffer> {
        let mut remains = self.pair.take_memory();
        remains.extend(self.page.take());
        remains
    }

    /// Stops submissions until the controller is reset.
    pub fn break_off(&mut self) {
        self.pair.break_off();
    }

    /// Whether a command timed out, or a completion was malformed.
    pub fn is_broken(&self) -> bool {
        self.pair.is_broken()
    }

    /// Sends a command and waits for its completion. Returns its status and result; its data is in the
    /// [page](Self::data).
    pub fn send(&mut self, request: &AdminCommand) -> Result<(Status, u32)> {
        let AdminCommand { operation, command, with_data } = *request;
        self.next += 1;
        let tag = self.next;
        let page = if with_data { self.page.take() } else { None };
        if let Err(refused) = self.pair.submit(command, page, tag) {
            self.page = self.page.take().or(refused.buffer);
            return Err(self.error(operation, "its admin queue has failed"));
        }
        self.pair.ring();
        let start = Instant::now();
        loop {
            while let Some(done) = self.pair.pop() {
                self.pair.ring();
                if let Some(done) = self.take(done).filter(|done| done.tag == tag) {
                    return Ok((done.status, done.result));
                }
            }
            if self.pair.is_broken() {
                return Err(self.error(operation, "it has posted a malformed completion"));
            }
            let waited = start.elapsed();
            if waited > self.timeout {
                self.pair.break_off();
                return Err(Error::new(ErrorKind::TimedOut, operation, &self.name)
                    .with_reason(format!("no answer within {:?}", self.timeout)));
            }
            if waited > Duration::from_micros(100) {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// As [`send`](Self::send), but returns the result, or an error unless the command succeeds.
    pub fn execute(&mut self, request: &AdminCommand) -> Result<u32> {
        let (status, result) = self.send(request)?;
        status.check(request.operation, || self.name.clone())?;
        Ok(result)
    }

    /// The data of Identify (NVMe Base 1.4 §5.15), or the error status.
    pub fn identify(
        &mut self,
        structure: u32,
        namespace: u32,
    ) -> Result<std::result::Result<[u8; PAGE], Status>> {
        let command = Command::new(admin::IDENTIFY, namespace).dwords_10(structure, 0);
        // The data of an earlier command must not be taken for this one's.
        self.clear_data();
        let request = AdminCommand { operation: "identify", command, with_data: true };
        match self.send(&request)? {
            (status, _) if status.is_success() => Ok(Ok(self.data()?)),
            (status, _) => Ok(Err(status)),
        }
    }

    /// The name of the controller in errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The data of the last command that transferred some.
    pub fn data(&self) -> Result<[u8; PAGE]> {
        let mut data = [0; PAGE];
        match &self.page {
            Some(page) => page.read(0, &mut data),
            None => return Err(self.error("read from", "it still has the memory for its data")),
        }
        Ok(data)
    }

    /// Writes zeros to the page, because a command may transfer less than a page.
    pub fn clear_data(&mut self) {
        if let Some(page) = &self.page {
            page.write(0, &[0; PAGE]);
        }
    }

    /// Handles a completion: keeps an event, returns the completion of another command.
    fn take(&mut self, done: Completion) -> Option<Completion> {
        if done.tag == EVENT {
            self.waiting -= 1;
            if done.status.is_success() {
                self.events.push(done.result);
            }
            return None;
        }
        let Completion { tag, status, result, buffer } = done;
        self.page = buffer.or(self.page.take());
        Some(Completion { tag, status, result, buffer: None })
    }

    /// Enables events (NVMe Base 1.4 §5.21.1.11), all health warnings and changed namespaces, and sends
    /// Asynchronous Event Requests (§5.2), at most `limit`.
    pub fn request_events(&mut self, limit: usize) -> Result<()> {
        let command = Command::new(admin::SET_FEATURES, 0)
            .dwords_10(feature::ASYNCHRONOUS_EVENTS.into(), 0x11f);
        let request = AdminCommand { operation: "enable the events of", command, with_data: false };
        // The controller may not support all of them; an error status is ignored.
        self.send(&request)?;
        while self.waiting < limit.min(EVENT_REQUESTS) {
            let command = Command::new(admin::ASYNCHRONOUS_EVENT_REQUEST, 0);
            self.pair.submit(command, None, EVENT).map_err(Error::from)?;
            self.waiting += 1;
        }
        self.pair.ring();
        Ok(())
    }

    /// The events since the last call, oldest first.
    pub fn events(&mut self) -> Vec<u32> {
        while let Some(done) = self.pair.pop() {
            // A completion of a command that timed out is dropped.
            let _ = self.take(done);
        }
        self.pair.ring();
        std::mem::take(&mut self.events)
    }

    fn error(
        &self,
        operation: &'static str,
        reason: impl Into<std::borrow::Cow<'static, str>>,
    ) -> Error {
        Error::new(ErrorKind::Os, operation, &self.name).with_reason(reason)
    }
}

fn page(space: &DmaSpace) -> Result<DmaBuffer> {
    let placement = IovaPlacement::default().aligned(PAGE as u64);
    space.buffer_with(BufferRequest::new(PAGE).placement(placement))
}
