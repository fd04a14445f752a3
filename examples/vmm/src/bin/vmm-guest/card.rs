//! An Intel 82574L that the kernel's driver has.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::pci::{PAGE, Pci, load, physical, store};
use crate::wait;

/// Interrupt cause set, interrupt mask, and the cause of the first transmit queue (Intel 82574 datasheet, §10.2.4).
const CAUSE_SET: u64 = 0xc8;
const MASK: u64 = 0xd0;
const TRANSMIT: u32 = 1 << 22;
/// How long the card waits after a message of vector 1, which the kernel's driver has for that cause, until it sends
/// another one; in units of 256 ns.
const THROTTLE: u64 = 0xe8 + 4;
const LONGEST: u32 = 0xffff;
/// Less than the longest time, 16.8 ms: the guest's clock may be fast.
const SURELY: Duration = Duration::from_millis(13);
/// Far more than that.
const OVER: Duration = Duration::from_millis(100);

/// Raises so many interrupts of the transmit queue, whose vector has this name, each when the kernel has handled the
/// last one.
///
/// QEMU's card sends a message again when the throttling time is over, even if nothing was raised meanwhile. If
/// the guest has not taken the message before, the two are one for it. So every second interrupt is
/// raised within that time: the later message is its own. This prints how many were raised too late for that.
pub fn raise(pci: &Pci, bar: u64, name: &str, count: u32) -> Result<()> {
    let registers = physical(pci.address(bar)?, PAGE as usize)?;
    let driver_has = load(&registers, THROTTLE)?;
    store(&registers, THROTTLE, LONGEST)?;
    let (mut throttled, mut late) = (None::<Instant>, 0);
    let mut total = handled(name)?;
    for _ in 0..count {
        // The card masks a cause when it sends the message, and the driver unmasks it at its handler's end.
        wait(|| Ok(load(&registers, MASK)? & TRANSMIT != 0))?;
        let (before, now) = (total, Instant::now());
        store(&registers, CAUSE_SET, TRANSMIT)?;
        let is_late = throttled.is_some_and(|since| since.elapsed() > SURELY);
        wait(|| {
            total = handled(name)?;
            Ok(total > before)
        })?;
        throttled = if throttled.is_none() { Some(now) } else { None };
        if is_late {
            late += 1;
            thread::sleep(OVER);
            (throttled, total) = (None, handled(name)?);
        }
    }
    store(&registers, THROTTLE, driver_has)?;
    println!("{name}: {count} interrupts, {late} late");
    Ok(())
}

/// How many interrupts of a vector the kernel has handled.
fn handled(name: &str) -> Result<u64> {
    let all = fs::read_to_string("/proc/interrupts")?;
    let mut words = all.lines().map(str::split_whitespace);
    let line = words.find(|words| words.clone().next_back() == Some(name));
    let counts = line.with_context(|| format!("there is no vector {name}"))?.skip(1);
    Ok(counts.map_while(|count| count.parse::<u64>().ok()).sum())
}
