//! Interrupts as a transport offers them.

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
    /// The kernel wants the device back.
    pub const REQ: u32 = 4;
}

/// An interrupt index: how many vectors it has, and what can be done with them
/// (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IrqInfo {
    /// How many vectors it has; 0 where the device has no such interrupt.
    pub count: u32,
    /// Whether vectors can signal an eventfd.
    pub eventfd: bool,
    /// Whether a vector can be masked and unmasked.
    pub maskable: bool,
    /// Whether a vector is masked when it fires, and is to be unmasked after it was served.
    pub automasked: bool,
    /// Whether vectors can be added only by setting up all of them again.
    pub noresize: bool,
}

impl IrqInfo {
    /// `count` vectors that signal eventfds, and no more.
    pub fn eventfds(count: u32) -> Self {
        Self { count, eventfd: true, ..Self::default() }
    }
}
