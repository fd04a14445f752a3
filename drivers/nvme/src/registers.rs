//! The controller's registers (NVMe Base 1.4 §3.1), but for the doorbells.
//!
//! They are one block: mapped if the device can map it, so that each access is one instruction, and
//! reached by the transport's calls if it cannot.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vfio_remap::{Device, Error, ErrorKind, IoRegisterBlock, Result, register_block};

register_block! {
    /// Addresses and CAP have 64 bits, and are accessed by halves: not every transport has accesses of 64
    /// bits.
    pub(super) Layout[0x1000] {
        /// CAP, bits 31:0.
        CAPABILITIES_LOW(ro u32 => CapabilitiesLow) @ 0x00 {
            /// MQES: entries of a queue, less one.
            pub last_entry: u16,
            __: u8,
            /// TO: in half seconds.
            pub timeout: u8,
        }
        /// CAP, bits 63:32.
        CAPABILITIES_HIGH(ro u32 => CapabilitiesHigh) @ 0x04 {
            /// DSTRD.
            #[bits(4)]
            pub doorbell_stride: u8,
            __: bool,
            /// CSS: bit 0 is the NVM command set.
            pub command_sets: u8,
            #[bits(3)]
            __: u8,
            /// MPSMIN: the smallest page is 2^(12 + this) bytes.
            #[bits(4)]
            pub smallest_page: u8,
            #[bits(7)]
            __: u8,
            /// CRMS, bit 0: CRTO is there.
            pub has_ready_timeouts: bool,
            #[bits(4)]
            __: u8,
        }
        /// VS.
        VERSION(ro u32 => Version) @ 0x08 {
            pub tertiary: u8,
            pub minor: u8,
            pub major: u16,
        }
        /// CC.
        CONFIGURATION(u32 => Configuration) @ 0x14 {
            /// EN.
            pub enabled: bool,
            #[bits(6)]
            __: u8,
            /// MPS: a page is 2^(12 + this) bytes.
            #[bits(4)]
            pub page: u8,
            #[bits(3)]
            __: u8,
            /// SHN.
            #[bits(2)]
            pub shutdown: u8,
            /// IOSQES: a power of two.
            #[bits(4)]
            pub submission_entry: u8,
            /// IOCQES: a power of two.
            #[bits(4)]
            pub completion_entry: u8,
            __: u8,
        }
        /// CSTS.
        STATUS(ro u32 => Status) @ 0x1c {
            /// RDY.
            pub ready: bool,
            /// CFS.
            pub fatal: bool,
            /// SHST.
            #[bits(2)]
            pub shutdown: u8,
            #[bits(28)]
            __: u32,
        }
        /// AQA.
        ADMIN_SIZES(u32 => AdminSizes) @ 0x24 {
            /// ASQS: entries, less one.
            pub last_submission: u16,
            /// ACQS: entries, less one.
            pub last_completion: u16,
        }
        /// ASQ.
        ADMIN_SUBMISSIONS(u32)[2] @ 0x28;
        /// ACQ.
        ADMIN_COMPLETIONS(u32)[2] @ 0x30;
        /// CRTO (NVMe Base 2.0 §3.1.3.20).
        READY_TIMEOUTS(ro u32 => ReadyTimeouts) @ 0x68 {
            /// CRWMT: in half seconds.
            pub with_media: u16,
            __: u16,
        }
    }
}

/// The offset of the class in configuration space, above the revision. Linux VFIO reads it from the device,
/// while it keeps copies of the vendor ID and the device ID.
pub const CLASS_CODE: u64 = 0x08;

/// Where the doorbells begin.
pub const DOORBELLS: u64 = 0x1000;

/// CC.SHN: a normal shutdown.
const SHUTDOWN_NORMAL: u8 = 1;
/// CSTS.SHST: no shutdown is asked for; it is complete.
const RUNNING: u8 = 0;
const SHUT_DOWN: u8 = 2;

/// The sizes of queue entries, as powers of two (NVMe Base 1.4 §4.2, §4.6).
const SUBMISSION_ENTRY: u8 = 6;
const COMPLETION_ENTRY: u8 = 4;

/// What the controller can do (CAP, NVMe Base 1.4 §3.1.1), and how long it may take to become ready.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    low: CapabilitiesLow,
    high: CapabilitiesHigh,
    ready_timeouts: ReadyTimeouts,
}

impl Capabilities {
    /// The most entries of a queue.
    pub fn entries(self) -> u32 {
        u32::from(self.low.last_entry()) + 1
    }

    /// From one doorbell to the next, in bytes.
    pub fn doorbell_stride(self) -> u64 {
        4 << self.high.doorbell_stride()
    }

    /// How long it may take to become ready, or to cease to be.
    pub fn timeout(self) -> Duration {
        // A controller that states 0 still takes a moment.
        let timeout = u16::from(self.low.timeout()).max(self.ready_timeouts.with_media()).max(1);
        Duration::from_millis(500) * timeout.into()
    }

    /// The smallest page, as a power of two.
    pub fn page_shift(self) -> u32 {
        12 + u32::from(self.high.smallest_page())
    }

    /// Whether it has the NVM command set. Some that follow an early version name no command set: they have
    /// this one.
    pub fn has_nvm_commands(self) -> bool {
        let sets = self.high.command_sets();
        sets == 0 || sets & 1 != 0
    }
}

/// Reads all ones: the controller does not answer.
fn is_absent(value: impl Into<u32>) -> bool {
    value.into() == u32::MAX
}

#[derive(Debug)]
pub struct Registers {
    device: Arc<Device>,
    /// How long they are left alone after a disable.
    disable_delay: Duration,
    block: IoRegisterBlock<Layout>,
}

impl Registers {
    pub fn new(device: &Arc<Device>, disable_delay: Duration) -> Result<Self> {
        let block = device.bar(0)?.block(0)?;
        Ok(Self { device: device.clone(), disable_delay, block })
    }

    /// What the controller can do; `Gone` where nothing answers, though somebody else may have disabled
    /// the controller just before.
    pub fn capabilities(&self) -> Result<Capabilities> {
        let start = Instant::now();
        let (low, high) = loop {
            let waited = start.elapsed();
            let low = self.block.read(Layout::CAPABILITIES_LOW)?;
            let high = self.block.read(Layout::CAPABILITIES_HIGH)?;
            if !is_absent(low) && !is_absent(high) {
                break (low, high);
            }
            if waited > self.disable_delay || self.has_gone() {
                return Err(self.gone("read the capabilities of"));
            }
            pause(waited);
        };
        let ready_timeouts = match high.has_ready_timeouts() {
            true => self.block.read(Layout::READY_TIMEOUTS)?,
            false => ReadyTimeouts::default(),
        };
        Ok(Capabilities { low, high, ready_timeouts })
    }

    /// The version of the specification that it follows.
    pub fn version(&self) -> Result<Version> {
        let version = self.block.read(Layout::VERSION)?;
        match is_absent(version) {
            true => Err(self.gone("read the version of")),
            false => Ok(version),
        }
    }

    /// An error if the controller does not work: it has failed, something has reset it, or it is gone.
    pub fn check(&self) -> Result<()> {
        let status = self.block.try_read(Layout::STATUS)?;
        if is_absent(status) {
            return Err(self.gone("use"));
        }
        self.check_fatal("use", status)?;
        match status.ready() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Os, "use", self.device.name())
                .with_reason("it is not ready: something has reset it")),
        }
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
        let last = (entries - 1) as u16;
        let sizes = AdminSizes::new().with_last_submission(last).with_last_completion(last);
        self.block.write(Layout::ADMIN_SIZES, sizes)?;
        let queues =
            [(Layout::ADMIN_SUBMISSIONS, submissions), (Layout::ADMIN_COMPLETIONS, completions)];
        for (register, iova) in queues {
            self.block.write(register.at(0), iova as u32)?;
            self.block.write(register.at(1), (iova >> 32) as u32)?;
        }
        let configuration = Configuration::new()
            .with_submission_entry(SUBMISSION_ENTRY)
            .with_completion_entry(COMPLETION_ENTRY)
            .with_page((page_shift - 12) as u8)
            .with_enabled(true);
        self.block.write(Layout::CONFIGURATION, configuration)?;
        let settled = |status: Status| status.ready() || status.fatal();
        let status = self.wait("enable", "become ready", timeout, settled)?;
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
        let configuration = self.configuration("disable")?;
        if configuration.enabled() {
            self.finish_enabling(timeout)?;
            // Both bits at once would ask for a shutdown, too.
            let disabled = configuration.with_enabled(false).with_shutdown(0);
            self.block.write(Layout::CONFIGURATION, disabled)?;
            thread::sleep(self.disable_delay);
        }
        // Fatal or not: a disable is how it recovers.
        self.wait("disable", "cease to be ready", timeout, |status| !status.ready())?;
        match self.configuration("disable")?.enabled() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Malformed, "disable", self.device.name())
                .with_reason("its enable bit (CC.EN) stays set")),
        }
    }

    fn configuration(&self, operation: &'static str) -> Result<Configuration> {
        let configuration = self.block.read(Layout::CONFIGURATION)?;
        match is_absent(configuration) {
            true => Err(self.gone(operation)),
            false => Ok(configuration),
        }
    }

    /// Waits until a controller that is being enabled is ready: to disable it earlier has no defined
    /// result (NVMe Base 1.4 §3.1.5, CC.EN). One that does not become ready is disabled all the same.
    fn finish_enabling(&self, timeout: Duration) -> Result<()> {
        let settled =
            |status: Status| status.ready() || status.fatal() || status.shutdown() != RUNNING;
        match self.wait("disable", "become ready", timeout, settled) {
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                log::info!("nvme: {error}");
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Has the controller write back what it must, and waits until it has.
    pub fn shut_down(&self, timeout: Duration) -> Result<()> {
        let configuration = self.configuration("shut down")?;
        self.block.write(Layout::CONFIGURATION, configuration.with_shutdown(SHUTDOWN_NORMAL))?;
        let ended = |status: Status| status.shutdown() == SHUT_DOWN || status.fatal();
        let status = self.wait("shut down", "shut down", timeout, ended)?;
        self.check_fatal("shut down", status)
    }

    fn check_fatal(&self, operation: &'static str, status: Status) -> Result<()> {
        if !status.fatal() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Os, operation, self.device.name())
            .with_reason("its status is fatal (CSTS.CFS)"))
    }

    /// Waits until the status is as wanted, and gives it; an error where time is over. All ones are no
    /// status yet, while the device is there: some controllers cannot be read for seconds after they were
    /// disabled.
    fn wait(
        &self,
        operation: &'static str,
        what: &'static str,
        timeout: Duration,
        wanted: impl Fn(Status) -> bool,
    ) -> Result<Status> {
        let start = Instant::now();
        loop {
            // Before it is read: time that passes afterwards is not held against the controller.
            let waited = start.elapsed();
            let status = self.block.read(Layout::STATUS)?;
            let readable = !is_absent(status);
            if readable && wanted(status) {
                return Ok(status);
            }
            if !readable && self.has_gone() {
                return Err(self.gone(operation));
            }
            if waited > timeout {
                let seconds = timeout.as_secs_f64();
                return Err(match readable {
                    true => Error::new(ErrorKind::TimedOut, operation, self.device.name())
                        .with_reason(format!(
                            "it did not {what} within the {seconds:.1} seconds that it asks for"
                        )),
                    false => self.gone(operation),
                });
            }
            pause(waited);
        }
    }

    /// Whether the device is gone. Registers alone may read all ones for a while.
    fn has_gone(&self) -> bool {
        self.device.gone()
    }

    fn gone(&self, operation: &'static str) -> Error {
        Error::new(ErrorKind::Gone, operation, self.device.name())
            .with_reason("its registers read all ones")
            .with_advice("check that it is still present, and powered")
    }
}

/// Between two looks, the longer the more time has passed: real controllers take milliseconds, emulated
/// ones none.
fn pause(waited: Duration) {
    thread::sleep((waited / 8).clamp(Duration::from_micros(20), Duration::from_millis(5)));
}
