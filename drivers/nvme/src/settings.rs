//! The settings of a controller.

use std::time::Duration;

/// The settings of a controller.
///
/// ```
/// use std::time::Duration;
/// use vfio_remap_nvme::Settings;
///
/// // Four queues that wait for interrupts.
/// const SETTINGS: Settings = Settings::DEFAULT.with_queues(4).with_interrupts(true);
/// assert_eq!((SETTINGS.queues, SETTINGS.timeout), (4, Duration::from_secs(10)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// How many I/O queues to request: one for each thread.
    pub queues: u16,
    /// Entries of an I/O queue, of which one is always unused: 2 to 16384, or fewer if the controller has a
    /// lower limit (CAP.MQES). Other values are clamped.
    pub entries: u16,
    /// Whether to wait for completions by MSI-X instead of polling.
    pub interrupts: bool,
    /// With interrupts: how long [`IoQueue::wait`](crate::IoQueue::wait) polls at most before it sleeps. A queue
    /// measures how long its commands take. It polls twice as long as they take on average, and does not poll if
    /// they take longer than this, except now and then to find out. Zero to sleep at once.
    ///
    /// A sleep costs some ten microseconds: two system calls and two switches of context. Polling as long as that
    /// costs at most twice as much as the better choice would have.
    pub spin: Duration,
    /// After how many completions the controller is told that they were taken, by a write of the completion queue's
    /// head doorbell: half of the queue's entries unless this says otherwise. Values are clamped to the depth of the
    /// queue. Before a queue sleeps, it always tells the controller, which may hold the next interrupt back until
    /// then.
    ///
    /// The controller needs to know it only before its completion queue is full. On hardware, each doorbell is a
    /// write over PCIe that takes the processor as long as some hundred instructions, so fewer are better. An emulated
    /// controller may be faster with one command at a time if each completion is acknowledged (1), because the write
    /// keeps the emulator's thread awake.
    pub acknowledge_after: Option<u16>,
    /// The time limit of a command, after which it is aborted.
    pub timeout: Duration,
    /// The time limit of the abort, after which the controller is reset.
    pub grace: Duration,
    /// The time limit of a command of the admin queue.
    pub admin_timeout: Duration,
    /// How long the controller's registers cannot or must not be read after it was disabled. The driver does
    /// not access them for this time after each disable. [`Controller::new`](crate::Controller::new) may follow
    /// a disable by another program, so it waits this long for the registers to respond. Most controllers need no
    /// delay. Linux uses
    /// 2.3 seconds for some (`NVME_QUIRK_DELAY_BEFORE_CHK_RDY`).
    ///
    /// If it is zero and registers read all ones after a disable, the driver waits for them for the time in
    /// CAP.TO, while configuration space responds.
    pub disable_delay: Duration,
}

impl Settings {
    /// One polled queue of 256 entries, and a time limit of ten seconds for commands.
    pub const DEFAULT: Self = Self {
        queues: 1,
        entries: 256,
        interrupts: false,
        spin: Duration::from_micros(20),
        acknowledge_after: None,
        timeout: Duration::from_secs(10),
        grace: Duration::from_secs(1),
        admin_timeout: Duration::from_secs(5),
        disable_delay: Duration::ZERO,
    };

    /// The same settings with this value of [`queues`](Self::queues).
    #[must_use]
    pub const fn with_queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The same settings with this value of [`entries`](Self::entries).
    #[must_use]
    pub const fn with_entries(mut self, entries: u16) -> Self {
        self.entries = entries;
        self
    }

    /// The same settings with this value of [`interrupts`](Self::interrupts).
    #[must_use]
    pub const fn with_interrupts(mut self, interrupts: bool) -> Self {
        self.interrupts = interrupts;
        self
    }

    /// The same settings with this value of [`spin`](Self::spin).
    #[must_use]
    pub const fn with_spin(mut self, spin: Duration) -> Self {
        self.spin = spin;
        self
    }

    /// The same settings with this value of [`acknowledge_after`](Self::acknowledge_after).
    #[must_use]
    pub const fn with_acknowledge_after(mut self, completions: u16) -> Self {
        self.acknowledge_after = Some(completions);
        self
    }

    /// The same settings with this value of [`timeout`](Self::timeout).
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The same settings with this value of [`grace`](Self::grace).
    #[must_use]
    pub const fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// The same settings with this value of [`admin_timeout`](Self::admin_timeout).
    #[must_use]
    pub const fn with_admin_timeout(mut self, admin_timeout: Duration) -> Self {
        self.admin_timeout = admin_timeout;
        self
    }

    /// The same settings with this value of [`disable_delay`](Self::disable_delay).
    #[must_use]
    pub const fn with_disable_delay(mut self, disable_delay: Duration) -> Self {
        self.disable_delay = disable_delay;
        self
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}
