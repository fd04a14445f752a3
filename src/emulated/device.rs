//! A model in this process, as a transport.

use std::fmt;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;

use super::bus::{AddressSpace, Bus, Target};
use super::irq::{Irq, may_be_eventfd};
use super::memory::Memory;
use super::model::{Activity, Model, Shape};
use super::model_cell::ModelCell;
use super::user::User;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::{self, fork};
use crate::transport::dma_error::map_refused;
use crate::transport::vfio_user::protocol::dma::Rights;
use crate::transport::{
    AddressSpaceId, DeviceInfo, DmaLimits, IrqInfo, RegionFile, RegionInfo, Transport, region_index,
};

/// How often the thread of a watching model polls before it sleeps, and its longest sleep.
const EAGER: u32 = 64;
const NAP: Duration = Duration::from_millis(1);
/// Most vectors of an interrupt (PCIe 5.0 §7.7.2.2).
const MAX_VECTORS: u32 = 2048;

/// The offset of the command register in configuration space, and its bit for bus mastering (PCI 3.0 §6.2.2).
const COMMAND: u64 = 0x04;
const BUS_MASTER: u16 = 1 << 2;

/// A [`Model`] in this process. Clones are the same device.
///
/// It is as strict as hardware about bus mastering: see [`Bus`]. It is more lenient about memory decoding: BARs
/// can be accessed while it is off, through windows and by calls. On real devices such an access raises SIGBUS,
/// or fails with EIO.
#[derive(Clone)]
pub struct Emulated {
    pub(super) core: Arc<Core>,
    /// Ends the model's thread when the last clone is dropped.
    _worker: Arc<Worker>,
}

/// The state that the device's users and its thread share.
pub(super) struct Core {
    info: DeviceInfo,
    regions: Box<[RegionInfo]>,
    pub(super) bus: Bus,
    model: ModelCell,
    /// The program that it is in.
    user: Arc<User>,
    stop: AtomicBool,
}

struct Worker {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
    generation: u32,
}

impl Emulated {
    /// Resets a model and starts its thread.
    ///
    /// # Errors
    /// `Os` if the kernel has no memory or no thread left; `OutOfRange` if a mapped part leaves its region, or
    /// an interrupt has more than 2048 vectors; `InvalidInput` if the name has a NUL; `Gone` if the model's
    /// reset panics.
    pub fn new(model: impl Model + 'static) -> Result<Self> {
        Self::with_thread(Core::new(model, AddressSpace::new())?)
    }

    /// As [`new`](Self::new), in the address space of this device: both reach the memory that is mapped for either,
    /// at the same addresses, including memory that clients of a vfio-user server have mapped.
    ///
    /// An address that one has mapped is taken for the other, also if clients do not know of each other: theirs fails
    /// with EEXIST. While a client is asked for memory that it has passed without a file, the other device's DMA
    /// waits, at most for the time limit of a reply ([`ClientLimits::time`](super::ClientLimits::time)).
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use vfio_remap::Device;
    /// # use vfio_remap::emulated::{Edu, Emulated};
    /// let first = Emulated::new(Edu::new())?;
    /// let second = first.beside(Edu::new())?;
    /// let [first, second] = [first, second].map(|model| Device::new(Arc::new(model)));
    /// let buffer = first.dma()?.buffer(4096)?;
    /// assert_eq!(buffer.address_space(), second.dma()?.address_space());
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn beside(&self, model: impl Model + 'static) -> Result<Self> {
        Self::with_thread(Core::new(model, self.core.bus.address_space().clone())?)
    }

    fn with_thread(core: Arc<Core>) -> Result<Self> {
        let thread = thread::Builder::new().name(core.info.name.clone());
        let thread = thread
            .spawn({
                let core = core.clone();
                move || core.work()
            })
            .map_err(|error| Error::io(&error, "start a thread for", &core.info.name))?;
        core.bus.set_worker(thread.thread().clone());
        Ok(Self::with_worker(core, Some(thread)))
    }

    /// Resets a model, without a thread: [`poll`](Self::poll) does its work. For measurements and tests that
    /// must not be disturbed by a thread.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn polled(model: impl Model + 'static) -> Result<Self> {
        Ok(Self::with_worker(Core::new(model, AddressSpace::new())?, None))
    }

    /// As [`polled`](Self::polled), in the address space of this device: see [`beside`](Self::beside).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn polled_beside(&self, model: impl Model + 'static) -> Result<Self> {
        let core = Core::new(model, self.core.bus.address_space().clone())?;
        Ok(Self::with_worker(core, None))
    }

    fn with_worker(core: Arc<Core>, thread: Option<JoinHandle<()>>) -> Self {
        let generation = fork::generation();
        let worker = Arc::new(Worker { core: core.clone(), thread, generation });
        Self { core, _worker: worker }
    }

    /// Calls [`Model::poll`] in this thread, whether or not the model has a thread.
    ///
    /// # Errors
    /// `Gone` if the model panics or has panicked; `InUse` if it calls its own device.
    pub fn poll(&self) -> Result<Activity> {
        self.core.poll()
    }
}

/// Checks what no device can have.
fn check(shape: &Shape) -> Result<()> {
    let error = |kind, reason: String| {
        Err(Error::new(kind, "create", format!("the device {:?}", shape.name)).with_reason(reason))
    };
    if shape.name.contains('\0') {
        return error(ErrorKind::InvalidInput, "its name has a NUL".to_owned());
    }
    if let Some(irq) = shape.irqs.iter().find(|irq| irq.count > MAX_VECTORS) {
        let reason = format!("{} vectors are more than the {MAX_VECTORS} of MSI-X", irq.count);
        return error(ErrorKind::OutOfRange, reason);
    }
    Ok(())
}

fn check_areas(region: &RegionInfo) -> bool {
    region.areas.iter().flatten().all(|area| area.start < area.end && area.end <= region.size)
}

impl Core {
    fn new(model: impl Model + 'static, space: AddressSpace) -> Result<Arc<Self>> {
        let shape = model.shape();
        check(&shape)?;
        let info = DeviceInfo {
            name: format!("emulated:{}", shape.name),
            pci: shape.pci,
            resettable: true,
            reset_at_open: false,
            region_count: shape.regions.len() as u32,
            irq_count: shape.irqs.len() as u32,
        };
        let memories = shape.regions.iter().enumerate().map(|(index, region)| {
            check_areas(region).then_some(()).ok_or_else(|| {
                Error::new(ErrorKind::OutOfRange, "create", info.region_name(index as u32))
                    .with_reason("a mapped part lies outside the region")
            })?;
            // A region of size 0 does not exist.
            let memory = region.mappable && region.size > 0;
            memory.then(|| Memory::new(region.size)).transpose()
        });
        let memories = memories.collect::<Result<_>>()?;
        let irqs = shape.irqs.into_iter().map(Irq::new).collect();
        let core = Arc::new(Core {
            bus: Bus::new(info.name.clone(), memories, irqs, space),
            info,
            regions: shape.regions.into(),
            model: ModelCell::new(model),
            user: User::new(0),
            stop: AtomicBool::new(false),
        });
        core.reset()?;
        Ok(core)
    }

    /// Calls the model.
    fn call<R>(
        &self,
        operation: &'static str,
        object: impl fmt::Display,
        act: impl FnOnce(&mut dyn Model, &Bus) -> R,
    ) -> Result<R> {
        self.model
            .call(|model| act(model, &self.bus))
            .map_err(|error| error.error(operation, object))
    }

    fn poll(&self) -> Result<Activity> {
        self.call("poll", &self.info.name, |model, bus| model.poll(bus))
    }

    fn reset(&self) -> Result<()> {
        self.call("reset", &self.info.name, |model, bus| {
            bus.set_bus_mastering(!self.has_command_register());
            model.reset(bus);
        })
    }

    /// Whether the device has a command register, which the model serves.
    fn has_command_register(&self) -> bool {
        let config = self.regions.get(region_index::CONFIG as usize);
        self.info.pci && config.is_some_and(|config| config.size >= COMMAND + 2 && !config.mappable)
    }

    /// Writes a part of a region that the model serves.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let is_command = region == region_index::CONFIG
            && offset < COMMAND + 2
            && offset + data.len() as u64 > COMMAND
            && self.has_command_register();
        self.access(region, "write", |model, bus| {
            model.write(bus, region, offset, data)?;
            if is_command {
                let mut command = [0; 2];
                model.read(bus, region_index::CONFIG, COMMAND, &mut command)?;
                bus.set_bus_mastering(u16::from_le_bytes(command) & BUS_MASTER != 0);
            }
            Ok(())
        })
    }

    /// Tells the model that a client has left.
    pub(super) fn client_left(&self) {
        let told = self.call("leave", &self.info.name, |model, bus| model.client_left(bus));
        if let Err(error) = told {
            log::debug!("{error}");
        }
    }

    /// `Gone` if the model has panicked.
    fn check(&self, operation: &'static str, object: impl fmt::Display) -> Result<()> {
        self.model.check().map_err(|error| error.error(operation, object))
    }

    /// Polls the model, as often as it wants, until the device is dropped.
    fn work(&self) {
        let mut idle = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let activity = match self.poll() {
                Ok(activity) => activity,
                Err(error) => return log::error!("{error}"),
            };
            match activity {
                Activity::Busy => idle = 0,
                Activity::Watching if idle < EAGER => {
                    idle += 1;
                    thread::yield_now();
                }
                Activity::Watching => {
                    idle = idle.saturating_add(1);
                    // Each sleep is twice as long as the last.
                    let nap = Duration::from_micros(16 << (idle - EAGER).min(6));
                    thread::park_timeout(nap.min(NAP));
                }
                Activity::Asleep => thread::park(),
            }
        }
    }

    fn find(&self, index: u32, operation: &'static str) -> Result<&RegionInfo> {
        let region = self.regions.get(index as usize).filter(|region| region.size > 0);
        region.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, operation, self.info.region_name(index))
                .with_reason("the device has no such region")
        })
    }

    /// The memory of an access; `None` if the model serves it.
    fn locate(
        &self,
        index: u32,
        offset: u64,
        len: usize,
        operation: &'static str,
    ) -> Result<Option<&Memory>> {
        let region = self.find(index, operation)?;
        let object = || self.info.region_name(index);
        let end = offset.checked_add(len as u64).filter(|&end| end <= region.size);
        let end = end.ok_or_else(|| {
            let reason =
                format!("{len} bytes at {offset:#x} leave the region of {:#x} bytes", region.size);
            Error::new(ErrorKind::OutOfRange, operation, object()).with_reason(reason)
        })?;
        if operation == "write" && !region.writable {
            return Err(Error::new(ErrorKind::ReadOnly, operation, object()));
        }
        // The memory could still be accessed, but no model looks at it.
        self.check(operation, RegionName(&self.info, index))?;
        let mapped = match &region.areas {
            Some(areas) => areas.iter().any(|area| area.start <= offset && end <= area.end),
            None => true,
        };
        Ok(self.bus.memory(index).filter(|_| mapped))
    }

    /// An access to a part of a region that the model serves.
    fn access(
        &self,
        region: u32,
        operation: &'static str,
        act: impl FnOnce(&mut dyn Model, &Bus) -> Result<()>,
    ) -> Result<()> {
        self.call(operation, RegionName(&self.info, region), act)?
    }

    pub(super) fn irq_error(&self, errno: Errno, operation: &'static str, index: u32) -> Error {
        let object = format!("interrupt {index} of {}", self.info.name);
        let (kind, reason) = match errno {
            Errno::EINVAL => {
                (ErrorKind::OutOfRange, "it has no such vectors, or a file is not an eventfd")
            }
            _ => (ErrorKind::NotFound, "the device has no such interrupt"),
        };
        Error::new(kind, operation, object).with_reason(reason)
    }

    /// Calls `f` with an interrupt. ENOENT if there is none at this index.
    pub(super) fn with_irq<R>(
        &self,
        index: u32,
        operation: &'static str,
        f: impl FnOnce(&mut Irq) -> std::result::Result<R, Errno>,
    ) -> Result<R> {
        let mut irqs = self.bus.irqs();
        irqs.get_mut(index as usize)
            .ok_or(Errno::ENOENT)
            .and_then(f)
            .map_err(|errno| self.irq_error(errno, operation, index))
    }

    /// Disconnects the vectors that a user has connected.
    pub(super) fn disconnect(&self, user: &Arc<User>, index: u32) -> Result<()> {
        self.with_irq(index, "disconnect", |irq| {
            irq.disconnect_user(user);
            Ok(())
        })
    }

    /// Connects a user's files, which [may be eventfds](may_be_eventfd).
    pub(super) fn connect(
        &self,
        user: &Arc<User>,
        index: u32,
        start: u32,
        fds: Vec<Option<OwnedFd>>,
    ) -> Result<()> {
        self.check("connect", format_args!("interrupt {index} of {}", self.info.name))?;
        let mut fds = fds.into_iter().map(|fd| fd.map(Arc::new)).collect::<Vec<_>>();
        let displaced = self.with_irq(index, "connect", |irq| irq.connect(user, start, &mut fds));
        displaced.map(drop)
    }
}

impl Transport for Emulated {
    fn info(&self) -> DeviceInfo {
        self.core.info.clone()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.core.find(index, "find").cloned()
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        match self.core.locate(region, offset, data.len(), "read")? {
            Some(memory) => memory.load(offset, data),
            None => {
                self.core.access(region, "read", |model, bus| model.read(bus, region, offset, data))
            }
        }
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        match self.core.locate(region, offset, data.len(), "write")? {
            Some(memory) => memory.store(offset, data),
            None => self.core.write(region, offset, data),
        }
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        self.core.find(region, "map")?;
        let memory = self.core.bus.memory(region).ok_or_else(|| {
            Error::new(ErrorKind::NotMappable, "map", self.core.info.region_name(region))
                .with_reason("the model traps all of it")
        })?;
        memory.file()
    }

    fn reset(&self) -> Result<()> {
        self.core.reset()
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.core.with_irq(index, "query", |irq| Ok(irq.info()))
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        if fds.is_empty() {
            return self.core.disconnect(&self.core.user, index);
        }
        let own = |fd: &Option<BorrowedFd<'_>>| fd.map(|fd| fd.try_clone_to_owned()).transpose();
        let fds = fds.iter().map(own).collect::<std::io::Result<Vec<_>>>().map_err(|error| {
            Error::io(&error, "connect", format!("interrupt {index} of {}", self.core.info.name))
        })?;
        if fds.iter().flatten().any(|fd| !may_be_eventfd(fd)) {
            return Err(self.core.irq_error(Errno::EINVAL, "connect", index));
        }
        self.core.connect(&self.core.user, index, start, fds)
    }

    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        let what = if masked { "mask" } else { "unmask" };
        self.core.with_irq(index, what, |irq| irq.mask(vectors, masked))
    }

    fn trigger_irqs(&self, index: u32, vectors: Range<u32>) -> Result<()> {
        self.core.with_irq(index, "trigger", |irq| irq.fire(vectors))
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        let available_mappings = Some(self.core.user.available_mappings());
        let page_size = sys::page_size() as u64;
        let limits = DmaLimits::new(vec![0..=u64::MAX], page_size);
        // The model accesses memory of this process by its address.
        Ok(DmaLimits { available_mappings, by_file: false, ..limits })
    }

    fn address_space(&self) -> Option<AddressSpaceId> {
        Some(self.core.bus.address_space().id())
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        let size = memory.size() as u64;
        let object = || format!("{size:#x} bytes at IOVA {iova:#x} of {}", self.core.info.name);
        self.core.check("map for DMA", object())?;
        let target = Target::Here(memory.clone());
        self.core
            .bus
            .map(&self.core.user, iova, size, Rights::from(access), target)
            .map_err(|errno| map_refused(errno, object()))
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        self.core.bus.unmap(&self.core.user, iova, size).map_err(|errno| {
            let name = &self.core.info.name;
            Error::os(errno, "unmap", format!("{size:#x} bytes at IOVA {iova:#x} of {name}"))
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let thread = self.thread.take();
        if self.generation != fork::generation() {
            // The thread does not exist in a child of fork(2), and may have held any lock.
            return std::mem::forget(thread);
        }
        if let Some(thread) = thread {
            self.core.stop.store(true, Ordering::Relaxed);
            thread.thread().unpark();
            // The model itself may have held the last clone: then this is the model's thread, which ends by
            // itself.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                log::error!("the thread of {} has panicked", self.core.info.name);
            }
        }
        // Other devices in the address space would go on reaching what this program has left mapped.
        self.core.bus.unmap_all(&self.core.user);
    }
}

/// The name of a region, formatted only for an error.
struct RegionName<'a>(&'a DeviceInfo, u32);

impl fmt::Display for RegionName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.region_name(self.1))
    }
}

impl fmt::Debug for Emulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Emulated({})", self.core.info.name)
    }
}
