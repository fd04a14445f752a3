//! The controller's registers (NVMe Base 1.4 §3.1), but for the doorbells.
//!
//! They are read and written through a window of their own where the device can map them, as one access
//! each, and by the transport's calls where it cannot.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::{Device, Error, ErrorKind, IoRegister, Placement, Result};

use super::bring_up::has_gone;

/// CC: enabled.
const ENABLE: u32 = 1;
/// CC: a shutdown is asked for, with all that needs to be written back.
const SHUTDOWN: u32 = 1 << 14;
/// CC: entries of 64 and of 16 bytes, as powers of two.
const ENTRY_SIZES: u32 = 4 << 20 | 6 << 16;

/// CSTS: ready; failed for good until it is reset; shut down.
const READY: u32 = 1;
const FATAL: u32 = 1 << 1;
const SHUT_DOWN: u32 = 2 << 2;
const SHUTDOWN_STATE: u32 = 3 << 2;

/// VS of the version that has lists of namespaces (NVMe Base 1.1).
pub const VERSION_1_1: u32 = 0x0001_0100;

/// Where the doorbells begin.
pub const DOORBELLS: u64 = 0x1000;

/// What CAP says (NVMe Base 1.4 §3.1.1), and how long it may take to become ready (NVMe Base 2.0, CRTO).
#[derive(Clone, Copy, Debug)]
pub struct Capabilities(u64, u16);

impl Capabilities {
    /// The most entries of a queue.
    pub fn entries(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }

    /// From one doorbell to the next, in bytes.
    pub fn doorbell_stride(self) -> u64 {
        4 << (self.0 >> 32 & 0xf)
    }

    /// How long it may take to become ready, or to cease being so.
    pub fn timeout(self) -> Duration {
        // Half seconds; a controller that says none still takes a moment.
        Duration::from_millis(500) * ((self.0 >> 24 & 0xff) as u32).max(self.1.into()).max(1)
    }

    /// The smallest page, as a power of two.
    pub fn page_shift(self) -> u32 {
        12 + (self.0 >> 48 & 0xf) as u32
    }

    /// Whether it has the NVM command set. One that names no command sets has this one: so do some
    /// that follow an early version.
    pub fn has_nvm_commands(self) -> bool {
        self.0 & 1 << 37 != 0 || self.0 >> 37 & 0xff == 0
    }
}

#[derive(Debug)]
pub struct Registers {
    device: Arc<Device>,
    /// How long they are left alone after a disable.
    disable_delay: Duration,
    capabilities: [IoRegister<u32>; 2],
    version: IoRegister<u32>,
    configuration: IoRegister<u32>,
    status: IoRegister<u32>,
    admin_sizes: IoRegister<u32>,
    admin_submissions: [IoRegister<u32>; 2],
    admin_completions: [IoRegister<u32>; 2],
    ready_timeouts: IoRegister<u32>,
}

impl Registers {
    pub fn new(device: &Arc<Device>, disable_delay: Duration) -> Result<Self> {
        let bar = device.bar(0)?;
        let window = bar.map(..DOORBELLS, Placement::Anywhere);
        let window = window
            .inspect_err(|failed| log::info!("nvme: registers by calls of the transport: {failed}"))
            .ok();
        let register = |offset: u64| match &window {
            Some(window) => window.register::<u32>(offset as usize).map(IoRegister::from),
            None => bar.trapped::<u32>(offset),
        };
        let pair = |offset| Ok::<_, Error>([register(offset)?, register(offset + 4)?]);
        Ok(Self {
            device: device.clone(),
            disable_delay,
            capabilities: pair(0x00)?,
            version: register(0x08)?,
            configuration: register(0x14)?,
            status: register(0x1c)?,
            admin_sizes: register(0x24)?,
            admin_submissions: pair(0x28)?,
            admin_completions: pair(0x30)?,
            ready_timeouts: register(0x68)?,
        })
    }

    /// What the controller can do; `Gone` where nothing answers, though somebody else may have disabled
    /// the controller just before.
    pub fn capabilities(&self) -> Result<Capabilities> {
        let [low, high] = &self.capabilities;
        let start = Instant::now();
        let (low, high) = loop {
            let waited = start.elapsed();
            let (low, high) = (low.read()?, high.read()?);
            if low != u32::MAX && high != u32::MAX {
                break (low, high);
            }
            if waited > self.disable_delay || self.has_gone() {
                return Err(self.gone("read the capabilities of"));
            }
            pause(waited);
        };
        // CAP.CRMS: CRTO says how long (NVMe Base 2.0 §3.1.3.1, §3.1.3.20).
        let ready = if high & 1 << 27 != 0 { self.ready_timeouts.read()? as u16 } else { 0 };
        Ok(Capabilities(u64::from(low) | u64::from(high) << 32, ready))
    }

    /// The version of the specification that it follows: major, minor and tertiary number in bits 31:16,
    /// 15:8 and 7:0.
    pub fn version(&self) -> Result<u32> {
        match self.version.read()? {
            u32::MAX => Err(self.gone("read the version of")),
            version => Ok(version),
        }
    }

    fn status(&self, operation: &'static str) -> Result<u32> {
        match self.status.read()? {
            u32::MAX => Err(self.gone(operation)),
            status => Ok(status),
        }
    }

    /// An error where the controller does not work: it has failed, was reset by somebody, or has gone.
    pub fn check(&self) -> Result<()> {
        let status = self.status("ask")?;
        let failed =
            |reason| Err(Error::new(ErrorKind::Os, "use", self.device.name()).because(reason));
        if status & FATAL != 0 {
            return failed("its status is fatal (CSTS.CFS)");
        }
        if status & READY == 0 {
            return failed("it is not ready: something has reset it");
        }
        Ok(())
    }

    /// Enables the controller with these admin queues, and waits until it is ready.
    pub fn enable(
        &self,
        page_shift: u32,
        entries: u32,
        submissions: u64,
        completions: u64,
        timeout: Duration,
    ) -> Result<()> {
        let last = entries - 1;
        self.admin_sizes.write(last << 16 | last)?;
        let places =
            [(&self.admin_submissions, submissions), (&self.admin_completions, completions)];
        for ([low, high], iova) in places {
            low.write(iova as u32)?;
            high.write((iova >> 32) as u32)?;
        }
        self.configuration.write(ENTRY_SIZES | (page_shift - 12) << 7 | ENABLE)?;
        let status =
            self.wait("enable", "become ready", timeout, |status| status & (READY | FATAL) != 0)?;
        self.check_fatal("enable", status)
    }

    /// After a reset of the function, which disables the controller, too: waits until registers can be
    /// read.
    pub fn settle(&self, timeout: Duration) -> Result<()> {
        thread::sleep(self.disable_delay);
        self.wait("reset", "answer", timeout, |_| true).map(drop)
    }

    /// Disables the controller: from then on it reaches no memory, and knows of no queue but its admin
    /// queues' registers.
    pub fn disable(&self, timeout: Duration) -> Result<()> {
        let configuration = self.configuration.read()?;
        if configuration == u32::MAX {
            return Err(self.gone("disable"));
        }
        if configuration & ENABLE != 0 {
            self.finish_enabling(timeout)?;
            // A shutdown that is asked for with the bit is not meant.
            self.configuration.write(configuration & !(ENABLE | 3 << 14))?;
            thread::sleep(self.disable_delay);
        }
        // Fatal or not: being disabled is how it recovers.
        self.wait("disable", "cease being ready", timeout, |status| status & READY == 0)?;
        match self.configuration.read()? & ENABLE {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Malformed, "disable", self.device.name())
                .because("its enable bit (CC.EN) stays set")),
        }
    }

    /// Waits until a controller that is being enabled is ready: to disable it earlier has no defined
    /// result (NVMe Base 1.4 §3.1.5, CC.EN). One that does not become ready is disabled all the same.
    fn finish_enabling(&self, timeout: Duration) -> Result<()> {
        let settled = |status| status & (READY | FATAL | SHUTDOWN_STATE) != 0;
        match self.wait("disable", "become ready", timeout, settled) {
            Err(error) if error.kind() == ErrorKind::Os => {
                log::info!("nvme: {error}");
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Has the controller write back what it must, and waits until it has.
    pub fn shut_down(&self, timeout: Duration) -> Result<()> {
        let configuration = self.configuration.read()?;
        if configuration == u32::MAX {
            return Err(self.gone("shut down"));
        }
        self.configuration.write(configuration & !(3 << 14) | SHUTDOWN)?;
        let ended = |status| status & SHUTDOWN_STATE == SHUT_DOWN || status & FATAL != 0;
        let status = self.wait("shut down", "shut down", timeout, ended)?;
        self.check_fatal("shut down", status)
    }

    fn check_fatal(&self, operation: &'static str, status: u32) -> Result<()> {
        if status & FATAL == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Os, operation, self.device.name())
            .because("its status is fatal (CSTS.CFS)"))
    }

    /// Waits until the status is as wanted, and gives it; an error where time is over. All ones are no
    /// status yet, while the device is there: some controllers cannot be read for seconds after they were
    /// disabled.
    fn wait(
        &self,
        operation: &'static str,
        what: &'static str,
        timeout: Duration,
        wanted: impl Fn(u32) -> bool,
    ) -> Result<u32> {
        let start = Instant::now();
        loop {
            // Before it is read: time that passes afterwards is not held against the controller.
            let waited = start.elapsed();
            let status = self.status.read()?;
            let readable = status != u32::MAX;
            if readable && wanted(status) {
                return Ok(status);
            }
            if !readable && self.has_gone() {
                return Err(self.gone(operation));
            }
            if waited > timeout {
                let seconds = timeout.as_secs_f64();
                return Err(match readable {
                    true => {
                        Error::new(ErrorKind::Os, operation, self.device.name()).because(format!(
                            "it did not {what} within the {seconds:.1} seconds that it asks for"
                        ))
                    }
                    false => self.gone(operation),
                });
            }
            pause(waited);
        }
    }

    fn has_gone(&self) -> bool {
        has_gone(&self.device)
    }

    fn gone(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Gone, operation, self.device.name())
            .because("its registers read all ones")
            .remedy("check that it is still present, and powered")
    }
}

/// Between two looks, the longer the more time has passed: real controllers take milliseconds, emulated
/// ones none.
fn pause(waited: Duration) {
    thread::sleep((waited / 8).clamp(Duration::from_micros(20), Duration::from_millis(5)));
}
