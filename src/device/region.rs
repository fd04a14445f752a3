//! Regions of a device.

use std::fmt;
use std::ops::{Bound, Range, RangeBounds};

use super::layout::{Layout, Span, Trap};
use super::register::{IoRegister, ReadOnly, Width};
use super::register_block::IoRegisterBlock;
use super::register_layout::BlockLayout;
use super::window::Window;
use super::{Device, KnownRegion, Mappable};
use crate::error::{Error, ErrorKind, Result};
use crate::space::{Access, BackingKind, Failed, Placement};
use crate::transport::RegionInfo;

/// A region of a device: a BAR, or another one.
///
/// It borrows the device. A driver that needs it later keeps the [`Device`], of which clones are cheap, and
/// asks for the region again: the transport is asked only once.
#[derive(Clone)]
pub struct Region<'d> {
    device: &'d Device,
    index: u32,
    region: &'d KnownRegion,
    mappable: &'d Mappable,
}

impl<'d> Region<'d> {
    pub(super) fn new(device: &'d Device, index: u32, region: &'d KnownRegion) -> Self {
        Self { device, index, region, mappable: &region.usual }
    }

    pub(super) fn device(&self) -> &'d Device {
        self.device
    }

    /// The region's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.region.info.size
    }

    /// The transport's description of the region.
    pub fn info(&self) -> &RegionInfo {
        &self.region.info
    }

    /// Which parts can be mapped, and which are trapped and why.
    pub fn layout(&self) -> &Layout {
        &self.mappable.layout
    }

    /// The kind of file behind its mappable parts; `None` if no part can be mapped.
    pub fn backing_kind(&self) -> Option<BackingKind> {
        self.mappable.backing.as_ref().map(|backing| backing.kind())
    }

    /// The same region, with a mappable MSI-X table.
    ///
    /// VFIO programs the table itself, and a program that writes it through a window interferes. This is for
    /// hypervisors that show the table to a guest.
    ///
    /// # Errors
    /// `NotMappable` if the kernel does not allow it (Linux 4.16 and newer do, if interrupts are remapped or
    /// isolated in another way); `Malformed` if the region's file ends before the table.
    pub fn with_msix_table(&self) -> Result<Region<'d>> {
        let info = &self.region.info;
        if !info.msix_mappable {
            return Err(Error::new(ErrorKind::NotMappable, "map", self.name())
                .with_reason("the transport does not let the MSI-X table be mapped")
                .with_advice(
                    "reach it by Region::trapped_register; vectors are set up by Device::vectors, without the table",
                ));
        }
        let KnownRegion { usual, with_table, .. } = self.region;
        let is_msix = |span: &Span| matches!(span.trap, Some(Trap::MsixTable | Trap::MsixPending));
        let mappable = match with_table.get() {
            Some(mappable) => mappable,
            // The table is elsewhere.
            None if !usual.layout.spans().iter().any(is_msix) => usual,
            None => {
                let layout = Layout::new(info, &Default::default(), self.device.page_size())?;
                let mappable = self.device.mappable(self.index, layout)?;
                with_table.get_or_init(|| mappable)
            }
        };
        Ok(Self { mappable, ..self.clone() })
    }

    /// Maps a range of the region, in bytes; `..` maps all of it. The whole pages that hold the range are
    /// mapped; the window gives access to the range only. It is read-only if the region cannot be written.
    ///
    /// From now on, the crate keeps as many bytes of memory, up to
    /// [`revocable_size`](crate::space::revocable_size), so that the window can be revoked to all ones at any
    /// time. A larger window reads zeros when it is revoked:
    /// [`Window::reads_ones_when_revoked`] says so.
    ///
    /// ```
    /// # use vfio_remap::{Device, space::Placement, transport::MemoryDevice};
    /// # let device = Device::new(std::sync::Arc::new(MemoryDevice::new(0x4000)?));
    /// let doorbells = device.bar(0)?.map(0x1000..0x2000, Placement::Anywhere)?;
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// `OutOfRange` if the range is empty or leaves the region; `NotMappable` with the part that cannot be
    /// mapped; `UnsuitablePlacement`, `AddressTaken`, `TooManyMappings`, `AddressSpace`, `LockedMemory`; `Gone`
    /// if the device was removed; the kernel's error. The failure returns a reservation that was passed, except
    /// with `ReservationLost`: a failing call may have unmapped it, and what is mapped there now may belong to
    /// other code.
    pub fn map(
        &self,
        range: impl RangeBounds<u64>,
        placement: Placement,
    ) -> std::result::Result<Window, Failed> {
        match self.check(range) {
            Ok((range, access)) => {
                let Some(backing) = &self.mappable.backing else {
                    return Err(refused(self.not_mappable(&range), placement));
                };
                Window::map(&self.device.inner, self.index, backing, range, access, placement)
            }
            Err(error) => Err(refused(error, placement)),
        }
    }

    /// Reads bytes of the region through the device's file, as a trapped register does. One, two or four naturally
    /// aligned bytes are one access to the device; eight are one or two, and more are several
    /// ([`Transport::read_at`](crate::Transport::read_at)).
    ///
    /// # Errors
    /// `OutOfRange`; the transport's error.
    pub fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check_bytes("read", offset, data.len())?;
        self.device.transport().read_at(self.index, offset, data)
    }

    /// Writes bytes of the region through the device's file, as [`read_at`](Self::read_at) reads them. Configuration
    /// space is written by [`Config::write`](super::Config::write).
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_bytes("write", offset, data.len())?;
        if self.device.inner.is_config(self.index) {
            return self.device.config()?.write(offset, data);
        }
        self.device.transport().write_at(self.index, offset, data)
    }

    /// A trapped register: it is accessed by reads and writes of the device's file. This works for the mappable
    /// parts, too.
    ///
    /// # Errors
    /// `OutOfRange`, `Unaligned`.
    pub fn trapped_register<T: Width>(&self, offset: u64) -> Result<IoRegister<T>> {
        IoRegister::trapped(self.device.inner.clone(), self.index, offset, self.size())
    }

    /// A trapped register that can only be read.
    ///
    /// # Errors
    /// As [`trapped_register`](Self::trapped_register).
    pub fn read_only_trapped_register<T: Width>(
        &self,
        offset: u64,
    ) -> Result<IoRegister<T, ReadOnly>> {
        IoRegister::trapped(self.device.inner.clone(), self.index, offset, self.size())
    }

    /// A block of registers at `offset` bytes into the region. It gets a window of its own if it can be mapped;
    /// otherwise it is trapped.
    ///
    /// # Errors
    /// `OutOfRange`, `Unaligned`, `ReadOnly`, and those of [`map`](Self::map).
    pub fn block<L: BlockLayout>(&self, offset: u64) -> Result<IoRegisterBlock<L>> {
        let end = offset.saturating_add(L::SIZE as u64);
        match self.map(offset..end, Placement::Anywhere) {
            Ok(window) => Ok(window.block(0)?.into()),
            Err(failed) if failed.kind() == ErrorKind::NotMappable => self.trapped_block(offset),
            Err(failed) => Err(failed.into()),
        }
    }

    /// A block of trapped registers: see [`trapped_register`](Self::trapped_register).
    ///
    /// # Errors
    /// `OutOfRange`, `Unaligned`.
    pub fn trapped_block<L: BlockLayout>(&self, offset: u64) -> Result<IoRegisterBlock<L>> {
        IoRegisterBlock::trapped(self.device.inner.clone(), self.index, offset, self.size())
    }

    fn check_bytes(&self, operation: &'static str, offset: u64, len: usize) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, operation, self.name())
                .with_reason(format!("{len} bytes at {offset:#x} leave its {size:#x} bytes"))),
        }
    }

    fn check(&self, range: impl RangeBounds<u64>) -> Result<(Range<u64>, Access)> {
        let size = self.size();
        let start = match range.start_bound() {
            Bound::Included(&start) => Some(start),
            Bound::Excluded(&start) => start.checked_add(1),
            Bound::Unbounded => Some(0),
        };
        let end = match range.end_bound() {
            Bound::Included(&end) => end.checked_add(1),
            Bound::Excluded(&end) => Some(end),
            Bound::Unbounded => Some(size),
        };
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Error::new(ErrorKind::OutOfRange, "map", self.name())
                .with_reason("the range wraps around")
                .with_advice(format!("map a part of 0x0..{size:#x}, or all of it: ..")));
        };
        let range = start..end;
        if start >= end {
            return Err(Error::new(ErrorKind::OutOfRange, "map", self.part(&range))
                .with_reason("the range is empty")
                .with_advice("map at least one byte; its whole page is mapped"));
        }
        if end > size {
            return Err(Error::new(ErrorKind::OutOfRange, "map", self.part(&range))
                .with_reason(format!("the region has {size:#x} bytes"))
                .with_advice(format!("map a part of 0x0..{size:#x}, or all of it: ..")));
        }
        if !self.region.info.readable || self.layout().obstacle(&range).is_some() {
            return Err(self.not_mappable(&range));
        }
        let writable = self.region.info.writable;
        Ok((range, if writable { Access::ReadWrite } else { Access::ReadOnly }))
    }

    fn not_mappable(&self, range: &Range<u64>) -> Error {
        let error = Error::new(ErrorKind::NotMappable, "map", self.part(range));
        let error = match self.layout().obstacle(range) {
            Some(span) => {
                let why = span.trap.map(|trap| trap.to_string()).unwrap_or_default();
                error.with_reason(format!(
                    "{:#x}..{:#x} cannot be mapped ({why})",
                    span.range.start, span.range.end
                ))
            }
            None => error.with_reason("it cannot be read, or its transport has no file to map"),
        };
        let parts: Vec<String> = self
            .layout()
            .mappable()
            .take(4)
            .map(|part| format!("{:#x}..{:#x}", part.start, part.end))
            .collect();
        if parts.is_empty() {
            error.with_advice("reach it by Region::trapped_register")
        } else {
            error.with_advice(format!(
                "map {} as windows of their own, and reach the rest by Region::trapped_register",
                parts.join(", ")
            ))
        }
    }

    fn name(&self) -> String {
        self.device.inner.region_name(self.index)
    }

    fn part(&self, range: &Range<u64>) -> String {
        self.device.inner.range_name(self.index, range)
    }
}

fn refused(error: Error, placement: Placement) -> Failed {
    match placement {
        Placement::In(reservation) => Failed::new(error, Some(reservation)),
        Placement::Anywhere | Placement::At(_) => error.into(),
    }
}

impl fmt::Debug for Region<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({}, {:#x} bytes)", self.name(), self.size())
    }
}
