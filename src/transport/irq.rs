//! Interrupts of a device, as a transport describes them.

/// The interrupt indexes of a PCI device (`linux/vfio.h`).
pub mod irq_index {
    /// The legacy interrupt, level-triggered.
    pub const INTX: u32 = 0;
    /// Message-signalled interrupts.
    pub const MSI: u32 = 1;
    /// Message-signalled interrupts, extended.
    pub const MSIX: u32 = 2;
    /// Uncorrectable errors of the device.
    pub const ERR: u32 = 3;
    /// The kernel requests that the device be released.
    pub const REQ: u32 = 4;
}

/// An interrupt index: how many vectors it has, and what they support (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// The number of vectors; 0 if the device has no such interrupt.
    pub count: u32,
    /// Whether vectors can signal an eventfd.
    pub eventfd: bool,
    /// Whether a vector can be masked and unmasked.
    pub maskable: bool,
    /// Whether a vector is masked when it fires, and must be unmasked after it was handled.
    pub automasked: bool,
    /// Whether adding vectors requires disabling all of them first.
    pub noresize: bool,
}

impl IrqInfo {
    /// `count` vectors that can signal eventfds and have no other feature.
    pub fn eventfds(count: u32) -> Self {
        Self { count, eventfd: true, ..Self::default() }
    }

    /// The same vectors, each of which can be masked and unmasked.
    #[must_use]
    pub fn with_masking(self) -> Self {
        Self { maskable: true, ..self }
    }

    /// The same vectors, which can be masked, and each of which is masked when it fires, as an INTx is.
    #[must_use]
    pub fn with_automasking(self) -> Self {
        Self { maskable: true, automasked: true, ..self }
    }

    /// The same vectors, all of which must be disabled before one is added.
    #[must_use]
    pub fn with_noresize(self) -> Self {
        Self { noresize: true, ..self }
    }
}
