//! The two lists of capabilities in configuration space.
//!
//! Devices may be broken and models hostile: a list that loops or leaves its range ends with an error.

use super::Config;
use crate::error::Result;

const VENDOR: u64 = 0x00;
const STATUS: u64 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const FIRST: u64 = 0x34;
/// The list lies in the 192 bytes after the header, and a capability takes at least 4.
const MOST: u32 = 48;

/// The begin and end of extended configuration space (PCIe 5.0 §7.2).
const EXTENDED: u64 = 0x100;
const END: u64 = 0x1000;
const MOST_EXTENDED: u32 = ((END - EXTENDED) / 4) as u32;

/// A capability of a PCI device (PCI 3.0 §6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Capability {
    /// The ID: 0x05 is MSI, 0x09 vendor-specific, 0x10 PCI Express, 0x11 MSI-X.
    pub id: u8,
    /// The offset in configuration space, in bytes.
    pub offset: u64,
}

/// An extended capability of a PCI Express device (PCIe 5.0 §7.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ExtendedCapability {
    /// The ID: 0x0001 is advanced error reporting, 0x0010 SR-IOV, 0x000b vendor-specific.
    pub id: u16,
    /// The version of its layout.
    pub version: u8,
    /// The offset in configuration space, in bytes.
    pub offset: u64,
}

/// The capabilities of a device, in the order of its list: see [`Config::capabilities`].
#[derive(Debug)]
pub struct Capabilities<'d> {
    config: Config<'d>,
    /// The offset of the next one; `None` before the list was looked up, 0 past its end.
    next: Option<u64>,
    left: u32,
}

/// The extended capabilities of a device, in the order of its list: see [`Config::extended_capabilities`].
#[derive(Debug)]
pub struct ExtendedCapabilities<'d> {
    config: Config<'d>,
    /// The offset of the next one; 0 past the end.
    next: u64,
    left: u32,
}

impl<'d> Config<'d> {
    /// The device's capabilities (PCI 3.0 §6.7), in the order of their list. A device may have several with
    /// one ID.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use vfio_remap::{Device, emulated::{Edu, Emulated}};
    /// # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
    /// for capability in device.config()?.capabilities() {
    ///     let capability = capability?;
    ///     println!("{:#04x} at {:#x}", capability.id, capability.offset);
    /// }
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// An item is `Malformed` if the list loops or points into the header, or the transport's error. An error
    /// is the last item.
    pub fn capabilities(&self) -> Capabilities<'d> {
        Capabilities { config: *self, next: None, left: MOST }
    }

    /// The device's extended capabilities (PCIe 5.0 §7.6), in the order of their list; none if configuration
    /// space has 256 bytes.
    ///
    /// # Errors
    /// As [`capabilities`](Self::capabilities).
    pub fn extended_capabilities(&self) -> ExtendedCapabilities<'d> {
        ExtendedCapabilities { config: *self, next: EXTENDED, left: MOST_EXTENDED }
    }

    /// The first extended capability with this ID; `None` if there is none.
    ///
    /// # Errors
    /// As [`extended_capabilities`](Self::extended_capabilities).
    pub fn extended_capability(&self, id: u16) -> Result<Option<ExtendedCapability>> {
        let wanted =
            |found: &Result<ExtendedCapability>| found.as_ref().map_or(true, |it| it.id == id);
        self.extended_capabilities().find(wanted).transpose()
    }
}

impl Capabilities<'_> {
    fn read_next(&mut self) -> Result<Option<Capability>> {
        let config = &self.config;
        let offset = match self.next {
            Some(next) => next,
            None if config.present_u16(STATUS)? & STATUS_CAPABILITIES == 0 => 0,
            None => pointer(config.read_u8(FIRST)?),
        };
        if offset == 0 {
            return Ok(None);
        }
        if offset < 0x40 {
            return Err(config.malformed(format!("a capability at {offset:#x} lies in the header")));
        }
        if self.left == 0 {
            return Err(config.malformed("the capability list loops".to_owned()));
        }
        self.left -= 1;
        let [id, next] = config.present_u16(offset)?.to_le_bytes();
        self.next = Some(pointer(next));
        Ok(Some(Capability { id, offset }))
    }
}

/// The two lowest bits of a pointer are reserved.
fn pointer(byte: u8) -> u64 {
    u64::from(byte & !3)
}

impl Iterator for Capabilities<'_> {
    type Item = Result<Capability>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.read_next().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.next = Some(0);
        }
        item
    }
}

impl ExtendedCapabilities<'_> {
    fn read_next(&mut self) -> Result<Option<ExtendedCapability>> {
        let config = &self.config;
        if self.left == MOST_EXTENDED && config.size()? < END {
            return Ok(None);
        }
        while self.next != 0 {
            let offset = self.next;
            if offset < EXTENDED {
                let reason =
                    format!("an extended capability at {offset:#x} lies before {EXTENDED:#x}");
                return Err(config.malformed(reason));
            }
            if self.left == 0 {
                return Err(config.malformed("the list of extended capabilities loops".to_owned()));
            }
            self.left -= 1;
            let header = config.read_u32(offset)?;
            if header == u32::MAX {
                // There is no extended configuration space, or the device was removed: then its vendor ID reads
                // all ones, too.
                config.present_u16(VENDOR)?;
                return Ok(None);
            }
            self.next = u64::from(header >> 20 & !3);
            let (id, version) = (header as u16, (header >> 16 & 0xf) as u8);
            // The first ID is 0 if the device has no extended capabilities, or if Linux hides the first one
            // (drivers/vfio/pci/vfio_pci_config.c).
            if id != 0 {
                return Ok(Some(ExtendedCapability { id, version, offset }));
            }
        }
        Ok(None)
    }
}

impl Iterator for ExtendedCapabilities<'_> {
    type Item = Result<ExtendedCapability>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.read_next().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.next = 0;
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transport::{DeviceInfo, RegionInfo, Transport};
    use crate::{Device, Error, ErrorKind};

    /// A device that has only configuration space.
    #[derive(Debug)]
    struct Bytes(Vec<u8>);

    impl Transport for Bytes {
        fn info(&self) -> DeviceInfo {
            DeviceInfo { pci: true, ..DeviceInfo::new("bytes", 9) }
        }

        fn region(&self, index: u32) -> Result<RegionInfo> {
            if index == 7 {
                return Ok(RegionInfo::trapped(self.0.len() as u64));
            }
            Err(Error::new(ErrorKind::NotFound, "find", format!("region {index}")))
        }

        fn read_at(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
            let from = self.0.get(offset as usize..offset as usize + data.len());
            let from = from.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "read", "config"))?;
            data.copy_from_slice(from);
            Ok(())
        }

        fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
            Ok(())
        }
    }

    /// A device with these bytes at these offsets, and zero elsewhere.
    fn device(size: usize, bytes: &[(usize, &[u8])]) -> Device {
        let mut config = vec![0; size];
        for (at, bytes) in bytes {
            config[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Device::new(Arc::new(Bytes(config)))
    }

    fn extended(id: u16, version: u8, next: u32) -> [u8; 4] {
        (next << 20 | u32::from(version) << 16 | u32::from(id)).to_le_bytes()
    }

    fn places(device: &Device) -> Result<Vec<(u8, u64)>> {
        let all = device.config()?.capabilities();
        all.map(|one| one.map(|one| (one.id, one.offset))).collect()
    }

    fn extended_places(device: &Device) -> Result<Vec<(u16, u8, u64)>> {
        let all = device.config()?.extended_capabilities();
        all.map(|one| one.map(|one| (one.id, one.version, one.offset))).collect()
    }

    const LIST: (usize, &[u8]) = (6, &[0x10]);

    #[test]
    fn capabilities_come_in_order_and_repeat() {
        let device = device(
            256,
            &[LIST, (0x34, &[0x43]), (0x40, &[9, 0x81]), (0x80, &[0x11, 0x60]), (0x60, &[9, 0])],
        );
        assert_eq!(places(&device).unwrap(), [(9, 0x40), (0x11, 0x80), (9, 0x60)]);
        let config = device.config().unwrap();
        assert_eq!(config.capability(9).unwrap(), Some(Capability { id: 9, offset: 0x40 }));
        assert_eq!(config.capability(0x11).unwrap().unwrap().offset, 0x80);
        assert_eq!(config.capability(5).unwrap(), None);
        assert_eq!(extended_places(&device).unwrap(), [], "there is no room for any");
    }

    #[test]
    fn a_device_without_a_list_has_no_capabilities() {
        assert_eq!(places(&device(256, &[(0x34, &[0x40]), (0x40, &[9])])).unwrap(), []);
        assert_eq!(places(&device(256, &[LIST])).unwrap(), []);
    }

    #[test]
    fn identification_is_read_from_the_header() {
        let header = [0x86, 0x80, 0xd3, 0x10, 7, 0, 0x10, 0, 0x03, 0x02, 0x08, 0x01];
        let device = device(256, &[(0, &header)]);
        let config = device.config().unwrap();
        assert_eq!(config.vendor_id().unwrap(), 0x8086);
        assert_eq!(config.device_id().unwrap(), 0x10d3);
        assert_eq!(config.class_code().unwrap(), 0x010802);
    }

    #[test]
    fn a_broken_list_is_malformed_once() {
        for bytes in [&[LIST, (0x34, &[0x40]), (0x40, &[9, 0x40])][..], &[LIST, (0x34, &[0x10])]] {
            let device = device(256, bytes);
            let mut all = device.config().unwrap().capabilities();
            let error = all.find_map(std::result::Result::err).unwrap();
            assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
            assert!(all.next().is_none());
            let error = device.config().unwrap().capability(5).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
        }
    }

    #[test]
    fn extended_capabilities_come_in_order() {
        let device = device(
            4096,
            &[
                (0x100, &extended(1, 2, 0x200)),
                (0x200, &extended(0x0b, 1, 0xffc)),
                (0xffc, &extended(0x0b, 3, 0)),
            ],
        );
        let all = [(1, 2, 0x100), (0x0b, 1, 0x200), (0x0b, 3, 0xffc)];
        assert_eq!(extended_places(&device).unwrap(), all);
        let config = device.config().unwrap();
        assert_eq!(config.extended_capability(0x0b).unwrap().unwrap().offset, 0x200);
        assert_eq!(config.extended_capability(0x10).unwrap(), None);
    }

    #[test]
    fn a_first_extended_capability_may_be_hidden_or_missing() {
        let hidden = device(4096, &[(0x100, &extended(0, 0, 0x140)), (0x140, &extended(3, 1, 0))]);
        assert_eq!(extended_places(&hidden).unwrap(), [(3, 1, 0x140)]);
        assert_eq!(extended_places(&device(4096, &[])).unwrap(), []);
        assert_eq!(extended_places(&device(4096, &[(0x100, &[0xff; 4])])).unwrap(), []);
    }

    #[test]
    fn a_broken_extended_list_is_malformed_once() {
        let all_hidden = extended(0, 0, 0x100);
        for bytes in
            [&extended(1, 1, 0x100)[..], &extended(1, 1, 0x0fc), &extended(1, 1, 4), &all_hidden]
        {
            let device = device(4096, &[(0x100, bytes)]);
            let mut all = device.config().unwrap().extended_capabilities();
            let error = all.find_map(std::result::Result::err).unwrap();
            assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
            assert!(all.next().is_none());
        }
    }
}
