//! A device that is another one, and one that does not keep its promises.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_remap::emulated::{self, Activity, Bus, Emulated, Model, Nvme, Shape};
use vfio_remap::transport::{irq_index, region_index};

use super::*;

const ID: u64 = 0x00;
const CAUSES: u64 = 0x24;
const ACKNOWLEDGE: u64 = 0x64;

/// An edu that answers differently, and counts what is written to its registers.
struct Altered {
    edu: emulated::Edu,
    /// The registers that answer differently, and what.
    answers: &'static [(u64, u32)],
    /// Whether it raises another interrupt whenever one is acknowledged, and until when.
    nags: Option<Instant>,
    writes: Arc<AtomicU64>,
}

impl Model for Altered {
    fn shape(&self) -> Shape {
        self.edu.shape()
    }

    fn read(&mut self, bus: &Bus, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.edu.read(bus, region, offset, data)?;
        let nags = self.nags.is_none_or(|end| Instant::now() < end);
        let answer = self.answers.iter().find(|(register, _)| *register == offset);
        if let (Some((_, value)), true) = (answer.filter(|_| region == 0), nags) {
            data.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }

    fn write(&mut self, bus: &Bus, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.writes.fetch_add(u64::from(region != region_index::CONFIG), Ordering::Relaxed);
        if (region, offset) == (0, ACKNOWLEDGE) && self.nags.is_some() {
            bus.fire(irq_index::MSI, 0);
            return Ok(());
        }
        self.edu.write(bus, region, offset, data)
    }

    fn reset(&mut self, bus: &Bus) {
        self.edu.reset(bus);
    }

    fn poll(&mut self, bus: &Bus) -> Activity {
        self.edu.poll(bus)
    }
}

fn is_master(emulated: &Emulated) -> bool {
    let device = Device::new(Arc::new(emulated.clone()));
    let master = device.config().unwrap().read_u16(4).unwrap() & 4 != 0;
    device.close().unwrap();
    master
}

#[test]
fn another_device_is_named_and_not_written_to() {
    let nvme = Emulated::new(Nvme::new(Vec::new())).unwrap();
    let writes = Arc::new(AtomicU64::new(0));
    let altered = Altered {
        edu: emulated::Edu::new(),
        answers: &[(ID, 0x0100_00ee)],
        nags: None,
        writes: writes.clone(),
    };
    let altered = Emulated::new(altered).unwrap();
    for (device, says) in [(nvme, "not 1234:11e8"), (altered, "itself as 0x010000ee")] {
        let error = Edu::new(Device::new(Arc::new(device.clone())), Interrupt::Msi).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(!is_master(&device), "{says}");
    }
    assert_eq!(writes.load(Ordering::Relaxed), 0);
}

#[test]
fn a_device_that_raises_interrupts_without_a_cause_is_waited_for_once() {
    // Long after the limit it tells the truth, so that a driver without a limit ends, too.
    let end = Instant::now() + Duration::from_secs(20);
    let altered = Altered {
        edu: emulated::Edu::new(),
        answers: &[(CAUSES, 0)],
        nags: Some(end),
        writes: Arc::default(),
    };
    let device = Device::new(Arc::new(Emulated::new(altered).unwrap()));
    let mut edu = Edu::new(device, Interrupt::Msi).unwrap();
    edu.timeout = Duration::from_millis(200);
    let error = edu.factorial(5).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    edu.close().unwrap();
}
