//! The client: a transport over a vfio-user socket.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_NONE,
};

use super::connection::{Connection, Request};
use super::interrupts::Interrupts;
use super::limits::TimeLimits;
use super::protocol::dma::Rights;
use super::protocol::version::{Capabilities, MAX_DMA_MAPS};
use super::protocol::wire::{self, DmaMap, DmaUnmap, IrqSet, RegionAccess, command};
use super::regions::{Region, read_region};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, DmaMemory};
use crate::sys::{file, fork};
use crate::transport::dma_error::{map_refused, unstated_limit};
use crate::transport::{DeviceInfo, DmaLimits, IrqInfo, RegionFile, RegionInfo, Transport};

/// More regions or interrupts than any device has.
const MAX_INDEXES: u32 = 1024;
/// The smallest limit on mappings that a server is expected to have without stating it: that of libvfio-user,
/// unless it is built with another.
const FEWEST_MAPPINGS: u32 = 16;

/// A device that a vfio-user server emulates: SPDK, libvfio-user, our own
/// [`Server`](crate::emulated::Server), or any other that speaks version 0.1 of the protocol.
///
/// The server is not trusted. Each exchange with it has one time limit for all that happens in it, however
/// many messages the server sends meanwhile: [`TimeLimits`]. An answer that does not come in time is `TimedOut`,
/// and so is, at once, whatever is asked before it has come. What breaks the protocol ends the connection, and
/// whatever is asked afterwards is `Gone`. Exchanges go one at a time: one that waits for others waits as long as
/// they may take, each. A register access and a call that sets something up are one exchange, or a few; longer
/// reads and writes are one for each `max_data_xfer_size` of the server, and vectors one for as many as it takes
/// descriptors with a message. Waiting for an interrupt depends on nothing that a server can do to the eventfd
/// that it was sent.
///
/// A region is mapped if the server sends a file of shared memory for it, or one on a disk; messages reach the
/// rest. What a server can do is to shrink the file behind a window, or to leave no room on the disk for it: an
/// access there raises SIGBUS.
///
/// What vfio-pci does in the kernel, the client does: INTx is disabled while it is not connected, the
/// capability of MSI or MSI-X is enabled while vectors are, and BARs without an address are given one before
/// they are decoded ([`Config::set_memory_decoding`](crate::device::Config::set_memory_decoding)).
///
/// The connection belongs to the process that made it: in a child of `fork(2)` it must not be used, and
/// dropping it there leaves it as it is.
///
/// Memory that is mapped for DMA and is a file's is shared with the server whole and for writing,
/// whatever part of it and access the mapping is for; other memory is copied to and fro by messages. A thread
/// answers a server that asks for either.
///
/// ```no_run
/// use std::sync::Arc;
/// use vfio_remap::{Device, transport::VfioUser};
///
/// let device = Device::new(Arc::new(VfioUser::connect("/run/edu.sock")?));
/// println!("{} has {} regions", device.name(), device.info().region_count);
/// # Ok::<(), vfio_remap::Error>(())
/// ```
pub struct VfioUser {
    pub(super) connection: Arc<Connection>,
    pub(super) capabilities: Capabilities,
    pub(super) info: DeviceInfo,
    regions: Vec<Option<Region>>,
    pub(super) interrupts: Mutex<Interrupts>,
    /// Serves the server's own commands, once memory is mapped for DMA.
    listener: Mutex<Option<JoinHandle<()>>>,
    generation: u32,
}

impl VfioUser {
    /// Connects to the server that listens at `path`, which may take as long as [`TimeLimits::default`].
    ///
    /// Interrupts that an earlier user has left enabled are disabled: INTx by Interrupt Disable in the command
    /// register, MSI and MSI-X in their capabilities. Setting up vectors enables them again.
    ///
    /// # Errors
    /// `NotFound`; `PermissionDenied`; `Gone` if the server closes the connection, `TimedOut` if it is silent;
    /// `Malformed` if what it says breaks the protocol, or it speaks another version.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_within(path, TimeLimits::default())
    }

    /// Connects to a server that may take this long for its answers: [`TimeLimits`], or a [`Duration`] for each.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_within(path: impl AsRef<Path>, limits: impl Into<TimeLimits>) -> Result<Self> {
        let (path, limits) = (path.as_ref(), limits.into());
        let name = format!("vfio-user:{}", path.display());
        let stream = open(path, limits.answer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Error::new(ErrorKind::TimedOut, "connect to", &name)
                .with_reason("its server accepts no connection, and others wait, too"),
            _ => Error::io(&error, "connect to", &name)
                .with_advice("start its server, or check the path on which it listens"),
        })?;
        Self::new(stream, name, limits)
    }

    /// Takes over a socket that is connected to a server, as [`connect_within`](Self::connect_within) connects.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn from_stream(stream: UnixStream, limits: impl Into<TimeLimits>) -> Result<Self> {
        let name = format!("vfio-user:fd/{}", stream.as_raw_fd());
        Self::new(stream, name, limits.into())
    }

    fn new(stream: UnixStream, name: String, limits: TimeLimits) -> Result<Self> {
        let limits = limits.within_reason();
        let connection = Arc::new(Connection::new(stream, name.clone(), limits)?);
        let capabilities = connection.negotiate()?;
        let ask = wire::DeviceInfo { argsz: wire::DeviceInfo::SIZE as u32, ..Default::default() };
        let request = Request {
            command: command::DEVICE_GET_INFO,
            body: [&ask.encode(), &[]],
            reply: wire::DeviceInfo::SIZE,
            ..Request::default()
        };
        let reply = connection.exchange(request, "query", &name)?;
        let (answer, _) = wire::DeviceInfo::decode(&reply.body).unwrap_or_default();
        if answer.regions > MAX_INDEXES || answer.irqs > MAX_INDEXES {
            let reason =
                format!("it claims {} regions, {} interrupts", answer.regions, answer.irqs);
            return Err(connection.malformed(reason, "query", &name));
        }
        let info = DeviceInfo {
            name,
            pci: answer.flags & VFIO_DEVICE_FLAGS_PCI != 0,
            resettable: answer.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            reset_at_open: false,
            region_count: answer.regions,
            irq_count: answer.irqs,
        };
        let regions = (0..answer.regions)
            .map(|index| read_region(&connection, index, &info.region_name(index)))
            .collect::<Result<_>>()?;
        let generation = fork::generation();
        let (interrupts, listener) = (Mutex::default(), Mutex::new(None));
        let client =
            Self { connection, capabilities, info, regions, interrupts, listener, generation };
        client.quiet_interrupts()?;
        Ok(client)
    }

    fn find(&self, index: u32, operation: &'static str) -> Result<&Region> {
        self.regions.get(index as usize).and_then(Option::as_ref).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, operation, self.info.region_name(index))
                .with_reason("the device has no such region")
        })
    }

    fn check(&self, index: u32, offset: u64, len: usize, operation: &'static str) -> Result<()> {
        let size = self.find(index, operation)?.info.size;
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, operation, self.info.region_name(index))
                .with_reason(format!("{len} bytes at {offset:#x} leave its {size:#x} bytes"))),
        }
    }

    /// One access to a region, of no more data than a message may carry; the body of the reply.
    fn access(
        &self,
        command: u16,
        access: RegionAccess,
        written: &[u8],
        operation: &'static str,
    ) -> Result<Vec<u8>> {
        let fields = access.encode();
        let read = if command == command::REGION_READ { access.count as usize } else { 0 };
        let request = Request {
            command,
            body: [&fields, written],
            reply: RegionAccess::SIZE + read,
            ..Request::default()
        };
        let name = RegionName(&self.info, access.region);
        let reply = self.connection.exchange(request, operation, &name)?;
        let echo = RegionAccess::decode(&reply.body).unwrap_or_default().0;
        if echo != access || reply.body.len() != RegionAccess::SIZE + read {
            let reason = format!(
                "the server answered for {} bytes at {:#x} of region {} with {} of data",
                echo.count,
                echo.offset,
                echo.region,
                reply.body.len() - RegionAccess::SIZE
            );
            return Err(self.connection.malformed(reason, operation, name));
        }
        Ok(reply.body)
    }

    /// The body of the reply to a command, which is `reply` bytes long at least.
    pub(super) fn tell(
        &self,
        command: u16,
        body: &[u8],
        reply: usize,
        operation: &'static str,
        object: impl fmt::Display,
    ) -> Result<Vec<u8>> {
        let request = Request { command, body: [body, &[]], reply, ..Request::default() };
        Ok(self.connection.exchange(request, operation, object)?.body)
    }

    pub(super) fn set(
        &self,
        set: IrqSet,
        fds: &[BorrowedFd<'_>],
        operation: &'static str,
    ) -> Result<()> {
        let set = IrqSet { argsz: IrqSet::SIZE as u32, ..set };
        let request = Request {
            command: command::DEVICE_SET_IRQS,
            body: [&set.encode(), &[]],
            fds,
            ..Request::default()
        };
        self.connection.exchange(request, operation, self.irq_name(set.index)).map(drop)
    }

    pub(super) fn irq_name(&self, index: u32) -> String {
        format!("interrupt {index} of {}", self.info.name)
    }

    pub(super) fn check_irq(
        &self,
        index: u32,
        vectors: &Range<u32>,
        operation: &'static str,
    ) -> Result<IrqInfo> {
        let info = self.irq(index)?;
        if vectors.start <= vectors.end && vectors.end <= info.count {
            return Ok(info);
        }
        let object = self.irq_name(index);
        Err(Error::new(ErrorKind::OutOfRange, operation, object).with_reason(format!(
            "vectors {}..{} leave its {}",
            vectors.start, vectors.end, info.count
        )))
    }

    fn act(&self, index: u32, vectors: Range<u32>, action: u32, what: &'static str) -> Result<()> {
        self.check_irq(index, &vectors, what)?;
        if vectors.is_empty() {
            return Ok(());
        }
        let flags = VFIO_IRQ_SET_DATA_NONE | action;
        let (start, count) = (vectors.start, vectors.end - vectors.start);
        self.set(IrqSet { argsz: 0, flags, index, start, count }, &[], what)
    }

    /// The error of a mapping that the server refused with EINVAL: `TooManyMappings` if that may be the reason.
    #[cold]
    fn refused_as_invalid(&self, error: Error) -> Error {
        let stated = self.capabilities.dma_maps;
        let mapped = stated.saturating_sub(self.connection.memory().room());
        match (stated, mapped) {
            (MAX_DMA_MAPS, FEWEST_MAPPINGS..) => unstated_limit(error, mapped),
            _ => error,
        }
    }

    fn listen(&self) -> Result<()> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if listener.is_none() {
            let connection = self.connection.clone();
            let thread = thread::Builder::new().name("vfio-user dma".to_owned());
            let thread = thread.spawn(move || connection.listen());
            *listener = Some(thread.map_err(|error| Error::io(&error, "serve", &self.info.name))?);
        }
        Ok(())
    }
}

/// Connects within a time limit, even if the server does not accept connections.
fn open(path: &Path, time: Duration) -> io::Result<UnixStream> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let stream = UnixStream::from(fd);
    stream.set_write_timeout(Some(time.max(Duration::from_millis(1))))?;
    let address = UnixAddr::new(path)?;
    let end = Instant::now().checked_add(time);
    loop {
        match connect(stream.as_raw_fd(), &address) {
            // The limit begins anew.
            Err(Errno::EINTR) if end.is_none_or(|end| Instant::now() < end) => {}
            Err(Errno::EINTR) => return Err(io::ErrorKind::WouldBlock.into()),
            result => return Ok(result.map(|()| stream)?),
        }
    }
}

/// Formatted only for an error.
struct RegionName<'a>(&'a DeviceInfo, u32);

impl fmt::Display for RegionName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.region_name(self.1))
    }
}

impl Transport for VfioUser {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        Ok(self.find(index, "find")?.info.clone())
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check(region, offset, data.len(), "read")?;
        let mut offset = offset;
        for part in data.chunks_mut(self.capabilities.transfer) {
            let access = RegionAccess { offset, region, count: part.len() as u32 };
            let reply = self.access(command::REGION_READ, access, &[], "read")?;
            part.copy_from_slice(&reply[RegionAccess::SIZE..]);
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.check(region, offset, data.len(), "write")?;
        let mut offset = offset;
        for part in data.chunks(self.capabilities.transfer) {
            let access = RegionAccess { offset, region, count: part.len() as u32 };
            self.access(command::REGION_WRITE, access, part, "write")?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        self.find(region, "map")?.file.clone().ok_or_else(|| {
            Error::new(ErrorKind::NotMappable, "map", self.info.region_name(region))
                .with_reason("the server sent no file for it")
        })
    }

    fn is_gone(&self) -> bool {
        self.connection.has_ended()
    }

    fn assign_addresses(&self) -> Result<()> {
        self.place_bars()
    }

    fn reset(&self) -> Result<()> {
        if !self.info.resettable {
            return Err(Error::new(ErrorKind::Unsupported, "reset", &self.info.name)
                .with_reason("the server does not support reset"));
        }
        self.tell(command::DEVICE_RESET, &[], 0, "reset", &self.info.name)?;
        self.restore_interrupts()
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.query_irq(index)
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        if fds.is_empty() {
            self.disconnect_irqs(index)
        } else {
            self.connect_irqs(index, start, fds)
        }
    }

    fn mask_irqs(&self, index: u32, vectors: Range<u32>, masked: bool) -> Result<()> {
        let (action, what) = match masked {
            true => (VFIO_IRQ_SET_ACTION_MASK, "mask"),
            false => (VFIO_IRQ_SET_ACTION_UNMASK, "unmask"),
        };
        self.act(index, vectors, action, what)
    }

    fn trigger_irqs(&self, index: u32, vectors: Range<u32>) -> Result<()> {
        self.act(index, vectors, VFIO_IRQ_SET_ACTION_TRIGGER, "trigger")
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        let available_mappings = Some(self.connection.memory().room());
        let page_size = self.capabilities.page_size;
        let by_file = self.capabilities.fds > 0;
        Ok(DmaLimits {
            available_mappings,
            by_file,
            ..DmaLimits::new(vec![0..=u64::MAX], page_size)
        })
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, access: Access) -> Result<()> {
        let size = memory.size() as u64;
        let object = || format!("{size:#x} bytes at I/O address {iova:#x} of {}", self.info.name);
        let rights = Rights::from(access);
        // Before the server is asked: it may use the memory before it answers.
        self.connection
            .memory()
            .insert(iova, size, rights, memory.clone())
            .map_err(|errno| map_refused(errno, object()))?;
        let file = memory.file().filter(|_| self.capabilities.fds > 0);
        let offset = file.map_or(0, |(_, offset)| offset);
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(|(fd, _)| *fd).collect();
        let map = DmaMap {
            argsz: DmaMap::SIZE as u32,
            flags: rights.flags(),
            offset,
            address: iova,
            size,
        };
        // A server reaches shared memory itself, and asks for the rest. It may ask for either at any time.
        if !fds.iter().any(file::is_tmpfs) {
            self.connection.unshared.store(true, Ordering::Relaxed);
        }
        if let Err(error) = self.listen() {
            // It was inserted above.
            let _ = self.connection.memory().remove(iova, size);
            return Err(error);
        }
        let request = Request {
            command: command::DMA_MAP,
            body: [&map.encode(), &[]],
            fds: &fds,
            mapping: Some((iova, size)),
            ..Request::default()
        };
        let told = self.connection.exchange(request, "map", object()).map(drop);
        // The device behind the server may have other users, with mappings of their own.
        told.map_err(|error| match error.errno().map(Errno::from_raw) {
            Some(errno @ (Errno::EEXIST | Errno::ENOSPC | Errno::EMFILE)) => {
                map_refused(errno, object())
            }
            Some(Errno::EINVAL) => self.refused_as_invalid(error),
            _ => error,
        })
    }

    fn dma_unmap(&self, iova: u64, size: u64) -> Result<()> {
        let object = || format!("{size:#x} bytes at I/O address {iova:#x} of {}", self.info.name);
        let unmap =
            DmaUnmap { argsz: DmaUnmap::SIZE as u32, flags: 0, address: iova, size }.encode();
        let request = Request {
            command: command::DMA_UNMAP,
            body: [&unmap, &[]],
            reply: DmaUnmap::SIZE,
            mapping: Some((iova, size)),
            ..Request::default()
        };
        let reply = match self.connection.exchange(request, "unmap", object()) {
            // The server cannot ask for anything any more. It may keep files of ours, but their pages never
            // become anybody else's.
            Err(error) if error.kind() == ErrorKind::Gone && self.connection.has_failed() => {
                log::debug!("{error}");
                let _ = self.connection.memory().remove(iova, size);
                return Ok(());
            }
            other => other?,
        };
        let (answer, _) = DmaUnmap::decode(&reply.body).unwrap_or_default();
        if (answer.address, answer.size) != (iova, size) {
            let reason =
                format!("the server unmapped {:#x} bytes at {:#x}", answer.size, answer.address);
            return Err(self.connection.malformed(reason, "unmap", object()));
        }
        let removed = self.connection.memory().remove(iova, size);
        removed.map_err(|errno| Error::os(errno, "unmap", object()))
    }
}

impl Drop for VfioUser {
    fn drop(&mut self) {
        if self.generation != fork::generation() {
            // The parent uses the socket. A child does not have the thread, and its lock may be held.
            let listener = std::mem::take(&mut self.listener);
            return std::mem::forget(listener);
        }
        self.connection.shut_down();
        let listener = self.listener.get_mut().unwrap_or_else(PoisonError::into_inner);
        // That thread may hold the last mapping of this client, and drop it.
        if let Some(thread) = listener.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            log::error!("{}: its thread has panicked", self.info.name);
        }
    }
}

impl fmt::Debug for VfioUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VfioUser({})", self.info.name)
    }
}
