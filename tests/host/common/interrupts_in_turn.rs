//! Interrupts of edu, one kind after the other on a device that stays open.

use std::time::Duration;

use vfio_remap::Device;
use vfio_remap::device::Interrupt;

const TIME: Duration = Duration::from_secs(10);

/// Raises interrupts by INTx before and after MSI.
pub fn intx_works_before_and_after_msi(device: &Device) {
    let config = device.config().unwrap();
    config.set_memory_decoding(true).unwrap();
    config.set_bus_mastering(true).unwrap();
    let bar = device.bar(0).unwrap();
    let [causes, raise, acknowledge] =
        [0x24, 0x60, 0x64].map(|offset| bar.trapped_register::<u32>(offset).unwrap());
    for kind in [Interrupt::Intx, Interrupt::Msi, Interrupt::Intx, Interrupt::Msi, Interrupt::Intx]
    {
        let vectors = device.vectors(kind, 1).unwrap();
        for cause in 1..=3 {
            raise.write(cause).unwrap();
            assert_eq!(vectors.wait(0, TIME).unwrap(), 1, "{kind:?}, cause {cause}");
            assert_eq!(causes.read().unwrap(), cause);
            acknowledge.write(cause).unwrap();
            if kind == Interrupt::Intx {
                vectors.set_masked(0, false).unwrap();
            }
        }
        assert_eq!(vectors.take(0).unwrap(), None, "{kind:?}");
    }
}
