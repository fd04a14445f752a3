//! A controller: what there is one of, whichever threads do I/O with it.

mod namespaces;
mod queues;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, Interrupt, IovaPlacement, Vectors};
use vfio_remap::{Device, Error, ErrorKind, Result};

use super::admin::{Admin, PAGE, Question};
use super::bring_up::Hardware;
use super::command::{Command, admin, feature};
use super::doorbells;
use super::events::AsyncEvent;
use super::identify::Identity;
use super::log_page::{ERROR_ENTRY, ERRORS, ErrorEntry, HEALTH, Health};
use super::pair::MOST_ENTRIES;
use super::queue::IoQueue;

/// How long a shutdown may take at least, as not all controllers say (NVMe Base 1.4 §7.6.2 leaves it to
/// us), and at most, whatever they say.
const SHUTDOWN: Duration = Duration::from_secs(10);
const LONGEST_SHUTDOWN: Duration = Duration::from_secs(60);
/// Everywhere that a namespace's number may mean all of them.
const ALL: u32 = u32::MAX;

/// How a controller is to be used.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// I/O queues to ask for: one for each thread.
    pub queues: u16,
    /// Entries of an I/O queue, of which all but one can be used at a time: 2 to 16384, or fewer where the
    /// controller has less (CAP.MQES). What is outside is taken for the nearest.
    pub entries: u16,
    /// Whether completions are waited for by MSI-X, rather than by polling.
    pub interrupts: bool,
    /// After which a command is aborted.
    pub timeout: Duration,
    /// What it gets to end in after that, before the controller is reset.
    pub grace: Duration,
    /// After which a command of the admin queue has failed.
    pub admin_timeout: Duration,
    /// How long the controller's registers cannot be read, or must not be, after it was disabled. The
    /// driver leaves them alone for this time after each disable. [`Controller::new`], which may come
    /// after a disable by somebody else, waits as long for them to answer. Most controllers need none.
    /// Linux gives some of them 2.3 seconds (`NVME_QUIRK_DELAY_BEFORE_CHK_RDY`).
    ///
    /// Without it, registers that read all ones after a disable are waited for until the time in CAP.TO
    /// is over, as long as the configuration space answers.
    pub disable_delay: Duration,
}

impl Settings {
    /// One queue of 256 entries, polled. A command may take ten seconds.
    pub const DEFAULT: Self = Self {
        queues: 1,
        entries: 256,
        interrupts: false,
        timeout: Duration::from_secs(10),
        grace: Duration::from_secs(1),
        admin_timeout: Duration::from_secs(5),
        disable_delay: Duration::ZERO,
    };
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// An NVMe controller, ready. Threads share it and have an [`IoQueue`] each.
///
/// When it fails, or a command is lost, the queue that notices first resets it. The others see a new
/// [generation](Self::generation), and have the controller make their queues again.
pub struct Controller {
    /// Left quiet before anything that it was told of goes.
    hardware: Hardware,
    identity: Identity,
    settings: Settings,
    /// Queues that can be made.
    queues: u16,
    vectors: Option<Vectors>,
    space: DmaSpace,
    /// Counts resets.
    generation: AtomicU32,
    state: Mutex<State>,
}

struct State {
    admin: Admin,
    /// Numbers of queues that are not in use.
    free: Vec<u16>,
    /// Those that the controller knows.
    attached: Vec<u16>,
    /// What was asked for the write cache: a reset forgets it.
    write_cache: Option<bool>,
    /// Why the controller could not be brought up again.
    failed: Option<Error>,
    /// What it was told of in generations below this it cannot reach any more: it was disabled since.
    quiet_below: u32,
    /// Memory of queues that are gone, which it may reach until a reset of it is quiet.
    kept: Vec<DmaBuffer>,
}

/// What a controller that was brought up has.
struct Found {
    identity: Identity,
    queues: u16,
    vectors: Option<Vectors>,
}

/// What a queue finds after a reset.
pub(super) struct Condition {
    pub generation: u32,
    pub quiet: bool,
    pub failed: Option<Error>,
}

impl Controller {
    /// Brings a controller up, whatever state it is in.
    ///
    /// # Errors
    /// Where the device is none, does not become ready, or says what makes no sense. It is then left
    /// disabled.
    pub fn new(device: Device, settings: Settings) -> Result<Arc<Self>> {
        let hardware = Hardware::find(device, settings.disable_delay)?;
        let capabilities = hardware.capabilities;
        let (stride, page_shift) = (capabilities.doorbell_stride(), capabilities.page_shift());
        let space = hardware.device.dma()?;
        let timeout = settings.admin_timeout;
        let mut admin = Admin::new(&hardware.device, &space, stride, page_shift, timeout)?;
        let Found { identity, queues, vectors } =
            match Self::bring_up(&hardware, &mut admin, &settings) {
                Ok(found) => found,
                Err(error) => {
                    hardware.give_up(admin);
                    return Err(error);
                }
            };
        let state = State {
            admin,
            free: (1..=queues).rev().collect(),
            attached: Vec::new(),
            write_cache: None,
            failed: None,
            quiet_below: 0,
            kept: Vec::new(),
        };
        Ok(Arc::new(Self {
            hardware,
            identity,
            settings,
            queues,
            vectors,
            space,
            generation: AtomicU32::new(0),
            state: Mutex::new(state),
        }))
    }

    /// Brings a controller up for the first time.
    fn bring_up(hardware: &Hardware, admin: &mut Admin, settings: &Settings) -> Result<Found> {
        let device = &hardware.device;
        let stride = hardware.capabilities.doorbell_stride();
        hardware.bring_up(admin, &mut false)?;
        let identity = identify(hardware, admin)?;
        let places = doorbells::room(stride, device.bar(0)?.size());
        let room = u16::try_from(places.saturating_sub(1)).unwrap_or(u16::MAX);
        if room == 0 {
            return Err(doorbells::outside(device, 1, stride, device.bar(0)?.size()));
        }
        let mut queues = queue_count(device, admin, settings.queues.max(1))?.min(room);
        let vectors = if settings.interrupts {
            // One for the admin queue, though it is polled, and one for each of the others.
            let there = device.interrupt(Interrupt::MsiX)?.count.min(u16::MAX.into()) as u16;
            if there == 0 {
                return Err(Error::new(ErrorKind::Unsupported, "use interrupts of", device.name())
                    .because("it has no MSI-X vectors")
                    .remedy("poll its queues instead (Settings::interrupts)"));
            }
            queues = queues.min(there.saturating_sub(1).max(1));
            Some(device.vectors(Interrupt::MsiX, usize::from(queues + 1).min(there.into()))?)
        } else {
            None
        };
        admin.request_events(identity.event_limit)?;
        Ok(Found { identity, queues, vectors })
    }

    /// How errors and logs name it.
    pub fn name(&self) -> &str {
        self.hardware.device.name()
    }

    /// What it says of itself.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How it is used.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How many I/O queues there can be.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The version of the specification that it follows, as in "1.4".
    pub fn version(&self) -> Result<String> {
        let version = self.hardware.registers.version()?;
        let (major, minor, rest) = (version.major(), version.minor(), version.tertiary());
        Ok(match rest {
            0 => format!("{major}.{minor}"),
            _ => format!("{major}.{minor}.{rest}"),
        })
    }

    /// From one doorbell to the next, in bytes; and how many pairs of queues share a page for theirs.
    pub fn doorbells(&self) -> (u64, u64) {
        let stride = self.hardware.capabilities.doorbell_stride();
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
        (stride, doorbells::pairs_sharing_a_page(stride, page.unwrap_or(4096) as u64))
    }

    /// Entries of an I/O queue, and the controller's page size as a power of two.
    pub(super) fn queue_shape(&self) -> (u16, u32) {
        let capabilities = self.hardware.capabilities;
        let most = capabilities.entries().min(MOST_ENTRIES.into()) as u16;
        (self.settings.entries.clamp(2, most), capabilities.page_shift())
    }

    pub(super) fn device(&self) -> &Device {
        &self.hardware.device
    }

    pub(super) fn space(&self) -> &DmaSpace {
        &self.space
    }

    pub(super) fn stride(&self) -> u64 {
        self.hardware.capabilities.doorbell_stride()
    }

    /// Memory for data, at the beginning of a page.
    pub fn buffer(&self, size: usize) -> Result<DmaBuffer> {
        let alignment = 1 << self.hardware.capabilities.page_shift();
        let placement = IovaPlacement::Anywhere { alignment, limit: u64::MAX };
        self.space.buffer_with(BufferRequest::new(size).placement(placement))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The admin queue, of a controller that has not failed.
    fn admin<T>(&self, f: impl FnOnce(&mut Admin) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => f(&mut state.admin),
        }
    }

    /// Its health, of all namespaces together.
    pub fn health(&self) -> Result<Health> {
        let page = self.admin(|admin| read_log(admin, HEALTH, 512))?;
        Ok(Health::parse(&page))
    }

    /// The errors that it has noted, the latest first.
    pub fn errors(&self) -> Result<Vec<ErrorEntry>> {
        let len = (self.identity.error_entries * ERROR_ENTRY).min(PAGE);
        let page = self.admin(|admin| read_log(admin, ERRORS, len))?;
        Ok(ErrorEntry::parse(&page, len))
    }

    /// What the controller has told unasked since this was called last. It tells the next of a kind once
    /// that is done.
    pub fn events(&self) -> Result<Vec<AsyncEvent>> {
        let limit = self.identity.event_limit;
        self.admin(|admin| {
            let events: Vec<_> = admin.events().into_iter().map(AsyncEvent::new).collect();
            for event in &events {
                // Reading the page is what lets the next one come; there may be none to read.
                if let Err(error) = read_log(admin, event.log_page, 512) {
                    log::info!("nvme: after {event}: {error}");
                }
            }
            if !events.is_empty() {
                admin.request_events(limit)?;
            }
            Ok(events)
        })
    }

    /// Switches the volatile write cache, and again whenever the controller was reset.
    ///
    /// # Errors
    /// `Unsupported` where it has none; what the controller answers.
    pub fn set_write_cache(&self, on: bool) -> Result<()> {
        if !self.identity.has_write_cache {
            return Err(Error::new(ErrorKind::Unsupported, "switch", "the write cache")
                .because(format!("{} has none", self.name())));
        }
        let mut state = self.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        // No reset comes in between.
        set_write_cache(&mut state.admin, on)?;
        state.write_cache = Some(on);
        Ok(())
    }

    /// Whether the volatile write cache is on.
    pub fn write_cache(&self) -> Result<bool> {
        let command =
            Command::new(admin::GET_FEATURES, 0).dwords_10(feature::VOLATILE_WRITE_CACHE.into(), 0);
        let operation = "get the features of";
        let question = Question { operation, command, with_data: false };
        Ok(self.identity.has_write_cache && self.admin(|admin| admin.execute(&question))? & 1 != 0)
    }

    /// A pair of queues for I/O, and the doorbells that go with it, for one thread.
    ///
    /// # Errors
    /// `InUse` where there are as many as there can be; what the controller answers.
    pub fn queue(self: &Arc<Self>) -> Result<IoQueue> {
        self.admin(|_| Ok(()))?;
        let id = self.state().free.pop().ok_or_else(|| {
            Error::new(ErrorKind::InUse, "make", format!("a queue of {}", self.name()))
                .because(format!("all {} are in use", self.queues))
        })?;
        IoQueue::new(self.clone(), id).inspect_err(|_| self.state().free.push(id))
    }

    /// The vector of a queue; `None` where it is polled.
    pub(super) fn vector(&self, queue: u16) -> Option<usize> {
        let vectors = self.vectors.as_ref()?;
        Some(usize::from(queue).min(vectors.count() - 1))
    }

    pub(super) fn wait(&self, vector: usize, time: Duration) -> Result<u64> {
        self.vectors.as_ref().map_or(Ok(0), |vectors| vectors.wait(vector, time))
    }

    /// Asks for a command to be aborted (NVMe Base 1.4 §5.1). It may end otherwise all the same.
    pub(super) fn abort(&self, queue: u16, command: u16) -> Result<()> {
        let which = u32::from(command) << 16 | u32::from(queue);
        let command = Command::new(admin::ABORT, 0).dwords_10(which, 0);
        let question = Question { operation: "abort a command of", command, with_data: false };
        self.admin(|admin| admin.execute(&question)).map(drop)
    }

    /// An error where the controller does not work any more.
    pub(super) fn check(&self) -> Result<()> {
        self.hardware.registers.check()
    }

    /// How often the controller was reset.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// For a queue that generation `seen` knew.
    pub(super) fn condition(&self, seen: u32) -> Condition {
        let state = self.state();
        let (quiet, failed) = (seen < state.quiet_below, state.failed.clone());
        Condition { generation: self.generation(), quiet, failed }
    }

    /// Resets the controller, unless that was done since generation `seen`.
    pub(super) fn recover(&self, seen: u32) {
        let mut state = self.state();
        if self.generation() == seen
            && let Err(error) = self.reset_locked(&mut state)
        {
            log::error!("nvme: {error}");
        }
    }

    /// Resets the controller, and brings it up again: also one that has failed to be, such as a card
    /// that was gone and is back. Commands that are with it end as aborted by the host.
    ///
    /// # Errors
    /// What it fails of. The controller cannot be used until this succeeds.
    pub fn reset(&self) -> Result<()> {
        self.reset_locked(&mut self.state())
    }

    fn reset_locked(&self, state: &mut State) -> Result<()> {
        self.stop_queues(state);
        let mut quiet = false;
        let result = self.hardware.disable().and_then(|()| {
            self.hardware.bring_up(&mut state.admin, &mut quiet)?;
            self.prepare(state)
        });
        if quiet {
            state.quiet_below = self.generation() + 1;
            state.kept.clear();
        }
        state.failed = result.as_ref().err().cloned();
        self.generation.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// What is said to a controller that was brought up again.
    fn prepare(&self, state: &mut State) -> Result<()> {
        let error = |reason: String| {
            Err(Error::new(ErrorKind::Gone, "go on with", self.name()).because(reason))
        };
        let found = identify(&self.hardware, &mut state.admin)?;
        if (&found.model, &found.serial) != (&self.identity.model, &self.identity.serial) {
            return error(format!("another one is there: {} {}", found.model, found.serial));
        }
        let queues = queue_count(&self.hardware.device, &mut state.admin, self.queues)?;
        if queues < self.queues {
            return error(format!("it has {queues} queues now, and had {}", self.queues));
        }
        if let Some(on) = state.write_cache {
            set_write_cache(&mut state.admin, on)?;
        }
        state.admin.request_events(found.event_limit)
    }

    /// Shuts the controller down in good order, so that all that was written lasts, and closes the
    /// device.
    ///
    /// # Errors
    /// `InUse` while queues are alive; what the controller fails of. It is left quiet anyway.
    pub fn close(self: Arc<Self>) -> Result<()> {
        let name = self.name().to_owned();
        let controller = Arc::try_unwrap(self).map_err(|_| {
            Error::new(ErrorKind::InUse, "shut down", &name)
                .because("queues of it are alive")
                .remedy("drop them first")
        })?;
        let device = controller.hardware.device.clone();
        let time = controller.identity.shutdown_time.clamp(SHUTDOWN, LONGEST_SHUTDOWN);
        let shut_down = controller.hardware.registers.shut_down(time);
        drop(controller);
        shut_down?;
        // Nobody else has been given it.
        Arc::into_inner(device).map_or(Ok(()), |device| Ok(device.close()?))
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let told = (state.admin.remains(), std::mem::take(&mut state.kept));
        self.hardware.give_up(told);
    }
}

fn identify(hardware: &Hardware, admin: &mut Admin) -> Result<Identity> {
    let page = admin.identify(0x01, 0)?.map_err(|status| status.error("identify", admin.name()))?;
    let capabilities = hardware.capabilities;
    Identity::parse(&page, hardware.device.name(), capabilities, 1 << capabilities.page_shift())
}

/// Asks for I/O queues (NVMe Base 1.4 §5.21.1.7): how many of both sorts there are.
fn queue_count(device: &Device, admin: &mut Admin, wanted: u16) -> Result<u16> {
    let last = u32::from(wanted - 1);
    let command = Command::new(admin::SET_FEATURES, 0)
        .dwords_10(feature::NUMBER_OF_QUEUES.into(), last << 16 | last);
    let operation = "ask for I/O queues of";
    let result = admin.execute(&Question { operation, command, with_data: false })?;
    let (submission, completion) = (result as u16, (result >> 16) as u16);
    // Counted from zero on; the specification has no 65536.
    match submission.min(completion).checked_add(1) {
        Some(count) if submission.max(completion) != u16::MAX => Ok(count.min(wanted)),
        _ => Err(Error::new(ErrorKind::Malformed, operation, device.name()).because(format!(
            "it has {submission:#x} and {completion:#x}, which are not counts of queues"
        ))),
    }
}

fn set_write_cache(admin: &mut Admin, on: bool) -> Result<()> {
    let command = Command::new(admin::SET_FEATURES, 0)
        .dwords_10(feature::VOLATILE_WRITE_CACHE.into(), on.into());
    let operation = "switch the write cache of";
    admin.execute(&Question { operation, command, with_data: false }).map(drop)
}

/// Reads the first `len` bytes of a log page, of which there may be fewer: the rest is zero.
fn read_log(admin: &mut Admin, page: u8, len: usize) -> Result<[u8; PAGE]> {
    let words = (len.min(PAGE) / 4) as u32;
    let command =
        Command::new(admin::GET_LOG_PAGE, ALL).dwords_10((words - 1) << 16 | u32::from(page), 0);
    let operation = "read a log page of";
    admin.clear_data();
    admin.execute(&Question { operation, command, with_data: true })?;
    admin.data()
}
