//! Which cards there are, and where they differ.

use std::fmt;

use vfio_remap::{Device, Error, ErrorKind, Result};

/// Where configuration space has the class, above the revision. Linux VFIO reads it from the device;
/// vendor and device ID it keeps.
const CLASS_CODE: u64 = 0x08;
const INTEL: u16 = 0x8086;

/// A card that the driver knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Model {
    /// Intel 82576, 8086:10c9: 16 queues in each direction, 24 addresses. Linux drives it by igb.
    I82576,
    /// Intel 82574L, 8086:10d3: 2 queues in each direction, 15 addresses. Linux drives it by e1000e.
    I82574,
}

impl Model {
    /// What a device is.
    ///
    /// # Errors
    /// `Gone` if nothing answers, `Unsupported` if it is another device, with its name.
    pub(crate) fn of(device: &Device) -> Result<Self> {
        let config = device.config()?;
        let class = config.read_u32(CLASS_CODE)?;
        if class == u32::MAX {
            return Err(Error::new(ErrorKind::Gone, "find", device.name())
                .with_reason("its configuration space reads all ones"));
        }
        Self::from_ids(device.name(), config.vendor_id()?, config.device_id()?, class >> 8)
    }

    /// What a device with these IDs and this class code is, as
    /// [`PciDevice`](https://docs.rs/vfio-remap/latest/vfio_remap/transport/struct.PciDevice.html) has them: to
    /// know before the device is bound to vfio-pci. `name` is what an error calls the device.
    ///
    /// ```
    /// use vfio_remap_ethernet::Model;
    ///
    /// assert_eq!(Model::from_ids("0000:00:05.0", 0x8086, 0x10c9, 0x02_0000)?, Model::I82576);
    /// assert!(Model::from_ids("0000:00:06.0", 0x1b36, 0x0010, 0x01_0802).is_err());
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Unsupported` if it is another device, with its name.
    pub fn from_ids(name: &str, vendor: u16, device: u16, class: u32) -> Result<Self> {
        match (vendor, device) {
            (INTEL, 0x10c9) => Ok(Self::I82576),
            (INTEL, 0x10d3) => Ok(Self::I82574),
            _ => Err(Error::new(ErrorKind::Unsupported, "drive", name)
                .with_reason(format!(
                    "it is {}, not one of the cards that this driver knows",
                    self::name(vendor, device, class)
                ))
                .with_advice("choose an Intel 82576 (8086:10c9) or 82574L (8086:10d3)")),
        }
    }

    /// Queues in each direction (82576 datasheet §1.4, 82574 datasheet, product features).
    pub const fn queues(self) -> u16 {
        match self {
            Self::I82576 => 16,
            Self::I82574 => 2,
        }
    }

    /// Where in BAR 0 a receive queue's registers begin (82576 §8.10, 82574 §10.2.5).
    pub(crate) const fn receive_ring(self, queue: u16) -> u64 {
        match self {
            Self::I82576 => 0xc000 + 0x40 * queue as u64,
            Self::I82574 => 0x2800 + 0x100 * queue as u64,
        }
    }

    /// Where in BAR 0 a transmit queue's registers begin (82576 §8.12, 82574 §10.2.6).
    pub(crate) const fn transmit_ring(self, queue: u16) -> u64 {
        match self {
            Self::I82576 => 0xe000 + 0x40 * queue as u64,
            Self::I82574 => 0x3800 + 0x100 * queue as u64,
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I82576 => "Intel 82576",
            Self::I82574 => "Intel 82574L",
        })
    }
}

/// What a person calls a device that is none of ours.
fn name(vendor: u16, device: u16, class: u32) -> String {
    let ids = format!("{vendor:04x}:{device:04x}");
    let card = match (vendor, device) {
        (INTEL, 0x10e6 | 0x10e7 | 0x1518 | 0x150d) => "an Intel 82576 for fibre or a backplane",
        (INTEL, 0x10e8 | 0x1526 | 0x150a) => "another card with the Intel 82576",
        (INTEL, 0x10ca) => "a virtual function of an Intel 82576",
        (INTEL, 0x10f6) => "an Intel 82574LA",
        (INTEL, 0x100e | 0x100f | 0x1004) => "an Intel 8254x (e1000)",
        (INTEL, 0x1533..=0x153b) => "an Intel I210 or I211",
        (INTEL, 0x1521..=0x1524) => "an Intel I350",
        (INTEL, 0x10fb | 0x1528 | 0x1563) => "an Intel 82599 or X540 (ixgbe)",
        (0x10ec, 0x8139) => "a Realtek 8139",
        (0x1af4, 0x1000 | 0x1041) => "a virtio network device",
        (0x15ad, 0x07b0) => "a VMware vmxnet3",
        _ => match class >> 16 {
            0x01 => "a mass storage controller",
            0x02 => "another network controller",
            0x03 => "a display controller",
            0x04 => "a multimedia controller",
            0x05 => "a memory controller",
            0x06 => "a bridge",
            0x07 => "a communication controller",
            0x08 => "a system peripheral",
            0x0c => "a serial bus controller",
            0x12 => "a processing accelerator",
            _ => "a device of another kind",
        },
    };
    format!("{card} ({ids}, class {class:06x})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_another_kind_is_named() {
        assert_eq!(
            name(0x8086, 0x100e, 0x02_0000),
            "an Intel 8254x (e1000) (8086:100e, class 020000)"
        );
        assert_eq!(
            name(0x1b36, 0x0010, 0x01_0802),
            "a mass storage controller (1b36:0010, class 010802)"
        );
    }

    #[test]
    fn tails_of_all_queues_lie_on_one_page() {
        for model in [Model::I82576, Model::I82574] {
            let last = model.queues() - 1;
            assert_eq!(model.receive_ring(0) >> 12, model.receive_ring(last) >> 12);
            assert_eq!(model.transmit_ring(0) >> 12, model.transmit_ring(last) >> 12);
            assert_ne!(model.receive_ring(0) >> 12, model.transmit_ring(0) >> 12);
        }
    }
}
