//! The controller's registers (NVMe Base 1.4 §3.1), but for the doorbells.
//!
//! They are reached by reads and writes of the device's file: they are looked at seldom, and a
//! controller that has gone answers such an access with an error and not with a signal.

use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::{Device, Error, ErrorKind, IoRegister, Result};

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

/// Where the doorbells begin.
pub const DOORBELLS: u64 = 0x1000;

/// What CAP says (NVMe Base 1.4 §3.1.1).
#[derive(Clone, Copy, Debug)]
pub struct Capabilities(u64);

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
        Duration::from_millis(500) * ((self.0 >> 24 & 0xff) as u32).max(1)
    }

    /// The smallest page, as a power of two.
    pub fn page_shift(self) -> u32 {
        12 + (self.0 >> 48 & 0xf) as u32
    }

    /// Whether it has the NVM command set.
    pub fn has_nvm_commands(self) -> bool {
        self.0 & 1 << 37 != 0
    }
}

#[derive(Debug)]
pub struct Registers {
    name: String,
    capabilities: [IoRegister<u32>; 2],
    version: IoRegister<u32>,
    configuration: IoRegister<u32>,
    status: IoRegister<u32>,
    admin_sizes: IoRegister<u32>,
    admin_submissions: [IoRegister<u32>; 2],
    admin_completions: [IoRegister<u32>; 2],
}

impl Registers {
    pub fn new(device: &Device) -> Result<Self> {
        let bar = device.bar(0)?;
        let register = |offset| bar.trapped::<u32>(offset);
        let pair = |offset| Ok::<_, Error>([bar.trapped(offset)?, bar.trapped(offset + 4)?]);
        Ok(Self {
            name: device.name().to_owned(),
            capabilities: pair(0x00)?,
            version: register(0x08)?,
            configuration: register(0x14)?,
            status: register(0x1c)?,
            admin_sizes: register(0x24)?,
            admin_submissions: pair(0x28)?,
            admin_completions: pair(0x30)?,
        })
    }

    /// What the controller can do; `Gone` where nothing answers.
    pub fn capabilities(&self) -> Result<Capabilities> {
        let [low, high] = &self.capabilities;
        match (low.read()?, high.read()?) {
            (u32::MAX, u32::MAX) => Err(self.gone("read the capabilities of")),
            (low, high) => Ok(Capabilities(u64::from(low) | u64::from(high) << 32)),
        }
    }

    /// The version of the specification that it follows, as in "1.4".
    pub fn version(&self) -> Result<String> {
        let version = self.version.read()?;
        let (major, minor, rest) = (version >> 16, version >> 8 & 0xff, version & 0xff);
        Ok(match rest {
            0 => format!("{major}.{minor}"),
            _ => format!("{major}.{minor}.{rest}"),
        })
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
        let failed = |reason| Err(Error::new(ErrorKind::Os, "use", &self.name).because(reason));
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
        self.wait("enable", "become ready", timeout, |status| status & READY != 0)
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
        }
        // Fatal or not: being disabled is how it recovers.
        let start = Instant::now();
        while self.status("disable")? & READY != 0 {
            self.patience(start, timeout, "disable", "cease being ready")?;
        }
        match self.configuration.read()? & ENABLE {
            0 => Ok(()),
            _ => Err(Error::new(ErrorKind::Malformed, "disable", &self.name)
                .because("its enable bit (CC.EN) stays set")),
        }
    }

    /// Waits until a controller that is being enabled is ready: to disable it earlier has no defined
    /// result (NVMe Base 1.4 §3.1.5, CC.EN). One that does not become ready is disabled all the same.
    fn finish_enabling(&self, timeout: Duration) -> Result<()> {
        let start = Instant::now();
        while self.status("disable")? & (READY | FATAL | SHUTDOWN_STATE) == 0 {
            if let Err(error) = self.patience(start, timeout, "disable", "become ready") {
                log::info!("nvme: {error}");
                break;
            }
        }
        Ok(())
    }

    /// Has the controller write back what it must, and waits until it has.
    pub fn shut_down(&self, timeout: Duration) -> Result<()> {
        let configuration = self.configuration.read()? & !(3 << 14);
        self.configuration.write(configuration | SHUTDOWN)?;
        self.wait("shut down", "shut down", timeout, |status| status & SHUTDOWN_STATE == SHUT_DOWN)
    }

    /// Waits until the status is as wanted; an error where it is fatal or time is over.
    fn wait(
        &self,
        operation: &'static str,
        what: &'static str,
        timeout: Duration,
        wanted: impl Fn(u32) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let status = self.status(operation)?;
            if status & FATAL != 0 {
                return Err(Error::new(ErrorKind::Os, operation, &self.name)
                    .because("its status is fatal (CSTS.CFS)"));
            }
            if wanted(status) {
                return Ok(());
            }
            self.patience(start, timeout, operation, what)?;
        }
    }

    fn patience(
        &self,
        start: Instant,
        timeout: Duration,
        operation: &'static str,
        what: &'static str,
    ) -> Result<()> {
        let waited = start.elapsed();
        if waited > timeout {
            return Err(Error::new(ErrorKind::Os, operation, &self.name).because(format!(
                "it did not {what} within the {:.1} seconds that it asks for",
                timeout.as_secs_f64()
            )));
        }
        // Real ones take milliseconds, emulated ones none.
        thread::sleep((waited / 8).clamp(Duration::from_micros(20), Duration::from_millis(5)));
        Ok(())
    }

    fn gone(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Gone, operation, &self.name)
            .because("its registers read all ones")
            .remedy("look whether it is still there, and powered")
    }
}
