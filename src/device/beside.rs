//! Devices that share an address space for DMA.

use std::sync::Arc;

use super::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::transport::{PciAddress, Vfio};

impl Device {
    /// Opens the PCI device at `address` in the address space of this one: both reach the memory that is mapped
    /// for either, at the same addresses ([`DmaBuffer::address_space`](super::DmaBuffer::address_space)). So a
    /// buffer can go from one device to the other without a copy, for example a frame from the receiver of one
    /// network card to the transmitter of another.
    ///
    /// The new device is opened the same way as this one: by its group, in the same container, or by its own file,
    /// in the same address space of iommufd. Open all devices before the first call of [`dma`](Self::dma): each may
    /// narrow the range of addresses. They are closed in any order; the memory that one has mapped stays mapped
    /// until it is dropped, and keeps that device open.
    ///
    /// Without translation, or for other options, there is [`Vfio::options`]. Models in this process have
    /// `Emulated::beside`.
    ///
    /// ```no_run
    /// use vfio_remap::Device;
    ///
    /// let first = Device::open("0000:04:00.0")?;
    /// let second = first.open_beside("0000:05:00.0")?;
    /// let buffer = first.dma()?.buffer(4096)?;
    /// assert_eq!(buffer.address_space(), second.dma()?.address_space());
    /// # Ok::<(), vfio_remap::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Unsupported` if this device is not reached through Linux VFIO, or the other one cannot be opened the same
    /// way; the errors of [`Vfio::open`].
    pub fn open_beside<A>(&self, address: A) -> Result<Self>
    where
        A: TryInto<PciAddress>,
        Error: From<A::Error>,
    {
        let address: PciAddress = address.try_into()?;
        let Some(vfio) = self.transport_as::<Vfio>() else {
            return Err(Error::new(ErrorKind::Unsupported, "open", address)
                .with_reason(format!(
                    "it cannot share the address space of {}, which is not a device of Linux VFIO",
                    self.name()
                ))
                .with_advice("open it in its own address space: Device::open"));
        };
        Ok(Self::new(Arc::new(Vfio::options().beside(vfio).open::<PciAddress>(address)?)))
    }
}
