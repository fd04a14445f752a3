// What a drop would undo at once cannot be left unused.
#![deny(unused_must_use)]

use vfio_remap::device::Interrupt;
use vfio_remap::{Device, Placement, Reservation, Result};

fn set_up(device: &Device) -> Result<()> {
    device.bar(0)?.map(.., Placement::Anywhere)?;
    device.dma()?.buffer(4096)?;
    device.vectors(Interrupt::Msi, 1)?;
    device.events()?;
    device.low_power()?;
    Reservation::new(4096)?;
    Ok(())
}

fn main() {
    let _ = set_up;
}
