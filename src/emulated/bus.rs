//! What a model can access: its mapped memory, the driver's memory, and interrupts.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;

use nix::errno::Errno;

use super::irq::Irq;
use super::memory::Memory;
use super::server::wire::Wire;
use super::user::{Cost, User};
use crate::error::{Error, ErrorKind, Result};
use crate::space::DmaMemory;
use crate::transport::vfio_user::protocol::dma::{self, DmaTable, Piece, Rights};
use crate::transport::{AddressSpaceId, irq_index};

/// A model's access to the rest of the machine.
///
/// While bus mastering is off, a PCI device cannot access memory, and its MSI and MSI-X are lost. Off is the
/// state after a reset. The Bus reads the bit from the command register of the model's configuration space
/// whenever that is written.
pub struct Bus {
    name: String,
    /// Always on for a device that has no command register.
    bus_mastering: AtomicBool,
    memories: Box<[Option<Memory>]>,
    irqs: Mutex<Box<[Irq]>>,
    space: AddressSpace,
    worker: OnceLock<Thread>,
}

/// An address space for DMA. Clones are the same one.
#[derive(Clone)]
pub(super) struct AddressSpace {
    id: AddressSpaceId,
    mappings: Arc<Mutex<DmaTable<Mapping>>>,
}

impl AddressSpace {
    pub(super) fn new() -> Self {
        // Each user has a limit of its own.
        let mappings = Arc::new(Mutex::new(DmaTable::new(u32::MAX)));
        Self { id: AddressSpaceId::unique(), mappings }
    }

    pub(super) fn id(&self) -> AddressSpaceId {
        self.id
    }
}

/// Memory that a user has mapped for DMA.
#[derive(Clone)]
struct Mapping {
    user: Arc<User>,
    target: Target,
}

/// The place of mapped memory.
#[derive(Clone)]
pub(super) enum Target {
    /// In this process.
    Here(DmaMemory),
    /// In a file of a client, which is read and written, not mapped.
    File(Arc<File>, u64),
    /// In a file of a client that is mapped here, with the size of that mapping in bytes. The client may truncate
    /// the file at any time, so only the kernel accesses it.
    Mapped(DmaMemory, u64),
    /// In a client that has to be asked by messages, at this address.
    Client(Arc<Wire>, u64),
}

impl Bus {
    pub(super) fn new(
        name: String,
        memories: Box<[Option<Memory>]>,
        irqs: Box<[Irq]>,
        space: AddressSpace,
    ) -> Self {
        Self {
            name,
            bus_mastering: AtomicBool::new(true),
            memories,
            irqs: Mutex::new(irqs),
            space,
            worker: OnceLock::new(),
        }
    }

    /// The memory of a region; `None` if no part of it is mapped.
    pub fn memory(&self, region: u32) -> Option<&Memory> {
        self.memories.get(region as usize)?.as_ref()
    }

    /// Reads DMA memory of the driver: `data.len()` bytes at the IOVA `address`.
    ///
    /// # Errors
    /// `PermissionDenied` if bus mastering is off; `OutOfRange` if a part of it is not mapped, or not for
    /// reading; the error of a client that has the memory.
    pub fn dma_read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.check_bus_mastering("read", address, data.len())?;
        // Locked while copying, so that memory is not accessed after the driver unmapped it. A client is asked under
        // the lock, too: once it has the answer that its memory is unmapped, it may map other memory there.
        let table = self.dma();
        // One deadline for all messages to a client, because others wait for the table.
        let mut deadline = None;
        let failed = |errno| self.dma_error(errno, "read", address, data.len());
        for piece in table.find(address, data.len(), Rights::READ).map_err(failed)? {
            let Piece { target: Mapping { target, .. }, offset, range } = piece;
            let part = &mut data[range.clone()];
            let done = match target {
                Target::Here(memory) | Target::Mapped(memory, _) => {
                    dma::read(&memory, offset, part)
                }
                Target::File(file, start) => of(file.read_exact_at(part, start + offset)),
                Target::Client(wire, start) => {
                    let deadline = deadline.get_or_insert_with(|| wire.deadline());
                    wire.dma_read(start + offset, part, deadline)
                }
            };
            done.map_err(|errno| {
                self.dma_error(errno, "read", address + range.start as u64, range.len())
            })?;
        }
        Ok(())
    }

    /// Writes DMA memory of the driver: `data` at the IOVA `address`.
    ///
    /// # Errors
    /// As [`dma_read`](Self::dma_read). After an error, the first bytes may be written.
    pub fn dma_write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.check_bus_mastering("write", address, data.len())?;
        let table = self.dma();
        let mut deadline = None;
        let failed = |errno| self.dma_error(errno, "write", address, data.len());
        for piece in table.find(address, data.len(), Rights::WRITE).map_err(failed)? {
            let Piece { target: Mapping { target, .. }, offset, range } = piece;
            let part = &data[range];
            match target {
                Target::Here(memory) | Target::Mapped(memory, _) => {
                    dma::write(&memory, offset, part)
                }
                Target::File(file, start) => of(file.write_all_at(part, start + offset)),
                Target::Client(wire, start) => {
                    let deadline = deadline.get_or_insert_with(|| wire.deadline());
                    wire.dma_write(start + offset, part, deadline)
                }
            }
            .map_err(failed)?;
        }
        Ok(())
    }

    /// Whether the driver has mapped `len` bytes at `address` for writing.
    pub(super) fn can_write(&self, address: u64, len: usize) -> bool {
        self.dma().find(address, len, Rights::WRITE).is_ok()
    }

    /// Fires a vector, as a message-signalled interrupt does. A vector that does not exist or is not connected
    /// is ignored, and so are MSI and MSI-X while bus mastering is off. A masked vector fires when it is
    /// unmasked.
    pub fn fire(&self, index: u32, vector: u32) {
        let is_message = [irq_index::MSI, irq_index::MSIX].contains(&index);
        if is_message && !self.bus_mastering.load(Ordering::Relaxed) {
            return;
        }
        if let (Some(irq), Some(end)) = (self.irqs().get_mut(index as usize), vector.checked_add(1))
        {
            // The error means that the vector does not exist.
            let _ = irq.fire(vector..end);
        }
    }

    /// Asserts or deasserts a level-triggered interrupt with one vector.
    pub fn set_level(&self, index: u32, asserted: bool) {
        if let Some(irq) = self.irqs().get_mut(index as usize) {
            // The error means that the interrupt has no vector.
            let _ = irq.set_level(0, asserted);
        }
    }

    /// Whether the driver has connected any vector of an interrupt. VFIO enables MSI and MSI-X when vectors are
    /// connected.
    pub fn is_connected(&self, index: u32) -> bool {
        self.irqs().get(index as usize).is_some_and(Irq::is_connected)
    }

    /// Makes the device's thread call [`Model::poll`](super::Model::poll) soon.
    pub fn wake(&self) {
        if let Some(thread) = self.worker.get() {
            thread.unpark();
        }
    }

    pub(super) fn set_bus_mastering(&self, on: bool) {
        self.bus_mastering.store(on, Ordering::Relaxed);
    }

    fn check_bus_mastering(&self, operation: &'static str, address: u64, len: usize) -> Result<()> {
        if self.bus_mastering.load(Ordering::Relaxed) {
            return Ok(());
        }
        let object = format!("{len} bytes at IOVA {address:#x} for {}", self.name);
        Err(Error::new(ErrorKind::PermissionDenied, operation, object)
            .with_reason("bus mastering is off")
            .with_advice("enable it in the driver: Config::set_bus_mastering"))
    }

    /// The device's own thread, if it has one.
    pub(super) fn worker(&self) -> Option<&Thread> {
        self.worker.get()
    }

    pub(super) fn set_worker(&self, thread: Thread) {
        self.worker.get_or_init(|| thread);
    }

    pub(super) fn irqs(&self) -> MutexGuard<'_, Box<[Irq]>> {
        self.irqs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn dma(&self) -> MutexGuard<'_, DmaTable<Mapping>> {
        self.space.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps memory of a user for DMA. EINVAL if the range is empty or wraps around, EEXIST if it overlaps a
    /// mapping of any user; ENOSPC, EMFILE or ENOMEM past the user's limits.
    pub(super) fn map(
        &self,
        user: &Arc<User>,
        iova: u64,
        size: u64,
        rights: Rights,
        target: Target,
    ) -> std::result::Result<(), Errno> {
        let mut table = self.dma();
        let cost = target.cost();
        user.add_mapping(cost)?;
        let mapping = Mapping { user: user.clone(), target };
        table.insert(iova, size, rights, mapping).inspect_err(|_| user.remove_mapping(cost))
    }

    /// Unmaps memory of a user. ENOENT if the user has no mapping of exactly this range.
    pub(super) fn unmap(
        &self,
        user: &Arc<User>,
        iova: u64,
        size: u64,
    ) -> std::result::Result<(), Errno> {
        let theirs = |mapping: &Mapping| Arc::ptr_eq(&mapping.user, user);
        let removed = self.dma().remove_if(iova, size, theirs)?;
        user.remove_mapping(removed.target.cost());
        Ok(())
    }

    /// Unmaps all memory of a user.
    pub(super) fn unmap_all(&self, user: &Arc<User>) {
        // Dropped without the lock: memory may be the last to hold another device in this address space.
        let mut removed = Vec::new();
        self.dma().retain(|mapping| {
            let theirs = Arc::ptr_eq(&mapping.user, user);
            if theirs {
                user.remove_mapping(mapping.target.cost());
                removed.push(mapping.clone());
            }
            !theirs
        });
    }

    /// Disconnects the eventfds and unmaps the memory of a user that has left.
    pub(super) fn detach(&self, user: &Arc<User>) {
        self.irqs().iter_mut().for_each(|irq| irq.disconnect_user(user));
        self.unmap_all(user);
    }

    fn dma_error(&self, errno: Errno, operation: &'static str, address: u64, len: usize) -> Error {
        let object = format!("{len} bytes at IOVA {address:#x} for {}", self.name);
        let reason = match errno {
            Errno::EFAULT => "not all of it is mapped for DMA",
            Errno::EACCES => "it is not mapped for this access",
            _ => return Error::os(errno, operation, object),
        };
        Error::new(ErrorKind::OutOfRange, operation, object).with_reason(reason)
    }
}

impl Target {
    fn cost(&self) -> Cost {
        match self {
            Self::Here(_) | Self::Client(..) => Cost::default(),
            Self::File(..) => Cost { files: 1, mapped: 0 },
            Self::Mapped(_, bytes) => Cost { files: 1, mapped: *bytes },
        }
    }
}

/// EFAULT if the file ends too early: the memory does not exist.
fn of(done: std::io::Result<()>) -> std::result::Result<(), Errno> {
    done.map_err(|error| error.raw_os_error().map_or(Errno::EFAULT, Errno::from_raw))
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bus({})", self.name)
    }
}
