//! One client of a server: its commands, answered.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_AUTOMASKED,
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};

use super::ClientLimits;
use super::wire::Wire;
use crate::emulated::bus::Target;
use crate::emulated::device::Emulated;
use crate::emulated::user::User;
use crate::error::{Error, ErrorKind};
use crate::sys::file;
use crate::transport::vfio_user::protocol::channel::{Fault, Message};
use crate::transport::vfio_user::protocol::dma::Rights;
use crate::transport::vfio_user::protocol::version::{Capabilities, MAX_TRANSFER};
use crate::transport::vfio_user::protocol::wire::{
    DMA_UNMAP_ALL, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionAccess, RegionInfo, command,
};
use crate::transport::{self, RegionFile, Transport};

/// A client that is connected.
pub(super) struct Session<'a> {
    device: &'a Emulated,
    user: Arc<User>,
    wire: Arc<Wire>,
    greeted: bool,
}

/// What a command is answered with.
#[derive(Default)]
struct Reply {
    body: Vec<u8>,
    file: Option<RegionFile>,
}

impl From<Vec<u8>> for Reply {
    fn from(body: Vec<u8>) -> Self {
        Self { body, file: None }
    }
}

type Answer = Result<Reply, Errno>;

impl<'a> Session<'a> {
    pub(super) fn new(
        device: &'a Emulated,
        stream: UnixStream,
        limits: ClientLimits,
    ) -> std::io::Result<Self> {
        let ClientLimits { time, files } = limits;
        let wire = Arc::new(Wire::new(stream, time)?);
        Ok(Self { device, user: User::new(files), wire, greeted: false })
    }

    /// Answers commands until the client leaves.
    pub(super) fn run(&mut self) -> Result<(), Fault> {
        loop {
            let next = if self.greeted { self.wire.command() } else { self.wire.first_command() };
            let message = match next {
                Ok(message) => message,
                Err(Fault::Closed { cut_short: false }) => return Ok(()),
                Err(fault) => return Err(fault),
            };
            let (header, greeting) = (message.header, !self.greeted);
            let answer = self.answer(message);
            if let Err(errno) = &answer {
                log::debug!("{} failed: {errno}", command::name(header.command));
            }
            if header.wants_reply() {
                match &answer {
                    Ok(Reply { body, file }) => {
                        let fds: Vec<BorrowedFd<'_>> = file.iter().map(RegionFile::fd).collect();
                        self.wire.send(header.reply(body.len()), [body, &[]], &fds)?;
                    }
                    Err(errno) => self.wire.send(header.failure(*errno), [&[], &[]], &[])?,
                }
            }
            if greeting && answer.is_err() {
                return Err(Fault::Malformed("the client has not agreed on a version".to_owned()));
            }
        }
    }

    fn answer(&mut self, message: Message) -> Answer {
        let Message { header, body, fds } = message;
        if self.greeted == (header.command == command::VERSION) {
            return Err(Errno::EINVAL);
        }
        match header.command {
            command::VERSION => self.version(&body),
            command::DMA_MAP => self.dma_map(&body, fds),
            command::DMA_UNMAP => self.dma_unmap(&body),
            command::DEVICE_GET_INFO => self.device_info(&body),
            command::DEVICE_GET_REGION_INFO => self.region_info(&body),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(&body),
            command::DEVICE_SET_IRQS => self.set_irqs(&body, fds),
            command::REGION_READ => self.region_read(&body),
            command::REGION_WRITE => self.region_write(&body),
            command::DEVICE_RESET => self.device.reset().map(|()| Reply::default()).map_err(errno),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn version(&mut self, body: &[u8]) -> Answer {
        let theirs = Capabilities::read(body).map_err(|reason| {
            log::debug!("a client was refused: {reason}");
            Errno::EINVAL
        })?;
        self.wire.greeted(theirs.transfer);
        self.greeted = true;
        let mut ours = Capabilities::ours();
        // The smaller of both minor versions.
        if let (Some(ours), Some(theirs)) = (ours.get_mut(2..4), body.get(2..4)) {
            let minor = |bytes: &[u8]| u16::from_ne_bytes([bytes[0], bytes[1]]);
            let agreed = minor(ours).min(minor(theirs));
            ours.copy_from_slice(&agreed.to_ne_bytes());
        }
        Ok(ours.into())
    }

    fn dma_map(&self, body: &[u8], mut fds: Vec<OwnedFd>) -> Answer {
        let (map, _) = DmaMap::decode(body).ok_or(Errno::EINVAL)?;
        if fds.len() > 1 {
            return Err(Errno::EINVAL);
        }
        // What is no tmpfs file may make its reader wait for anything: its owner reads it for us.
        let target = match fds.pop().filter(|fd| file::is_tmpfs(fd)) {
            Some(fd) => {
                map.offset.checked_add(map.size).ok_or(Errno::EINVAL)?;
                Target::File(Arc::new(File::from(fd)), map.offset)
            }
            None => Target::Client(self.wire.clone(), map.address),
        };
        let rights = Rights::from_flags(map.flags);
        self.device.core.bus.map(&self.user, map.address, map.size, rights, target)?;
        Ok(Reply::default())
    }

    fn dma_unmap(&self, body: &[u8]) -> Answer {
        let (unmap, _) = DmaUnmap::decode(body).ok_or(Errno::EINVAL)?;
        let bus = &self.device.core.bus;
        match unmap.flags {
            0 => bus.unmap(&self.user, unmap.address, unmap.size)?,
            DMA_UNMAP_ALL if (unmap.address, unmap.size) == (0, 0) => bus.unmap_all(&self.user),
            _ => return Err(Errno::EINVAL),
        }
        Ok(unmap.encode().to_vec().into())
    }

    fn device_info(&self, body: &[u8]) -> Answer {
        DeviceInfo::decode(body).ok_or(Errno::EINVAL)?;
        let info = self.device.info();
        let pci = if info.pci { VFIO_DEVICE_FLAGS_PCI } else { 0 };
        let reset = if info.resettable { VFIO_DEVICE_FLAGS_RESET } else { 0 };
        let answer = DeviceInfo {
            argsz: DeviceInfo::SIZE as u32,
            flags: pci | reset,
            regions: info.region_count,
            irqs: info.irq_count,
        };
        Ok(answer.encode().to_vec().into())
    }

    fn region_info(&self, body: &[u8]) -> Answer {
        let (ask, _) = RegionInfo::decode(body).ok_or(Errno::EINVAL)?;
        if (ask.argsz as usize) < RegionInfo::SIZE || ask.index >= self.device.info().region_count {
            return Err(Errno::EINVAL);
        }
        // A vacant region is one of size 0.
        let info = self.device.region(ask.index).unwrap_or_default();
        let caps = capabilities(&info);
        let argsz = RegionInfo::SIZE + caps.len();
        let flag = |has: bool, flag: u32| if has { flag } else { 0 };
        let answer = RegionInfo {
            argsz: argsz as u32,
            flags: flag(info.readable, VFIO_REGION_INFO_FLAG_READ)
                | flag(info.writable, VFIO_REGION_INFO_FLAG_WRITE)
                | flag(info.mappable, VFIO_REGION_INFO_FLAG_MMAP)
                | flag(!caps.is_empty(), VFIO_REGION_INFO_FLAG_CAPS),
            index: ask.index,
            cap_offset: if caps.is_empty() { 0 } else { RegionInfo::SIZE as u32 },
            size: info.size,
            offset: 0,
        };
        let mut body = answer.encode().to_vec();
        if ask.argsz as usize >= argsz {
            body.extend(caps);
        }
        let file = info.mappable.then(|| self.device.backing(ask.index)).transpose();
        Ok(Reply { body, file: file.map_err(errno)? })
    }

    fn irq_info(&self, body: &[u8]) -> Answer {
        let (ask, _) = IrqInfo::decode(body).ok_or(Errno::EINVAL)?;
        let info = self.device.irq(ask.index).map_err(errno)?;
        let flag = |has: bool, flag: u32| if has { flag } else { 0 };
        let answer = IrqInfo {
            argsz: IrqInfo::SIZE as u32,
            flags: flag(info.eventfd, VFIO_IRQ_INFO_EVENTFD)
                | flag(info.maskable, VFIO_IRQ_INFO_MASKABLE)
                | flag(info.automasked, VFIO_IRQ_INFO_AUTOMASKED)
                | flag(info.noresize, VFIO_IRQ_INFO_NORESIZE),
            index: ask.index,
            count: info.count,
        };
        Ok(answer.encode().to_vec().into())
    }

    fn set_irqs(&self, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
        const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER;
        let (set, data) = IrqSet::decode(body).ok_or(Errno::EINVAL)?;
        let IrqSet { flags, index, start, count, .. } = set;
        let vectors = self.device.irq(index).map_err(errno)?.count;
        let end = start.checked_add(count).filter(|&end| end <= vectors).ok_or(Errno::EINVAL)?;
        const DATA: u32 =
            VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD;
        match (flags & DATA, flags & !DATA) {
            (VFIO_IRQ_SET_DATA_NONE, TRIGGER) if count == 0 => {
                self.device.core.disconnect(&self.user, index).map_err(errno)?;
            }
            (VFIO_IRQ_SET_DATA_NONE, action) => self.act(index, start..end, action)?,
            (VFIO_IRQ_SET_DATA_BOOL, action) => {
                let chosen = data.get(..count as usize).ok_or(Errno::EINVAL)?;
                for (vector, _) in (start..end).zip(chosen).filter(|(_, chosen)| **chosen != 0) {
                    self.act(index, vector..vector + 1, action)?;
                }
            }
            (VFIO_IRQ_SET_DATA_EVENTFD, TRIGGER) => {
                let fds: Vec<Option<OwnedFd>> = match fds.len() {
                    0 => (0..count).map(|_| None).collect(),
                    some if some == count as usize => fds.into_iter().map(Some).collect(),
                    _ => return Err(Errno::EINVAL),
                };
                self.device.core.connect(&self.user, index, start, fds).map_err(errno)?;
            }
            // Eventfds that are told of masking.
            _ => return Err(Errno::EOPNOTSUPP),
        }
        Ok(Reply::default())
    }

    fn act(&self, index: u32, vectors: Range<u32>, action: u32) -> Result<(), Errno> {
        match action {
            VFIO_IRQ_SET_ACTION_MASK => self.device.mask_irqs(index, vectors, true),
            VFIO_IRQ_SET_ACTION_UNMASK => self.device.mask_irqs(index, vectors, false),
            VFIO_IRQ_SET_ACTION_TRIGGER => self.device.trigger_irqs(index, vectors),
            _ => return Err(Errno::EINVAL),
        }
        .map_err(errno)
    }

    fn region_read(&self, body: &[u8]) -> Answer {
        let (access, _) = RegionAccess::decode(body).ok_or(Errno::EINVAL)?;
        let count = access.count as usize;
        if count > MAX_TRANSFER {
            return Err(Errno::E2BIG);
        }
        let mut reply = vec![0; RegionAccess::SIZE + count];
        let (fields, data) = reply.split_at_mut(RegionAccess::SIZE);
        fields.copy_from_slice(&access.encode());
        self.device.read_at(access.region, access.offset, data).map_err(errno)?;
        Ok(reply.into())
    }

    fn region_write(&self, body: &[u8]) -> Answer {
        let (access, data) = RegionAccess::decode(body).ok_or(Errno::EINVAL)?;
        if access.count as usize != data.len() {
            return Err(Errno::EINVAL);
        }
        self.device.write_at(access.region, access.offset, data).map_err(errno)?;
        Ok(access.encode().to_vec().into())
    }
}

impl Drop for Session<'_> {
    /// What the client has lent us is given back; the device stays as it is, but for work that is left.
    fn drop(&mut self) {
        self.device.core.bus.detach(&self.user);
        self.device.core.client_left();
    }
}

/// The capability chain of a region, which begins behind the fixed fields.
fn capabilities(info: &transport::RegionInfo) -> Vec<u8> {
    let mut chain: Vec<(u32, Vec<u8>)> = Vec::new();
    if let Some(areas) = info.areas.as_ref().filter(|_| info.mappable) {
        // The count, and 32 bits that are reserved.
        let mut body = (areas.len() as u32).to_ne_bytes().to_vec();
        body.extend([0; 4]);
        for area in areas {
            body.extend(area.start.to_ne_bytes());
            body.extend((area.end - area.start).to_ne_bytes());
        }
        chain.push((VFIO_REGION_INFO_CAP_SPARSE_MMAP, body));
    }
    if info.msix_mappable {
        chain.push((VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, Vec::new()));
    }
    let mut bytes = Vec::new();
    let count = chain.len();
    for (index, (id, body)) in chain.into_iter().enumerate() {
        let end = RegionInfo::SIZE + bytes.len() + 8 + body.len();
        let next = if index + 1 < count { end as u32 } else { 0 };
        bytes.extend((id as u16).to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend(body);
    }
    bytes
}

/// What a client is told of an error.
fn errno(error: Error) -> Errno {
    match (error.errno(), error.kind()) {
        (Some(errno), _) => Errno::from_raw(errno),
        (None, ErrorKind::NotFound | ErrorKind::OutOfRange | ErrorKind::Unaligned) => Errno::EINVAL,
        (None, ErrorKind::ReadOnly | ErrorKind::PermissionDenied) => Errno::EACCES,
        (None, ErrorKind::Unsupported) => Errno::EOPNOTSUPP,
        (None, _) => Errno::EIO,
    }
}
