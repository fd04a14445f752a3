//! A driver for virtio's entropy device over PCI (virtio 1.2, §4.1 and §5.4), by a split virtqueue (§2.7).

use std::time::Duration;

use vfio_remap::device::{Descriptors, DmaArray, DmaBuffer};
use vfio_remap::{
    Device, Error, ErrorKind, IoRegister, IoRegisterBlock, Result, poll_until, register_block,
};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const SIZE: usize = 8;
const VENDOR_SPECIFIC: u8 = 0x09;
const CONFIG_SPACE: u32 = 7;
const VERSION_1: u32 = 1;

register_block! {
    /// A capability that says where some of the device's registers are (§4.1.4).
    Location[0x14] {
        KIND(ro u8) @ 0x03;
        BAR(ro u8) @ 0x04;
        OFFSET(ro u32) @ 0x08;
        LENGTH(ro u32) @ 0x0c;
        NOTIFY_MULTIPLIER(ro u32) @ 0x10;
    }

    /// The common configuration (§4.1.4.3).
    Common[0x38] {
        DEVICE_FEATURE_SELECT(u32) @ 0x00;
        DEVICE_FEATURE(ro u32) @ 0x04;
        DRIVER_FEATURE_SELECT(u32) @ 0x08;
        DRIVER_FEATURE(u32) @ 0x0c;
        CONFIG_MSIX_VECTOR(u16) @ 0x10;
        NUM_QUEUES(ro u16) @ 0x12;
        STATUS(u8 => Status) @ 0x14 {
            pub acknowledge: bool,
            pub driver: bool,
            pub driver_ok: bool,
            pub features_ok: bool,
            #[bits(2)]
            __: u8,
            pub needs_reset: bool,
            pub failed: bool,
        }
        CONFIG_GENERATION(ro u8) @ 0x15;
        QUEUE_SELECT(u16) @ 0x16;
        QUEUE_SIZE(u16) @ 0x18;
        QUEUE_MSIX_VECTOR(u16) @ 0x1a;
        QUEUE_ENABLE(u16) @ 0x1c;
        QUEUE_NOTIFY_OFF(ro u16) @ 0x1e;
        /// Addresses of 64 bits, in halves (§4.1.3.1).
        QUEUE_DESC(u32)[2] @ 0x20;
        QUEUE_DRIVER(u32)[2] @ 0x28;
        QUEUE_DEVICE(u32)[2] @ 0x30;
    }
}

/// An entry of the descriptor table (§2.7.5).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    address: U64,
    length: U32,
    flags: U16,
    next: U16,
}

/// What the device may write to.
const WRITE: U16 = U16::new(2);

pub struct Entropy {
    notify: IoRegister<u16>,
    descriptors: Descriptors<Descriptor>,
    /// Flags, index, and the ring (§2.7.6).
    available: DmaArray<u16, 1>,
    /// Flags and index by halves, and the ring by words, from 4 on (§2.7.8).
    used: DmaBuffer,
    buffer: DmaBuffer,
    index: u16,
}

impl Entropy {
    pub fn new(device: &Device, timeout: Duration) -> Result<Self> {
        let config = device.config()?;
        config.set_memory_decoding(true)?;
        config.set_bus_mastering(true)?;
        let (bar, offset, _) = locate(device, 1)?;
        let common = device.bar(bar)?.block::<Common>(offset)?;
        common.write(Common::STATUS, Status::new())?;
        let status = || common.read(Common::STATUS);
        vfio_remap::try_poll_until("the reset", timeout, status, |now| *now == Status::new())?;
        let status = Status::new().with_acknowledge(true).with_driver(true);
        common.write(Common::STATUS, status)?;
        common.write(Common::DEVICE_FEATURE_SELECT, 1)?;
        let offered = common.read(Common::DEVICE_FEATURE)?;
        common.write(Common::DRIVER_FEATURE_SELECT, 1)?;
        common.write(Common::DRIVER_FEATURE, offered & VERSION_1)?;
        common.write(Common::STATUS, status.with_features_ok(true))?;
        if !common.read(Common::STATUS)?.features_ok() {
            return Err(unsupported(device, "it refuses virtio 1"));
        }
        let space = device.dma()?;
        let entropy = Self {
            notify: Self::notify(device, &common)?,
            descriptors: space.descriptors(SIZE)?,
            available: space.array(2 + SIZE)?,
            used: space.buffer(4 + 8 * SIZE)?,
            buffer: space.buffer(4096)?,
            index: 0,
        };
        common.write(Common::QUEUE_SIZE, SIZE as u16)?;
        for (register, iova) in [
            (Common::QUEUE_DESC, entropy.descriptors.iova(0)),
            (Common::QUEUE_DRIVER, entropy.available.iova(0)),
            (Common::QUEUE_DEVICE, entropy.used.iova()),
        ] {
            common.write(register.at(0), iova.0 as u32)?;
            common.write(register.at(1), (iova.0 >> 32) as u32)?;
        }
        common.write(Common::QUEUE_ENABLE, 1)?;
        common.update(Common::STATUS, |status| status.with_driver_ok(true))?;
        Ok(entropy)
    }

    /// Where the first queue is notified (§4.1.4.4).
    fn notify(device: &Device, common: &IoRegisterBlock<Common>) -> Result<IoRegister<u16>> {
        let (bar, offset, multiplier) = locate(device, 2)?;
        common.write(Common::QUEUE_SELECT, 0)?;
        let queue = u64::from(common.read(Common::QUEUE_NOTIFY_OFF)?);
        device.bar(bar)?.trapped_register(offset + queue * u64::from(multiplier))
    }

    /// `len` random bytes, 4096 at most.
    pub fn random(&mut self, len: usize, timeout: Duration) -> Result<Vec<u8>> {
        let entry = usize::from(self.index) % SIZE;
        let (address, length) = (self.buffer.iova().0.into(), U32::new(len as u32));
        let next = U16::new(0);
        self.descriptors.store(entry, Descriptor { address, length, flags: WRITE, next });
        self.available.store(2 + entry, 0, entry as u16);
        self.index = self.index.wrapping_add(1);
        self.available.store_release(1, 0, self.index);
        self.notify.write(0)?;
        let used = || self.used.load::<u16>(2);
        poll_until("random bytes", timeout, used, |used| *used == self.index)?;
        let filled = self.used.load::<u32>(4 + 8 * entry + 4) as usize;
        let mut bytes = vec![0; filled.min(len)];
        self.buffer.read(0, &mut bytes);
        Ok(bytes)
    }
}

/// The BAR and the offset where registers of this kind are, and what the capability has at its end.
fn locate(device: &Device, kind: u8) -> Result<(u32, u64, u32)> {
    let config = device.region(CONFIG_SPACE)?;
    for capability in device.config()?.capabilities() {
        let capability = capability?;
        if capability.id != VENDOR_SPECIFIC {
            continue;
        }
        let at = config.trapped_block::<Location>(capability.offset)?;
        if at.read(Location::KIND)? == kind {
            let (bar, offset) = (at.read(Location::BAR)?, at.read(Location::OFFSET)?);
            return Ok((bar.into(), offset.into(), at.read(Location::NOTIFY_MULTIPLIER)?));
        }
    }
    Err(unsupported(device, "it has no such virtio capability"))
}

fn unsupported(device: &Device, reason: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, "drive", device.name()).with_reason(reason)
}
