//! The admin queue: one command at a time, and answers of a page at most.

use std::time::{Duration, Instant};

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, IovaPlacement};
use vfio_remap::{Device, Error, ErrorKind, Result};

use super::command::{Command, admin, feature};
use super::doorbells::Doorbells;
use super::pair::{Done, QueuePair, Shape};
use super::status::Status;

/// Entries of the admin queues. The controller's limit (CAP.MQES) is one for the others: up to 4096 are
/// allowed here (NVMe Base 1.4 §3.1.8).
const ENTRIES: u16 = 32;
/// Bytes of what commands answer with.
pub const PAGE: usize = 4096;
/// How many requests for events are left with the controller, if it takes so many.
const EVENT_REQUESTS: usize = 4;
/// Tags: a request for events, and a command that somebody waits for.
const EVENT: u64 = u64::MAX;

pub struct Admin {
    name: String,
    pair: QueuePair,
    /// With the controller, or lost to it, while it is not here.
    page: Option<DmaBuffer>,
    timeout: Duration,
    /// Counts commands: one that comes after its time is told from the next.
    next: u64,
    /// What events there were: double word 0 of their completions.
    events: Vec<u32>,
    /// Requests for events that the controller holds.
    waiting: usize,
    space: DmaSpace,
}

/// What a command that the controller answers to is.
#[derive(Clone, Copy)]
pub struct Question {
    /// For errors, as a verb.
    pub operation: &'static str,
    pub command: Command,
    /// Whether it answers by data, a page of which it is given.
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
            Shape { entries: ENTRIES, page_shift, max_transfer: PAGE, acknowledge_after: 1 };
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

    /// Entries and places of the queues, for the registers.
    pub fn place(&self) -> (u32, u64, u64) {
        let (submissions, completions) = self.pair.places();
        (u32::from(self.pair.entries()), submissions, completions)
    }

    /// After a reset of the controller: empty queues.
    pub fn reset(&mut self) -> Result<()> {
        self.pair.end_all(true, |_| {});
        self.pair.reset();
        self.waiting = 0;
        if self.page.is_none() {
            self.page = Some(page(&self.space)?);
        }
        Ok(())
    }

    /// What the controller was told of: see [`QueuePair::remains`].
    pub fn remains(&mut self) -> Vec<DmaBuffer> {
        let mut remains = self.pair.remains();
        remains.extend(self.page.take());
        remains
    }

    /// Nothing that the controller answers is trusted until it is reset.
    pub fn break_off(&mut self) {
        self.pair.break_off();
    }

    /// Whether a command was not answered in time, or with nonsense.
    pub fn is_broken(&self) -> bool {
        self.pair.is_broken()
    }

    /// Sends a command and waits for its end: its status and result. Data lies in the [page](Self::data)
    /// afterwards.
    pub fn ask(&mut self, question: &Question) -> Result<(Status, u32)> {
        let Question { operation, command, with_data } = *question;
        self.next += 1;
        let tag = self.next;
        let page = if with_data { self.page.take() } else { None };
        if let Err(refused) = self.pair.submit(command, page, tag) {
            self.page = self.page.take().or(refused.buffer);
            return Err(self.error(operation, "its admin queue does not work"));
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
                return Err(self.error(operation, "it has answered with nonsense"));
            }
            let waited = start.elapsed();
            if waited > self.timeout {
                self.pair.break_off();
                let seconds = self.timeout.as_secs_f64();
                return Err(self.error(operation, format!("no answer in {seconds:.1} seconds")));
            }
            if waited > Duration::from_micros(100) {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// As [`ask`](Self::ask); an error unless it succeeds, and the result otherwise.
    pub fn execute(&mut self, question: &Question) -> Result<u32> {
        let (status, result) = self.ask(question)?;
        status.check(question.operation, || self.name.clone())?;
        Ok(result)
    }

    /// What the controller answers to Identify (NVMe Base 1.4 §5.15), or with which status it refuses.
    pub fn identify(
        &mut self,
        structure: u32,
        namespace: u32,
    ) -> Result<std::result::Result<[u8; PAGE], Status>> {
        let command = Command::new(admin::IDENTIFY, namespace).dwords_10(structure, 0);
        // What an earlier command has left there is no answer.
        self.clear_data();
        let question = Question { operation: "identify", command, with_data: true };
        match self.ask(&question)? {
            (status, _) if status.is_success() => Ok(Ok(self.data()?)),
            (status, _) => Ok(Err(status)),
        }
    }

    /// How errors name the controller.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The data of the last command that had some.
    pub fn data(&self) -> Result<[u8; PAGE]> {
        let mut data = [0; PAGE];
        match &self.page {
            Some(page) => page.read(0, &mut data),
            None => return Err(self.error("read from", "it still holds the memory for its answer")),
        }
        Ok(data)
    }

    /// Zeros, where a command may answer with less than a page.
    pub fn clear_data(&mut self) {
        if let Some(page) = &self.page {
            page.write(0, &[0; PAGE]);
        }
    }

    /// What has ended: an event, which is kept, or the end of a command.
    fn take(&mut self, done: Done) -> Option<Done> {
        if done.tag == EVENT {
            self.waiting -= 1;
            if done.status.is_success() {
                self.events.push(done.result);
            }
            return None;
        }
        let Done { tag, status, result, buffer } = done;
        self.page = buffer.or(self.page.take());
        Some(Done { tag, status, result, buffer: None })
    }

    /// Leaves requests for events with the controller, which takes `limit`, and says which it is to
    /// tell of (NVMe Base 1.4 §5.2, §5.21.1.11): all warnings about its health, changed namespaces.
    pub fn request_events(&mut self, limit: usize) -> Result<()> {
        let command = Command::new(admin::SET_FEATURES, 0)
            .dwords_10(feature::ASYNCHRONOUS_EVENTS.into(), 0x11f);
        let question = Question { operation: "ask for events of", command, with_data: false };
        // Some of them may be unknown to it, which then tells of fewer.
        self.ask(&question)?;
        while self.waiting < limit.min(EVENT_REQUESTS) {
            let command = Command::new(admin::ASYNCHRONOUS_EVENT_REQUEST, 0);
            self.pair.submit(command, None, EVENT).map_err(Error::from)?;
            self.waiting += 1;
        }
        self.pair.ring();
        Ok(())
    }

    /// Events that have come, oldest first.
    pub fn events(&mut self) -> Vec<u32> {
        while let Some(done) = self.pair.pop() {
            // A command that nobody waits for any more.
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
        Error::new(ErrorKind::Os, operation, &self.name).because(reason)
    }
}

fn page(space: &DmaSpace) -> Result<DmaBuffer> {
    let placement = IovaPlacement::Anywhere { alignment: PAGE as u64, limit: u64::MAX };
    space.buffer_with(BufferRequest::new(PAGE).placement(placement))
}
