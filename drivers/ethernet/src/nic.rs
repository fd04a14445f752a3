//! A card: what there is one of, whichever threads send and receive.

mod filters;
mod recovery;
mod rss;

use std::fmt;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vfio_remap::device::{BufferRequest, CloseError, DmaSpace, IovaPlacement, Vector};
use vfio_remap::transport::AddressSpaceId;
use vfio_remap::{Device, Error, ErrorKind, IoRegisterBlock, Result};

use super::address::MacAddress;
use super::descriptors::{self, Descriptors};
use super::hardware::Hardware;
use super::interrupts::{Interrupts, Waker, fires};
use super::model::Model;
use super::phy::Link;
use super::pool::{Frame, Pool};
use super::receive::Receiver;
use super::registers::Ring;
use super::settings::Settings;
use super::statistics::Statistics;
use super::transmit::Transmitter;
use super::wait;

/// Which way a queue goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Receive,
    Transmit,
}

/// Memory that the card was told of.
#[derive(Debug)]
pub struct Memory {
    #[expect(dead_code, reason = "it is held, and not looked at")]
    pub ring: Option<Descriptors>,
    pub frames: Vec<Frame>,
}

/// A queue that the card knows.
pub struct Started {
    pub ring: IoRegisterBlock<Ring>,
    pub descriptors: Descriptors,
    pub waker: Waker,
    /// The generation of the card that knows it.
    pub generation: u32,
}

/// A pair of queues, for one thread; or one for each of two.
#[derive(Debug)]
#[non_exhaustive]
pub struct QueuePair {
    /// What comes.
    pub receiver: Receiver,
    /// What goes.
    pub transmitter: Transmitter,
}

/// A card that is up. Threads share it, and have a [`Receiver`] and a [`Transmitter`] each.
pub struct Nic {
    /// Left quiet before anything that it was told of goes.
    hardware: Hardware,
    interrupts: Option<Interrupts>,
    settings: Settings,
    /// As its EEPROM has it.
    hardware_address: MacAddress,
    space: DmaSpace,
    /// Counts resets.
    generation: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Numbers of pairs of queues that are in use, one bit each, in each direction.
    receiving: u32,
    transmitting: u32,
    statistics: Statistics,
    /// The link as it was looked at last.
    link: Option<Option<Link>>,
    filters: filters::Filters,
    /// By which key packets are hashed, and where hashes lead, if that was asked for.
    key: Option<[u8; 40]>,
    table: Option<Box<[u16; rss::TABLE]>>,
    /// Why the card could not be brought up again.
    failed: Option<Error>,
    /// What it was told of in generations below this it can no longer access: it was reset since.
    quiet_below: u32,
    /// What the card was told of, and may still access, and the queues that it belonged to.
    kept: Vec<(Direction, u16, Memory)>,
}

impl Nic {
    /// Brings a card up, whatever state it is in, and starts to negotiate with the other end of its cable.
    /// It receives once it has a queue.
    ///
    /// # Errors
    /// `Unsupported` if the device is no card of these, with what it is; `OutOfRange` if the settings ask
    /// for more than there is; `TimedOut` if it does not come up. It is then left quiet.
    pub fn new(device: Device, settings: Settings) -> Result<Arc<Self>> {
        let model = Model::of(&device)?;
        settings.check(model, device.name())?;
        let hardware = Hardware::find(device, model)?;
        hardware.reset()?;
        let hardware_address = hardware.address()?;
        let interrupts = if settings.interrupts {
            Some(Interrupts::new(&hardware, settings.queues)?)
        } else {
            None
        };
        let space = hardware.device.dma()?;
        let (generation, state) = (AtomicU32::new(0), Mutex::default());
        let nic =
            Self { hardware, interrupts, settings, hardware_address, space, generation, state };
        nic.set_up(&mut nic.state())?;
        Ok(Arc::new(nic))
    }

    /// Sets up a card that was reset, without queues, as it was asked for so far.
    fn set_up(&self, state: &mut State) -> Result<()> {
        let hardware = &self.hardware;
        hardware.set_up(self.settings.frames())?;
        hardware.set_address(0, Some(self.hardware_address))?;
        self.restore_filters(state)?;
        if self.settings.queues > 1 {
            hardware.spread(state.key.as_ref())?;
            self.lead(state, state.receiving)?;
        }
        if let Some(interrupts) = &self.interrupts {
            interrupts.route(hardware, self.settings.moderation)?;
        }
        hardware.negotiate()
    }

    /// How errors and logs name it.
    pub fn name(&self) -> &str {
        self.hardware.name()
    }

    /// The device, for what this driver does not do.
    pub fn device(&self) -> &Device {
        &self.hardware.device
    }

    /// Which card it is.
    pub fn model(&self) -> Model {
        self.hardware.model
    }

    /// How it is used.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its address, from its EEPROM (82576 datasheet §8.10.15 and §8.10.16).
    pub fn address(&self) -> MacAddress {
        self.hardware_address
    }

    /// The size that it takes receive buffers for, in bytes.
    pub fn buffer_size(&self) -> usize {
        1024 * usize::from(self.settings.frames().buffer_kib)
    }

    /// The longest frame that it sends and receives, with its header and without the checksum of Ethernet: as
    /// long as the MTU allows, with a VLAN tag.
    pub fn longest_frame(&self) -> usize {
        self.settings.longest_frame()
    }

    /// The identifier of its PHY (IEEE 802.3 §22.2.4.3.1), with its revision in the lowest four bits.
    ///
    /// # Errors
    /// `TimedOut` if firmware does not let go of the PHY; what the transport answers.
    pub fn phy_identifier(&self) -> Result<u32> {
        let _one = self.state();
        self.hardware.phy_identifier()
    }

    /// The link, if it is up (82576 datasheet §8.2.2).
    ///
    /// # Errors
    /// `Gone` if the card is not there any more; what the transport answers.
    pub fn link(&self) -> Result<Option<Link>> {
        self.hardware.link()
    }

    /// Waits until the link is up. After a card was brought up, that takes from half a second to some
    /// seconds.
    ///
    /// # Errors
    /// `TimedOut` if it is not in time; as [`link`](Self::link).
    pub fn wait_for_link(&self, timeout: Duration) -> Result<Link> {
        wait::until(timeout, || self.link())?.ok_or_else(|| {
            Error::new(ErrorKind::TimedOut, "use", self.name())
                .with_reason(format!(
                    "it has no link: the other end did not answer within {timeout:?}"
                ))
                .with_advice("plug the cable in, or see whether the other end is on")
        })
    }

    /// Waits until the link may have changed since this was called last, and whether it may have in time: by
    /// interrupt, or else by looking at it.
    ///
    /// # Errors
    /// As [`link`](Self::link).
    pub fn wait_for_link_change(&self, timeout: Duration) -> Result<bool> {
        if let Some(interrupts) = &self.interrupts {
            let fired = fires(&interrupts.link()?, timeout)?;
            if fired {
                self.hardware.rearm_link()?;
            }
            return Ok(fired);
        }
        let changed = wait::until(timeout, || {
            let link = self.link()?;
            let mut state = self.state();
            let changed = state.link != Some(link);
            state.link = Some(link);
            Ok(changed.then_some(()))
        })?;
        Ok(changed.is_some())
    }

    /// The vector that fires when the link changes, for an event loop; `None` without
    /// [interrupts](Settings::interrupts). Once it has fired, [`wait_for_link_change`] with no time to wait has
    /// it fire again.
    ///
    /// [`wait_for_link_change`]: Self::wait_for_link_change
    ///
    /// # Errors
    /// `OutOfRange` if the transport has lost it.
    pub fn link_vector(&self) -> Result<Option<Vector>> {
        self.interrupts.as_ref().map(Interrupts::link).transpose()
    }

    /// Negotiates with the other end of the cable once more: the link goes down meanwhile (IEEE 802.3 §28).
    ///
    /// # Errors
    /// As [`phy_identifier`](Self::phy_identifier).
    pub fn renegotiate(&self) -> Result<()> {
        let _one = self.state();
        self.hardware.negotiate()
    }

    /// What it has counted since it was brought up.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn statistics(&self) -> Result<Statistics> {
        let mut state = self.state();
        self.count(&mut state)?;
        Ok(state.statistics)
    }

    fn count(&self, state: &mut State) -> Result<()> {
        let mut statistics = state.statistics;
        statistics.collect(&self.hardware.port)?;
        // What a card that is gone answers are no counts.
        self.hardware.check()?;
        state.statistics = statistics;
        Ok(())
    }

    /// The address space that the card reaches: that of its pools.
    pub(crate) fn address_space(&self) -> AddressSpaceId {
        self.space.address_space()
    }

    /// `count` buffers for frames, of the size that the card takes them for.
    ///
    /// A receive queue holds as many as it has descriptors, less one, and a transmit queue those of the
    /// frames that are on their way; the others are for frames that the program has.
    ///
    /// # Errors
    /// `OutOfRange` if there would be none; as [`DmaSpace::buffer`].
    pub fn pool(&self, count: usize) -> Result<Pool> {
        Pool::new(&self.space, count, self.buffer_size())
    }

    /// The next pair of queues that nobody has, for one thread. The first frames are received once
    /// [`Receiver::receive`] has given the card buffers.
    ///
    /// # Errors
    /// `InUse` if all of [`Settings::queues`] are in use; what the card fails of.
    pub fn queue(self: &Arc<Self>) -> Result<QueuePair> {
        let number = {
            let mut state = self.state();
            let taken = state.receiving | state.transmitting;
            let free = (0..self.settings.queues).find(|queue| taken & 1 << queue == 0);
            let number = free.ok_or_else(|| {
                Error::new(ErrorKind::InUse, "take", format!("a queue of {}", self.name()))
                    .with_reason(format!("all {} are in use", self.settings.queues))
                    .with_advice("stop one, or bring the card up with more (Settings::queues)")
            })?;
            state.receiving |= 1 << number;
            state.transmitting |= 1 << number;
            number
        };
        let receiver = Receiver::new(self.clone(), number)
            .inspect_err(|_| self.state().forget(Direction::Transmit, number))?;
        // If that fails, the receiver is dropped, and with it its number.
        let transmitter = Transmitter::new(self.clone(), number)?;
        Ok(QueuePair { receiver, transmitter })
    }

    /// How a queue is waited for.
    fn waker(&self, direction: Direction, queue: u16) -> Result<Waker> {
        match &self.interrupts {
            Some(interrupts) => interrupts.of(&self.hardware, direction, queue),
            None => Ok(Waker::none()),
        }
    }

    pub(crate) fn hardware(&self) -> &Hardware {
        &self.hardware
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a ring of `entries`, at the registers at `offset`, and tells the card of it.
    ///
    /// # Errors
    /// Its number is then nobody's, unless the card may still access the ring.
    pub(crate) fn start(
        &self,
        direction: Direction,
        queue: u16,
        offset: u64,
        entries: usize,
    ) -> Result<Started> {
        let made = self.descriptors(entries).and_then(|descriptors| {
            Ok((self.hardware.ring(offset)?, descriptors, self.waker(direction, queue)?))
        });
        let (ring, descriptors, waker) =
            made.inspect_err(|_| self.state().forget(direction, queue))?;
        let iova = descriptors.iova(0).0;
        // What all queues share is changed by one at a time.
        let mut state = self.state();
        self.ensure_set_up(&mut state).inspect_err(|_| state.forget(direction, queue))?;
        let generation = self.generation();
        let started = self.tell(&state, direction, &ring, iova, entries);
        drop(state);
        match started {
            Ok(()) => Ok(Started { ring, descriptors, waker, generation }),
            Err(error) => {
                let memory = Memory { ring: Some(descriptors), frames: Vec::new() };
                self.stop(direction, queue, &ring, generation, memory)
                    .inspect_err(|stop| log::warn!("{}: {stop}", self.name()))
                    .ok();
                Err(error)
            }
        }
    }

    /// Tells the card of a ring, which is empty.
    fn tell(
        &self,
        state: &State,
        direction: Direction,
        ring: &IoRegisterBlock<Ring>,
        iova: u64,
        entries: usize,
    ) -> Result<()> {
        match direction {
            Direction::Receive => {
                let frames = self.settings.frames();
                self.hardware.start_receive(ring, iova, entries, frames)?;
                self.lead(state, state.receiving)
            }
            Direction::Transmit => self.hardware.start_transmit(ring, iova, entries),
        }
    }

    /// Memory for a ring.
    fn descriptors(&self, entries: usize) -> Result<Descriptors> {
        let size = entries * descriptors::SIZE;
        let placement = IovaPlacement::default().aligned(4096);
        let buffer = self.space.buffer_with(BufferRequest::new(size).placement(placement))?;
        Ok(Descriptors::new(buffer.slice(..size)?)?)
    }

    /// Has the card forget a ring that it knew in a generation; the memory again, which it no longer accesses.
    ///
    /// # Errors
    /// Why it may still: the memory is then kept here until it cannot.
    pub(crate) fn stop(
        &self,
        direction: Direction,
        queue: u16,
        ring: &IoRegisterBlock<Ring>,
        generation: u32,
        memory: Memory,
    ) -> Result<Memory> {
        let mut state = self.state();
        if generation < state.quiet_below {
            state.forget(direction, queue);
            return Ok(memory);
        }
        let others = state.others(direction, queue);
        let stopped = match direction {
            _ if state.failed.is_some() => state.failed.clone().map_or(Ok(()), Err),
            Direction::Receive => {
                // Flows go elsewhere first.
                let receiving = state.receiving & !(1 << queue);
                self.lead(&state, receiving).and_then(|()| self.hardware.stop_receive(ring, others))
            }
            Direction::Transmit => self.hardware.stop_transmit(ring, others),
        };
        match stopped {
            Ok(()) => {
                state.forget(direction, queue);
                Ok(memory)
            }
            // Its number stays taken until the card was reset: nobody knows what it makes of the queue.
            Err(error) => {
                state.kept.push((direction, queue, memory));
                Err(error)
            }
        }
    }

    /// Stops the card, which is left quiet, and closes the device.
    ///
    /// # Errors
    /// `InUse` while queues or clones exist: the error returns the card, which still works. `InUse` while
    /// pools or frames exist: the card is then left quiet anyway.
    pub fn close(self: Arc<Self>) -> std::result::Result<(), CloseError<Arc<Self>>> {
        let nic = Arc::try_unwrap(self).map_err(|nic| {
            let error = Error::new(ErrorKind::InUse, "stop", nic.name())
                .with_reason("it still has queues, or there are clones of its Arc")
                .with_advice("stop or drop them first");
            CloseError::in_use(error, nic)
        })?;
        let device = nic.hardware.device.clone();
        drop(nic);
        match Arc::into_inner(device) {
            Some(device) => Ok(device.close().map_err(Error::from)?),
            None => Ok(()),
        }
    }
}

impl State {
    fn users(&mut self, direction: Direction) -> &mut u32 {
        match direction {
            Direction::Receive => &mut self.receiving,
            Direction::Transmit => &mut self.transmitting,
        }
    }

    fn forget(&mut self, direction: Direction, queue: u16) {
        *self.users(direction) &= !(1 << queue);
    }

    fn others(&mut self, direction: Direction, queue: u16) -> bool {
        *self.users(direction) & !(1 << queue) != 0
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let kept = std::mem::take(&mut state.kept);
        if kept.is_empty() {
            return;
        }
        if let Err(error) = self.hardware.quieten() {
            log::error!(
                "{}: {error}; memory that it may still access is not released",
                self.name()
            );
            std::mem::forget(kept);
        }
    }
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nic({}, {}, {})", self.name(), self.model(), self.hardware_address)
    }
}
