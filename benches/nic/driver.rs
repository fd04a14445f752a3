//! The crate `vfio-remap-ethernet`, by its interface for bursts.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::Device;
use vfio_remap::transport::PciDevice;
use vfio_remap_ethernet::{Frame, Nic, Pool, QueuePair, Receiver, Settings, Transmitter};

use super::frame::{self, BURST};
use super::guest::Result;
use super::worker::work_during;
use super::{Contender, Count};

const NAME: &str = "driver";
/// The queues' sizes are testpmd's.
const SETTINGS: Settings = Settings::DEFAULT.with_receive_entries(256).with_transmit_entries(256);
/// How long a link may take to come up.
const LINK: Duration = Duration::from_secs(30);
/// How many bursts circle in each direction.
const BURSTS: usize = 4;

/// A card, its buffers, and a burst of frames.
pub struct Sender {
    nic: Arc<Nic>,
    queues: QueuePair,
    pool: Pool,
    frames: Vec<Frame>,
}

impl Sender {
    pub fn new(card: &PciDevice) -> Result<Self> {
        let nic = open(card)?;
        let queues = nic.queue()?;
        let pool = nic.pool(1024)?;
        nic.wait_for_link(LINK)?;
        Ok(Self { nic, queues, pool, frames: Vec::with_capacity(BURST) })
    }
}

fn open(card: &PciDevice) -> Result<Arc<Nic>> {
    Ok(Nic::new(Device::open(card.address())?, SETTINGS)?)
}

impl Contender for Sender {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        let Self { nic, queues, pool, frames } = self;
        let headers = frame::headers(nic.address().0);
        let work = move || {
            fill(pool, frames, &headers);
            queues.transmitter.transmit(frames, pool).map(drop)
        };
        work_during(|| work, || measure(&mut || Ok(nic.statistics()?.sent)))
    }
}

/// Two cards in one address space, whose frames go from one to the other without a copy.
pub struct Forwarder {
    ends: [(Arc<Nic>, QueuePair); 2],
    pool: Pool,
    frames: Vec<Frame>,
}

impl Forwarder {
    pub fn new([a, b]: &[PciDevice; 2]) -> Result<Self> {
        let a = Device::open(a.address())?;
        let b = a.open_beside(b.address())?;
        let [a, b] = [Nic::new(a, SETTINGS)?, Nic::new(b, SETTINGS)?];
        for nic in [&a, &b] {
            nic.set_promiscuous(true)?;
        }
        let pool = a.pool(2048)?;
        let ends = [(a.clone(), a.queue()?), (b.clone(), b.queue()?)];
        for (nic, _) in &ends {
            nic.wait_for_link(LINK)?;
        }
        Ok(Self { ends, pool, frames: Vec::with_capacity(BURST) })
    }

    /// Drops frames of the last time, and sends some bursts from either end.
    fn start(&mut self) -> Result<()> {
        let Self { ends, pool, frames } = self;
        for (_, queues) in &mut *ends {
            while queues.receiver.receive(pool, frames, BURST)? > 0 {
                drop_all(pool, frames);
            }
        }
        for (nic, queues) in &mut *ends {
            let headers = frame::headers(nic.address().0);
            for _ in 0..BURSTS {
                fill(pool, frames, &headers);
                queues.transmitter.transmit(frames, pool)?;
            }
        }
        Ok(())
    }
}

/// Makes frames a burst.
#[inline]
fn fill(pool: &mut Pool, frames: &mut Vec<Frame>, headers: &[u8]) {
    while frames.len() < BURST
        && let Some(frame) = pool.frame(frame::LEN)
    {
        frame.buffer().write(0, headers);
        frames.push(frame);
    }
}

#[inline]
fn drop_all(pool: &mut Pool, frames: &mut Vec<Frame>) {
    for frame in frames.drain(..) {
        // A frame of this pool's size is put back.
        let _ = pool.put(frame);
    }
}

/// Sends at one end what has come at the other, as far as there is room.
#[inline]
fn forward(
    from: &mut Receiver,
    to: &mut Transmitter,
    pool: &mut Pool,
    frames: &mut Vec<Frame>,
) -> vfio_remap::Result<()> {
    if from.receive(pool, frames, BURST)? > 0 {
        to.transmit(frames, pool)?;
        drop_all(pool, frames);
    }
    Ok(())
}

impl Contender for Forwarder {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        self.start()?;
        let Self { ends: [(a, one), (b, other)], pool, frames } = self;
        let work = move || {
            forward(&mut one.receiver, &mut other.transmitter, pool, frames)?;
            forward(&mut other.receiver, &mut one.transmitter, pool, frames)
        };
        let sent = &mut || Ok(a.statistics()?.sent + b.statistics()?.sent);
        work_during(|| work, || measure(sent))
    }
}
