//! A controller, which all threads that do I/O with it share.

mod features;
mod namespaces;
mod queues;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_remap::device::{
    BufferRequest, CloseError, DmaBuffer, DmaSpace, Interrupt, IovaPlacement, Vectors,
};
use vfio_remap::{Device, Error, ErrorKind, Result};

use super::admin::{Admin, AdminCommand, PAGE};
use super::bring_up::Hardware;
use super::command::{Command, admin, feature};
use super::doorbells;
use super::events::AsyncEvent;
use super::identify::Identity;
use super::log_page::{ERROR_ENTRY, ERRORS, ErrorEntry, HEALTH, Health};
use super::pair::MOST_ENTRIES;
use super::queue::IoQueue;
use super::settings::Settings;

/// The least and the greatest time limit of a shutdown. Not all controllers state one (NVMe Base 1.4 §7.6.2).
const SHUTDOWN: Duration = Duration::from_secs(10);
const LONGEST_SHUTDOWN: Duration = Duration::from_secs(60);
/// The namespace ID that means all namespaces.
const ALL: u32 = u32::MAX;

/// An NVMe controller that is ready. Threads share it; each has its own [`IoQueue`].
///
/// When it fails or loses a command, the queue that notices first resets it. The other queues see a new
/// [generation](Self::generation) and are created again.
///
/// A controller that is gone ([`Device::gone`]) ends all commands with errors, within the interval between two
/// checks, and returns their buffers. If the same device comes back, [`reset`](Self::reset) initializes it again;
/// for another one, open it. An access to a controller that does not answer raises SIGBUS, unless the program has
/// installed [`FaultGuard`](vfio_remap::space::FaultGuard): the windows are then revoked, and restored by the next
/// reset.
pub struct Controller {
    /// Dropped first, which disables the controller before its DMA memory is freed.
    hardware: Hardware,
    identity: Identity,
    settings: Settings,
    /// How many I/O queues there can be.
    queues: u16,
    vectors: Option<Vectors>,
    space: DmaSpace,
    /// Counts resets.
    generation: AtomicU32,
    state: Mutex<State>,
}

struct State {
    admin: Admin,
    /// The numbers of unused queues.
    free: Vec<u16>,
    /// The numbers of the queues that the controller has.
    attached: Vec<u16>,
    /// Features that were set, to set them again after a reset.
    features: BTreeMap<u8, u32>,
    /// Why the controller could not be initialized again.
    failed: Option<Error>,
    /// The controller was disabled after all generations below this one, so it cannot reach their memory.
    quiet_below: u32,
    /// Memory of deleted queues that the controller may reach until it is disabled.
    kept: Vec<DmaBuffer>,
}

/// The properties of an initialized controller.
struct Properties {
    identity: Identity,
    queues: u16,
    vectors: Option<Vectors>,
}

/// The state of the controller for a queue after a reset.
pub(super) struct Condition {
    pub generation: u32,
    pub quiet: bool,
    pub failed: Option<Error>,
}

impl Controller {
    /// Initializes a controller, in any state.
    ///
    /// # Errors
    /// `Unsupported` if the device is not an NVMe controller that this driver supports, `Malformed` if its
    /// registers or data are invalid, `TimedOut` if it does not answer. It is then left disabled.
    pub fn new(device: Device, settings: Settings) -> Result<Arc<Self>> {
        let hardware = Hardware::find(device, settings.disable_delay)?;
        let capabilities = hardware.capabilities;
        let (stride, page_shift) = (capabilities.doorbell_stride(), capabilities.page_shift());
        let space = hardware.device.dma()?;
        let timeout = settings.admin_timeout;
        let mut admin = Admin::new(&hardware.device, &space, stride, page_shift, timeout)?;
        let Properties { identity, queues, vectors } =
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
            features: BTreeMap::new(),
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

    /// Initializes a controller for the first time.
    fn bring_up(hardware: &Hardware, admin: &mut Admin, settings: &Settings) -> Result<Properties> {
        let device = &hardware.device;
        let stride = hardware.capabilities.doorbell_stride();
        hardware.bring_up(admin, &mut false)?;
        let identity = identify(hardware, admin)?;
        let places = doorbells::room(stride, device.bar(0)?.size());
        let room = u16::try_from(places.saturating_sub(1)).unwrap_or(u16::MAX);
        if room == 0 {
            return Err(doorbells::outside(device, 1, stride, device.bar(0)?.size()));
        }
        let mut queues = request_queues(device, admin, settings.queues.max(1))?.min(room);
        let vectors = if settings.interrupts {
            // One for the admin queue, although it is polled, and one for each I/O queue.
            let there = device.interrupt(Interrupt::MsiX)?.count.min(u16::MAX.into()) as u16;
            if there == 0 {
                return Err(Error::new(ErrorKind::Unsupported, "use interrupts of", device.name())
                    .with_reason("it has no MSI-X vectors")
                    .with_advice("poll its queues instead: Settings::interrupts"));
            }
            queues = queues.min(there.saturating_sub(1).max(1));
            Some(device.vectors(Interrupt::MsiX, usize::from(queues + 1).min(there.into()))?)
        } else {
            None
        };
        admin.request_events(identity.event_limit)?;
        Ok(Properties { identity, queues, vectors })
    }

    /// The name of the controller in errors and logs.
    pub fn name(&self) -> &str {
        self.hardware.device.name()
    }

    /// The identity of the controller.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The settings of the controller.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How many I/O queues there can be.
    pub fn queue_count(&self) -> u16 {
        self.queues
    }

    /// The version of the specification that it implements, such as "1.4".
    pub fn version(&self) -> Result<String> {
        let version = self.hardware.registers.version()?;
        let (major, minor, rest) = (version.major(), version.minor(), version.tertiary());
        Ok(match rest {
            0 => format!("{major}.{minor}"),
            _ => format!("{major}.{minor}.{rest}"),
        })
    }

    /// The distance of two doorbells in bytes (CAP.DSTRD).
    pub fn doorbell_stride(&self) -> u64 {
        self.hardware.capabilities.doorbell_stride()
    }

    /// How many pairs of queues have their doorbells on one page of this process, so that a wrong pointer into
    /// the window of one reaches the others.
    pub fn queues_per_doorbell_page(&self) -> u64 {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
        doorbells::pairs_sharing_a_page(self.doorbell_stride(), page.unwrap_or(4096) as u64)
    }

    /// The entries of an I/O queue, and the binary logarithm of the controller's page size.
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

    /// A buffer for data, at the beginning of a page.
    pub fn buffer(&self, size: usize) -> Result<DmaBuffer> {
        let alignment = 1 << self.hardware.capabilities.page_shift();
        let placement = IovaPlacement::default().aligned(alignment);
        self.space.buffer_with(BufferRequest::new(size).placement(placement))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` with the admin queue, unless the controller has failed.
    fn admin<T>(&self, f: impl FnOnce(&mut Admin) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => f(&mut state.admin),
        }
    }

    /// The health of the controller and all namespaces.
    pub fn health(&self) -> Result<Health> {
        let page = self.admin(|admin| read_log(admin, HEALTH, 512))?;
        Ok(Health::parse(&page))
    }

    /// The error log, the latest error first.
    pub fn errors(&self) -> Result<Vec<ErrorEntry>> {
        let len = (self.identity.error_entries * ERROR_ENTRY).min(PAGE);
        let page = self.admin(|admin| read_log(admin, ERRORS, len))?;
        Ok(ErrorEntry::parse(&page, len))
    }

    /// The asynchronous events since the last call. The controller reports the next event of a type only after
    /// this call.
    pub fn events(&self) -> Result<Vec<AsyncEvent>> {
        let limit = self.identity.event_limit;
        self.admin(|admin| {
            let events: Vec<_> = admin.events().into_iter().map(AsyncEvent::new).collect();
            for event in &events {
                // Reading the page allows the next event. The page may not exist.
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

    /// A pair of I/O queues with its doorbells, for one thread.
    ///
    /// # Errors
    /// `InUse` if all queues are in use; the controller's error.
    pub fn queue(self: &Arc<Self>) -> Result<IoQueue> {
        self.admin(|_| Ok(()))?;
        let id = self.state().free.pop().ok_or_else(|| {
            Error::new(ErrorKind::InUse, "make", format!("a queue of {}", self.name()))
                .with_reason(format!("all {} are in use", self.queues))
        })?;
        IoQueue::new(self.clone(), id).inspect_err(|_| self.state().free.push(id))
    }

    /// The vector of a queue; `None` if it is polled.
    pub(super) fn vector(&self, queue: u16) -> Option<usize> {
        let vectors = self.vectors.as_ref()?;
        Some(usize::from(queue).min(vectors.count() - 1))
    }

    /// Waits for a vector. Returns whether it has fired.
    pub(super) fn wait(&self, vector: usize, time: Duration) -> Result<bool> {
        let Some(vectors) = &self.vectors else { return Ok(false) };
        match vectors.wait(vector, time) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::TimedOut => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Requests the abort of a command (NVMe Base 1.4 §5.1). The command may still complete normally.
    pub(super) fn abort(&self, queue: u16, command: u16) -> Result<()> {
        let which = u32::from(command) << 16 | u32::from(queue);
        let command = Command::new(admin::ABORT, 0).dwords_10(which, 0);
        let request = AdminCommand { operation: "abort a command of", command, with_data: false };
        self.admin(|admin| admin.execute(&request)).map(drop)
    }

    /// Checks that the controller works.
    pub(super) fn check(&self) -> Result<()> {
        self.hardware.registers.check()
    }

    /// How often the controller was reset.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The condition for a queue that was created in generation `seen`.
    pub(super) fn condition(&self, seen: u32) -> Condition {
        let state = self.state();
        let (quiet, failed) = (seen < state.quiet_below, state.failed.clone());
        Condition { generation: self.generation(), quiet, failed }
    }

    /// Resets the controller, unless it was reset since generation `seen`.
    pub(super) fn recover(&self, seen: u32) {
        let mut state = self.state();
        if self.generation() == seen
            && let Err(error) = self.reset_locked(&mut state)
        {
            log::error!("nvme: {error}");
        }
    }

    /// Resets the controller and initializes it again. This also works after an earlier attempt has failed, for
    /// example for a card that was removed and plugged in. Outstanding commands complete as aborted by the
    /// host.
    ///
    /// # Errors
    /// The error of the failed step. The controller cannot be used until this succeeds.
    pub fn reset(&self) -> Result<()> {
        self.reset_locked(&mut self.state())
    }

    fn reset_locked(&self, state: &mut State) -> Result<()> {
        let mut quiet = false;
        let result = self.hardware.reach().and_then(|()| {
            self.stop_queues(state);
            self.hardware.disable()?;
            self.hardware.bring_up(&mut state.admin, &mut quiet)?;
            self.prepare(state)
        });
        // What is gone reaches no memory. No error says that it is: one window may be lost, and the rest alive.
        if quiet || (result.is_err() && self.hardware.device.gone()) {
            state.quiet_below = self.generation() + 1;
            state.kept.clear();
        }
        state.failed = result.as_ref().err().cloned();
        self.generation.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// Sets up a controller that was initialized again.
    fn prepare(&self, state: &mut State) -> Result<()> {
        let error = |reason: String| {
            Err(Error::new(ErrorKind::Gone, "continue to use", self.name()).with_reason(reason))
        };
        let found = identify(&self.hardware, &mut state.admin)?;
        if (&found.model, &found.serial) != (&self.identity.model, &self.identity.serial) {
            return error(format!(
                "the device is another controller: {} {}",
                found.model, found.serial
            ));
        }
        let queues = request_queues(&self.hardware.device, &mut state.admin, self.queues)?;
        if queues < self.queues {
            return error(format!("it has {queues} queues now, but had {}", self.queues));
        }
        for (feature, value) in &state.features {
            features::set(&mut state.admin, *feature, *value)?;
        }
        state.admin.request_events(found.event_limit)
    }

    /// Shuts the controller down, so that all written data is durable, and closes the device.
    ///
    /// # Errors
    /// `InUse` while queues or clones exist: the error returns the controller, which still works. The
    /// controller's error, or `InUse` while buffers exist: the controller is then disabled anyway.
    pub fn close(self: Arc<Self>) -> std::result::Result<(), CloseError<Arc<Self>>> {
        let controller = Arc::try_unwrap(self).map_err(|controller| {
            let error = Error::new(ErrorKind::InUse, "shut down", controller.name())
                .with_reason("it still has queues, or there are clones of its Arc")
                .with_advice("drop them first");
            CloseError::in_use(error, controller)
        })?;
        let device = controller.hardware.device.clone();
        let time = controller.identity.shutdown_time.clamp(SHUTDOWN, LONGEST_SHUTDOWN);
        let shut_down = controller.hardware.registers.shut_down(time);
        drop(controller);
        shut_down?;
        // Nothing else holds the device.
        match Arc::into_inner(device) {
            Some(device) => Ok(device.close().map_err(Error::from)?),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Controller({})", self.name())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let told = (state.admin.take_memory(), std::mem::take(&mut state.kept));
        self.hardware.give_up(told);
    }
}

fn identify(hardware: &Hardware, admin: &mut Admin) -> Result<Identity> {
    let page = admin.identify(0x01, 0)?.map_err(|status| status.error("identify", admin.name()))?;
    let capabilities = hardware.capabilities;
    Identity::parse(&page, hardware.device.name(), capabilities, 1 << capabilities.page_shift())
}

/// Requests I/O queues (NVMe Base 1.4 §5.21.1.7). Returns how many pairs there are.
fn request_queues(device: &Device, admin: &mut Admin, wanted: u16) -> Result<u16> {
    let last = u32::from(wanted - 1);
    let command = Command::new(admin::SET_FEATURES, 0)
        .dwords_10(feature::NUMBER_OF_QUEUES.into(), last << 16 | last);
    let operation = "request I/O queues of";
    let result = admin.execute(&AdminCommand { operation, command, with_data: false })?;
    let (submission, completion) = (result as u16, (result >> 16) as u16);
    // The counts are zero-based; the specification does not allow 65536.
    match submission.min(completion).checked_add(1) {
        Some(count) if submission.max(completion) != u16::MAX => Ok(count.min(wanted)),
        _ => Err(Error::new(ErrorKind::Malformed, operation, device.name()).with_reason(format!(
            "it has {submission:#x} and {completion:#x}, which are not counts of queues"
        ))),
    }
}

/// Reads the first `len` bytes of a log page. If the page is shorter, the rest is zero.
fn read_log(admin: &mut Admin, page: u8, len: usize) -> Result<[u8; PAGE]> {
    let words = (len.min(PAGE) / 4) as u32;
    let command =
        Command::new(admin::GET_LOG_PAGE, ALL).dwords_10((words - 1) << 16 | u32::from(page), 0);
    let operation = "read a log page of";
    admin.clear_data();
    admin.execute(&AdminCommand { operation, command, with_data: true })?;
    admin.data()
}
