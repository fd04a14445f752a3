//! The card from whatever state it is in to ready, and back to quiet.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::{Device, Error, ErrorKind, IoRegisterBlock, Result};

use super::address::MacAddress;
use super::model::Model;
use super::registers::{
    ADDRESS_VALID, Control, Port, QUEUE_SERVED, ReceiveChecksum, ReceiveControl, ReceiveFilter,
    Ring, RingControl, TransmitControl,
};
use super::wait;

/// How long a reset may take (82576 datasheet §4.2.1.6.1: some milliseconds).
const RESET: Duration = Duration::from_secs(1);
/// How long the card may go on accessing memory (82574 datasheet §3.1.3.10; Linux gives it 80 ms).
const MASTER_DISABLE: Duration = Duration::from_millis(100);
/// How long the registers are left alone after a reset, while the EEPROM is read.
const AFTER_RESET: Duration = Duration::from_millis(10);
/// How long EEPROM and firmware may then take: a card without either says nothing.
const CONFIGURED: Duration = Duration::from_millis(100);
/// How long a queue may take to start or stop.
const QUEUE: Duration = Duration::from_millis(200);
/// How long receiver and transmitter of the 82574 may take to finish what they are at, once they are
/// switched off: they do not say when they are done.
const FINISH: Duration = Duration::from_millis(10);

/// The EtherType of a VLAN tag (IEEE 802.1Q §9.4).
const VLAN_TYPE: u32 = 0x8100;
/// The time between packets that the 82574's datasheet asks for (§4.6.6 and §10.2.6.2). Only the first part counts
/// in full duplex.
const INTER_PACKET_GAP: u32 = 8 | 2 << 10 | 10 << 20;

/// The card. Dropped, it is left quiet: reset, and without leave to start accesses of its own.
#[derive(Debug)]
pub struct Hardware {
    pub device: Arc<Device>,
    pub model: Model,
    pub port: IoRegisterBlock<Port>,
}

/// What a receive ring is told of the buffers.
#[derive(Clone, Copy, Debug)]
pub struct Frames {
    /// The longest frame, with its header, a VLAN tag, and the checksum of Ethernet.
    pub longest: u32,
    /// The size of a buffer, in KiB.
    pub buffer_kib: u8,
}

impl Hardware {
    /// Looks at a device without changing anything but its memory decoding.
    pub fn find(device: Device, model: Model) -> Result<Self> {
        device.config()?.set_memory_decoding(true)?;
        let port = device.bar(0)?.block(0)?;
        Ok(Self { device: Arc::new(device), model, port })
    }

    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// The registers of a queue, in a window of their own if they can be mapped.
    pub fn ring(&self, offset: u64) -> Result<IoRegisterBlock<Ring>> {
        self.device.bar(0)?.block(offset)
    }

    /// An error if the card is not there any more.
    pub fn check(&self) -> Result<()> {
        if u32::from(self.port.read(Port::CTRL)?) == u32::MAX {
            return Err(Error::new(ErrorKind::Gone, "reach", self.name())
                .with_reason("its registers read all ones")
                .with_advice("see whether the card was removed, or has lost its power"));
        }
        Ok(())
    }

    /// Resets the card to where it interrupts nobody, accesses no memory, and knows of no ring (82576
    /// datasheet §4.2.1.6.1 and §4.5.4, 82574 datasheet §3.1.3.10 and §10.2.2.1).
    pub fn reset(&self) -> Result<()> {
        let port = &self.port;
        self.check()?;
        self.mask()?;
        port.write(Port::RCTL, ReceiveControl::new())?;
        port.write(Port::TCTL, TransmitControl::new().with_pad_short(true))?;
        // What is on its way ends before the reset, which would leave half an access on the bus.
        port.update(Port::CTRL, |control| control.with_master_disable(true))?;
        let idle = wait::until(MASTER_DISABLE, || {
            Ok((!port.read(Port::STATUS)?.master_enabled()).then_some(()))
        })?;
        if idle.is_none() {
            log::warn!("{}: it still accesses memory before its reset", self.name());
        }
        port.update(Port::CTRL, |control| control.with_reset(true))?;
        wait::pause(AFTER_RESET);
        let done = wait::until(RESET, || {
            let control = port.read(Port::CTRL)?;
            Ok((!control.reset() && u32::from(control) != u32::MAX).then_some(()))
        })?;
        if done.is_none() {
            self.check()?;
            return Err(Error::new(ErrorKind::TimedOut, "reset", self.name())
                .with_reason(format!("it was not done within {RESET:?} (CTRL.RST)"))
                .with_advice("reset the function, or take the card's power away"));
        }
        self.mask()?;
        self.wait_for_configuration()
    }

    /// Waits until EEPROM and firmware have set the registers up: not for long, as a card without them is
    /// usable, too.
    fn wait_for_configuration(&self) -> Result<()> {
        let port = &self.port;
        let function = 1 << port.read(Port::STATUS)?.function();
        let done = wait::until(CONFIGURED, || {
            let read = port.read(Port::EECD)?.read();
            let configured = self.model == Model::I82574
                || port.read(Port::EEMNGCTL)?.configured() & function != 0;
            Ok((read && configured).then_some(()))
        })?;
        if done.is_none() {
            log::debug!("{}: neither EEPROM nor firmware say that they are done", self.name());
        }
        Ok(())
    }

    /// No cause interrupts any more, and what has come is forgotten.
    fn mask(&self) -> Result<()> {
        self.port.write(Port::IMC, u32::MAX)?;
        if self.model == Model::I82576 {
            self.port.write(Port::EIMC, u32::MAX)?;
        }
        self.port.read(Port::ICR).map(drop)
    }

    /// Resets the card, if need be together with its function, after which it reaches no memory.
    pub fn reset_any(&self) -> Result<()> {
        let config = self.device.config()?;
        // A reset of the function, by whomever, may have cleared it.
        config.set_memory_decoding(true)?;
        let Err(error) = self.reset() else { return Ok(()) };
        log::warn!("{}: {error}; its function is reset", self.name());
        if let Err(second) = self.device.reset() {
            log::info!("{}: {second}", self.name());
            return Err(error);
        }
        config.set_memory_decoding(true)?;
        self.reset()
    }

    /// Sets up a card that was reset, without queues.
    pub fn set_up(&self, frames: Frames) -> Result<()> {
        self.device.config()?.set_bus_mastering(true)?;
        let port = &self.port;
        for word in 0..128 {
            port.write(Port::MTA.at(word), 0)?;
            port.write(Port::VFTA.at(word), 0)?;
        }
        // The first address is the card's own.
        for word in 2..32 {
            port.write(Port::RA.at(word), 0)?;
        }
        // No flow control: a receiver that is slow loses packets, and slows nobody down.
        port.write(Port::VET, VLAN_TYPE)?;
        for register in [Port::FCAL, Port::FCAH, Port::FCT, Port::FCRTL, Port::FCRTH] {
            port.write(register, 0)?;
        }
        port.update(Port::CTRL, |control: Control| {
            control
                .with_set_link_up(true)
                .with_full_duplex(true)
                .with_link_reset(false)
                .with_master_disable(false)
                .with_force_speed(false)
                .with_force_duplex(false)
                .with_receive_flow_control(false)
                .with_transmit_flow_control(false)
                .with_vlan(true)
        })?;
        port.update(Port::CTRL_EXT, |control| {
            let link_mode = if self.model == Model::I82576 { 0 } else { control.link_mode() };
            control.with_driver_loaded(true).with_link_mode(link_mode)
        })?;
        port.write(Port::MRQC, 0)?;
        self.prepare_receive(frames)?;
        self.prepare_transmit()
    }

    /// What all receive queues share (82576 datasheet §4.5.9, 82574 datasheet §4.6.5).
    fn prepare_receive(&self, frames: Frames) -> Result<()> {
        let port = &self.port;
        let checksum = ReceiveChecksum::new().with_ip(true).with_tcp_udp(true);
        port.write(Port::RXCSUM, checksum.with_no_packet_checksum(true))?;
        let mut control = ReceiveControl::new()
            .with_broadcast(true)
            .with_strip_crc(true)
            .with_discard_pause(true)
            .with_long_packets(frames.longest > 1522);
        match self.model {
            Model::I82576 => {
                port.write(Port::RLPML, frames.longest)?;
                // The first queue of each direction is enabled after a reset.
                for offset in [self.model.receive_ring(0), self.model.transmit_ring(0)] {
                    self.set_enabled(&self.ring(offset)?, false)?;
                }
            }
            Model::I82574 => {
                port.write(
                    Port::RFCTL,
                    ReceiveFilter::new()
                        .with_extended_descriptors(true)
                        .with_no_ack_acceleration(true),
                )?;
                if frames.buffer_kib != 2 {
                    control.set_buffer_kib(frames.buffer_kib);
                }
            }
        }
        port.write(Port::RCTL, control)
    }

    /// What all transmit queues share (82576 datasheet §4.5.10, 82574 datasheet §4.6.6).
    fn prepare_transmit(&self) -> Result<()> {
        let port = &self.port;
        if self.model == Model::I82574 {
            port.write(Port::TIPG, INTER_PACKET_GAP)?;
            for queue in 0..2 {
                port.update(Port::TARC.at(queue), |value| value | QUEUE_SERVED)?;
            }
        }
        let control = TransmitControl::new()
            .with_pad_short(true)
            .with_collision_threshold(15)
            .with_collision_distance(63)
            .with_retransmit_late_collision(true)
            .with_multiple_requests(self.model == Model::I82574);
        port.write(Port::TCTL, control)
    }

    /// The address that the EEPROM has given the card.
    pub fn address(&self) -> Result<MacAddress> {
        let address = self.read_address()?;
        if !address.is_station() {
            return Err(Error::new(ErrorKind::Malformed, "bring up", self.name())
                .with_reason(format!("its address is {address}, which no station can have"))
                .with_advice("give it one in its EEPROM"));
        }
        Ok(address)
    }

    pub fn read_address(&self) -> Result<MacAddress> {
        let (low, high) = Port::address_words(0);
        let (low, high) = (self.port.read(Port::RA.at(low))?, self.port.read(Port::RA.at(high))?);
        Ok(MacAddress::from_words(low, high))
    }

    pub fn set_address(&self, index: usize, address: Option<MacAddress>) -> Result<()> {
        let (low, high) = Port::address_words(index);
        let (low_word, high_word) = address
            .map_or((0, 0), |address| (address.words().0, address.words().1 | ADDRESS_VALID));
        // Not valid while it is half written.
        self.port.write(Port::RA.at(high), 0)?;
        self.port.write(Port::RA.at(low), low_word)?;
        self.port.write(Port::RA.at(high), high_word)
    }

    /// Switches a queue of the 82576, and waits until it says that it is so. A queue that says that it is
    /// off accesses neither its ring nor its buffers (82576 datasheet §4.5.9.2).
    fn set_enabled(&self, ring: &IoRegisterBlock<Ring>, on: bool) -> Result<()> {
        ring.update(Ring::CONTROL, |control| control.with_enabled(on))?;
        let done =
            wait::until(QUEUE, || Ok((ring.read(Ring::CONTROL)?.enabled() == on).then_some(())))?;
        done.ok_or_else(|| {
            let what = if on { "start a queue of" } else { "stop a queue of" };
            Error::new(ErrorKind::TimedOut, what, self.name())
                .with_reason(format!("it was not within {QUEUE:?} (RXDCTL.ENABLE, TXDCTL.ENABLE)"))
                .with_advice("reset the card")
        })
    }

    /// Tells the card of a ring of `entries` at `iova`, which is empty. `others` are in use already.
    pub fn start_receive(
        &self,
        ring: &IoRegisterBlock<Ring>,
        iova: u64,
        entries: usize,
        frames: Frames,
    ) -> Result<()> {
        let port = &self.port;
        if self.model == Model::I82574 {
            // The ring's registers are written while the receiver is off.
            self.pause_receive()?;
        }
        let control = RingControl::new().with_prefetch(8).with_host(8).with_write_back(1);
        if self.model == Model::I82576 {
            ring.update(Ring::SRRCTL, |buffers| {
                buffers.with_kib(frames.buffer_kib).with_descriptor(1).with_drop(true)
            })?;
        }
        self.place(ring, iova, entries)?;
        match self.model {
            Model::I82576 => {
                ring.write(Ring::CONTROL, control)?;
                self.set_enabled(ring, true)?;
            }
            Model::I82574 => ring.write(Ring::CONTROL, control.with_in_descriptors(true))?,
        }
        port.update(Port::RCTL, |control| control.with_enabled(true))
    }

    pub fn start_transmit(
        &self,
        ring: &IoRegisterBlock<Ring>,
        iova: u64,
        entries: usize,
    ) -> Result<()> {
        let port = &self.port;
        let control = RingControl::new().with_prefetch(8).with_host(1);
        self.place(ring, iova, entries)?;
        match self.model {
            Model::I82576 => {
                ring.write(Ring::CONTROL, control)?;
                self.set_enabled(ring, true)?;
            }
            Model::I82574 => {
                let control = control.with_count_descriptors(true).with_in_descriptors(true);
                ring.write(Ring::CONTROL, control)?;
            }
        }
        port.update(Port::TCTL, |control| control.with_enabled(true))
    }

    /// Whether the card still knows a ring of as many entries: a reset by others has it forget all.
    pub fn knows(&self, ring: &IoRegisterBlock<Ring>, entries: usize) -> Result<bool> {
        Ok(ring.read(Ring::LENGTH)? == 16 * entries as u32 && self.is_set_up()?)
    }

    /// Whether the card is as [`set_up`](Self::set_up) has left it, and was not reset by others since. It may know
    /// rings all the same: those that it was told of since.
    pub fn is_set_up(&self) -> Result<bool> {
        let control = self.port.read(Port::RCTL)?;
        if u32::from(control) == u32::MAX {
            self.check()?;
        }
        // Never off while a driver is there, and off after a reset.
        Ok(control.strip_crc())
    }

    fn place(&self, ring: &IoRegisterBlock<Ring>, iova: u64, entries: usize) -> Result<()> {
        ring.write(Ring::BASE_LOW, iova as u32)?;
        ring.write(Ring::BASE_HIGH, (iova >> 32) as u32)?;
        ring.write(Ring::LENGTH, 16 * entries as u32)?;
        ring.write(Ring::HEAD, 0)?;
        ring.write(Ring::TAIL, 0)
    }

    fn pause_receive(&self) -> Result<()> {
        if self.port.read(Port::RCTL)?.enabled() {
            self.port.update(Port::RCTL, |control| control.with_enabled(false))?;
            self.finish()?;
        }
        Ok(())
    }

    /// Gives the 82574 time to end what it is at; what it has written is then in memory.
    fn finish(&self) -> Result<()> {
        wait::pause(FINISH);
        // The answer to a read comes after all that was written before.
        self.check()
    }

    /// Has the card forget a receive ring: neither that nor its buffers are accessed any more. `others` says
    /// whether it has other receive rings.
    pub fn stop_receive(&self, ring: &IoRegisterBlock<Ring>, others: bool) -> Result<()> {
        if self.model == Model::I82576 {
            self.set_enabled(ring, false)?;
        } else {
            self.pause_receive()?;
        }
        self.place(ring, 0, 0)?;
        self.port.update(Port::RCTL, |control| control.with_enabled(others))?;
        self.check()
    }

    /// Has the card forget a transmit ring, as [`stop_receive`](Self::stop_receive).
    pub fn stop_transmit(&self, ring: &IoRegisterBlock<Ring>, others: bool) -> Result<()> {
        let port = &self.port;
        if self.model == Model::I82576 {
            self.set_enabled(ring, false)?;
        } else {
            port.update(Port::TCTL, |control| control.with_enabled(false))?;
            self.finish()?;
        }
        self.place(ring, 0, 0)?;
        port.update(Port::TCTL, |control| control.with_enabled(others))?;
        self.check()
    }

    /// Has the card access no memory any more: reset, or at least without leave to start accesses (PCI
    /// Local Bus 3.0 §6.2.2, bus mastering).
    ///
    /// # Errors
    /// Why neither can be had.
    pub fn quieten(&self) -> Result<()> {
        let reset = self.reset();
        let muted = self.device.config().and_then(|config| {
            config.set_bus_mastering(false)?;
            // What is read comes after all that the card has written.
            config.vendor_id().map(drop)
        });
        for error in [&reset, &muted].into_iter().filter_map(|result| result.as_ref().err()) {
            log::info!("{}: {error}", self.name());
        }
        reset.or(muted)
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // Said in the log.
        let _ = self.quieten();
    }
}
