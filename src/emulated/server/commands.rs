//! The commands of a client.

use std::ops::Range;
use std::os::fd::OwnedFd;

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

use super::memory;
use super::session::{Reply, Served, Session};
use crate::emulated::bus::Target;
use crate::emulated::irq::may_be_eventfd;
use crate::error::{Error, ErrorKind};
use crate::transport::vfio_user::protocol::dma::Rights;
use crate::transport::vfio_user::protocol::version::MAX_TRANSFER;
use crate::transport::vfio_user::protocol::wire::{
    DMA_UNMAP_ALL, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionAccess, RegionInfo,
    SmallWrite, WriteCount,
};
use crate::transport::{self, Transport};

/// EINVAL if `argsz` is less than the size of the fixed fields.
fn check_argsz(argsz: u32, fixed: usize) -> Result<(), Errno> {
    if (argsz as usize) < fixed { Err(Errno::EINVAL) } else { Ok(()) }
}

/// The flag, if it is set.
fn flag(is_set: bool, flag: u32) -> u32 {
    if is_set { flag } else { 0 }
}

impl Session<'_> {
    pub(super) fn dma_map(&self, body: &[u8], fds: &mut Vec<OwnedFd>) -> Served {
        let (map, _) = DmaMap::decode(body).ok_or(Errno::EINVAL)?;
        check_argsz(map.argsz, DmaMap::SIZE)?;
        if fds.len() > 1 {
            return Err(Errno::EINVAL);
        }
        let target = match fds.pop() {
            Some(fd) => memory::of_file(&self.user, &map, fd).map_err(|(fd, errno)| {
                fds.push(fd);
                errno
            })?,
            None => Target::Client(self.asking.clone(), map.address),
        };
        let rights = Rights::from_flags(map.flags);
        self.device.core.bus.map(&self.user, map.address, map.size, rights, target)?;
        Ok(Reply::default())
    }

    pub(super) fn dma_unmap(&self, body: &[u8]) -> Served {
        let (unmap, _) = DmaUnmap::decode(body).ok_or(Errno::EINVAL)?;
        check_argsz(unmap.argsz, DmaUnmap::SIZE)?;
        let bus = &self.device.core.bus;
        match unmap.flags {
            0 => bus.unmap(&self.user, unmap.address, unmap.size)?,
            DMA_UNMAP_ALL if (unmap.address, unmap.size) == (0, 0) => bus.unmap_all(&self.user),
            _ => return Err(Errno::EINVAL),
        }
        Ok(unmap.encode().to_vec().into())
    }

    pub(super) fn reset(&self) -> Served {
        self.device.reset().map(|()| Reply::default()).map_err(errno)
    }

    pub(super) fn device_info(&self, body: &[u8]) -> Served {
        let (asked, _) = DeviceInfo::decode(body).ok_or(Errno::EINVAL)?;
        check_argsz(asked.argsz, DeviceInfo::SIZE)?;
        let info = self.device.info();
        let reply = DeviceInfo {
            argsz: DeviceInfo::SIZE as u32,
            flags: flag(info.pci, VFIO_DEVICE_FLAGS_PCI)
                | flag(info.resettable, VFIO_DEVICE_FLAGS_RESET),
            regions: info.region_count,
            irqs: info.irq_count,
        };
        Ok(reply.encode().to_vec().into())
    }

    pub(super) fn region_info(&self, body: &[u8]) -> Served {
        let (asked, _) = RegionInfo::decode(body).ok_or(Errno::EINVAL)?;
        check_argsz(asked.argsz, RegionInfo::SIZE)?;
        if asked.index >= self.device.info().region_count {
            return Err(Errno::EINVAL);
        }
        // A vacant region is one of size 0.
        let mut info = self.device.region(asked.index).unwrap_or_default();
        // A client that takes no descriptors cannot map it.
        info.mappable &= self.max_fds() > 0;
        let caps = capabilities(&info);
        let argsz = RegionInfo::SIZE + caps.len();
        // If the reply does not fit, the client gets the fixed fields with the size of all of it, and asks again.
        // The flags must not name what is missing: QEMU (11.1) refuses capabilities at offset 0.
        let is_whole = asked.argsz as usize >= argsz;
        let has_caps = is_whole && !caps.is_empty();
        let reply = RegionInfo {
            argsz: argsz as u32,
            flags: flag(info.readable, VFIO_REGION_INFO_FLAG_READ)
                | flag(info.writable, VFIO_REGION_INFO_FLAG_WRITE)
                | flag(is_whole && info.mappable, VFIO_REGION_INFO_FLAG_MMAP)
                | flag(has_caps, VFIO_REGION_INFO_FLAG_CAPS),
            index: asked.index,
            cap_offset: if has_caps { RegionInfo::SIZE as u32 } else { 0 },
            size: info.size,
            offset: 0,
        };
        let mut body = reply.encode().to_vec();
        if !is_whole {
            return Ok(body.into());
        }
        body.extend(caps);
        let file = info.mappable.then(|| self.device.backing(asked.index)).transpose();
        Ok(Reply::with_file(body, file.map_err(errno)?))
    }

    pub(super) fn irq_info(&self, body: &[u8]) -> Served {
        let (asked, _) = IrqInfo::decode(body).ok_or(Errno::EINVAL)?;
        check_argsz(asked.argsz, IrqInfo::SIZE)?;
        let info = self.device.irq(asked.index).map_err(errno)?;
        let reply = IrqInfo {
            argsz: IrqInfo::SIZE as u32,
            flags: flag(info.eventfd, VFIO_IRQ_INFO_EVENTFD)
                | flag(info.maskable, VFIO_IRQ_INFO_MASKABLE)
                | flag(info.automasked, VFIO_IRQ_INFO_AUTOMASKED)
                | flag(info.noresize, VFIO_IRQ_INFO_NORESIZE),
            index: asked.index,
            count: info.count,
        };
        Ok(reply.encode().to_vec().into())
    }

    pub(super) fn set_irqs(&self, body: &[u8], fds: &mut Vec<OwnedFd>) -> Served {
        const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER;
        const DATA: u32 =
            VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD;
        let (set, data) = IrqSet::decode(body).ok_or(Errno::EINVAL)?;
        let IrqSet { argsz, flags, index, start, count } = set;
        check_argsz(argsz, IrqSet::SIZE)?;
        let vectors = self.device.irq(index).map_err(errno)?.count;
        let end = start.checked_add(count).filter(|&end| end <= vectors).ok_or(Errno::EINVAL)?;
        // Booleans are in the message and eventfds are descriptors. Neither is allowed for 0 vectors.
        let (kind, action) = (flags & DATA, flags & !DATA);
        let booleans = if kind == VFIO_IRQ_SET_DATA_BOOL { count as usize } else { 0 };
        let takes_none = count == 0 && kind != VFIO_IRQ_SET_DATA_NONE;
        let has_stray_fds = !fds.is_empty() && kind != VFIO_IRQ_SET_DATA_EVENTFD;
        if argsz as usize > body.len() || data.len() != booleans || takes_none || has_stray_fds {
            return Err(Errno::EINVAL);
        }
        match (kind, action) {
            (VFIO_IRQ_SET_DATA_NONE, TRIGGER) if count == 0 => {
                self.device.core.disconnect(&self.user, index).map_err(errno)?;
            }
            (VFIO_IRQ_SET_DATA_NONE, action) => self.act(index, start..end, action)?,
            (VFIO_IRQ_SET_DATA_BOOL, action) => {
                for (vector, _) in (start..end).zip(data).filter(|(_, chosen)| **chosen != 0) {
                    self.act(index, vector..vector + 1, action)?;
                }
            }
            (VFIO_IRQ_SET_DATA_EVENTFD, TRIGGER) => {
                if !fds.iter().all(may_be_eventfd) {
                    return Err(Errno::EINVAL);
                }
                let fds: Vec<Option<OwnedFd>> = match fds.len() {
                    0 => (0..count).map(|_| None).collect(),
                    some if some == count as usize => fds.drain(..).map(Some).collect(),
                    _ => return Err(Errno::EINVAL),
                };
                self.device.core.connect(&self.user, index, start, fds).map_err(errno)?;
            }
            // Eventfds that are signalled when a vector is masked or unmasked.
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

    pub(super) fn region_read(&self, body: &[u8]) -> Served {
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

    pub(super) fn region_write(&self, body: &[u8]) -> Served {
        let (access, data) = RegionAccess::decode(body).ok_or(Errno::EINVAL)?;
        if access.count as usize != data.len() {
            return Err(Errno::EINVAL);
        }
        self.device.write_at(access.region, access.offset, data).map_err(errno)?;
        Ok(access.encode().to_vec().into())
    }

    /// Several small writes, in their order, up to the first that fails. The reply has the number of writes before
    /// that one, or its error if it was the first.
    pub(super) fn region_write_multi(&self, body: &[u8]) -> Served {
        let (WriteCount { count }, mut rest) = WriteCount::decode(body).ok_or(Errno::EINVAL)?;
        if count.checked_mul(SmallWrite::SIZE as u64) != Some(rest.len() as u64) {
            return Err(Errno::EINVAL);
        }
        let mut writes = Vec::with_capacity(rest.len() / SmallWrite::SIZE);
        while let Some((write, after)) = SmallWrite::decode(rest) {
            if write.count > 8 {
                return Err(Errno::EINVAL);
            }
            writes.push(write);
            rest = after;
        }
        let mut done = 0;
        for SmallWrite { offset, region, count, data } in writes {
            let data = data.to_ne_bytes();
            match self.device.write_at(region, offset, &data[..count as usize]) {
                Ok(()) => done += 1,
                Err(error) if done == 0 => return Err(errno(error)),
                Err(error) => {
                    log::debug!("a write after {done} others: {error}");
                    break;
                }
            }
        }
        Ok(WriteCount { count: done }.encode().to_vec().into())
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

/// The errno for the client.
fn errno(error: Error) -> Errno {
    match (error.errno(), error.kind()) {
        (Some(errno), _) => Errno::from_raw(errno),
        (None, ErrorKind::NotFound | ErrorKind::OutOfRange | ErrorKind::Unaligned) => Errno::EINVAL,
        (None, ErrorKind::ReadOnly | ErrorKind::PermissionDenied) => Errno::EACCES,
        (None, ErrorKind::Unsupported) => Errno::EOPNOTSUPP,
        (None, _) => Errno::EIO,
    }
}
