//! Interrupts by MSI-X: one vector for the link, one for each queue in each direction (82576 datasheet §7.3,
//! 82574 datasheet §7.4).
//!
//! A queue's vector is off but while somebody waits for it: a queue that is polled does not interrupt.

use std::time::{Duration, Instant};

use vfio_remap::device::{Interrupt, Vector, Vectors};
use vfio_remap::{Error, ErrorKind, IoRegisterBlock, Result};

use super::hardware::Hardware;
use super::model::Model;
use super::nic::Direction;
use super::registers::Port;

/// How long an interrupt is waited for before the queue is looked at again: one may get lost.
const LOOK: Duration = Duration::from_millis(50);
/// How long a thread sleeps whose queue has no vector, before it looks again.
const NAP: Duration = Duration::from_micros(100);
/// How many looks there are at the queue for one at the clock.
const LOOKS: u32 = 32;

/// The vector of the link.
pub const LINK: u8 = 0;
/// ICR, IMS: the link has changed; and that a cause is no queue's (82574).
const LINK_CHANGED: u32 = 1 << 2;
const OTHER: u32 = 1 << 24;
/// GPIE: the card has several vectors, whose pending bits are cleared as they fire, and causes are cleared
/// as they are read (82576).
const SEVERAL_VECTORS: u32 = 1 << 31 | 1 << 4 | 1;
/// An entry of IVAR leads to a vector.
const VALID_82576: u32 = 1 << 7;
const VALID_82574: u32 = 1 << 3;
/// The first cause of a queue (82574): two that receive, and two that transmit.
const QUEUES_82574: u32 = 20;
/// The unit and the most of the time between two interrupts (82574): 256 ns, in 16 bits; of the 82576: 1 µs,
/// in bits 14:2.
const UNIT_82574: u128 = 256;
const MOST_82574: u128 = 0xffff;
const MOST_82576: u128 = 0x1fff;

/// Which vector belongs to a queue: after that of the link those that receive, then those that transmit, as
/// far as there are any.
fn vector_of(direction: Direction, queue: u16, queues: u16, count: usize) -> Option<u8> {
    let index = match direction {
        Direction::Receive => 1 + queue,
        Direction::Transmit => 1 + queues + queue,
    };
    u8::try_from(index).ok().filter(|index| usize::from(*index) < count)
}

/// Waits until a vector fires, and whether it does in time.
pub fn fires(vector: &Vector, timeout: Duration) -> Result<bool> {
    match vector.wait(timeout) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(false),
        Err(error) => Err(error),
    }
}

/// The vectors of a card.
#[derive(Debug)]
pub struct Interrupts {
    vectors: Vectors,
    queues: u16,
}

impl Interrupts {
    /// As many vectors as there are queues to use them, and as the card has.
    pub fn new(hardware: &Hardware, queues: u16) -> Result<Self> {
        let there = hardware.device.interrupt(Interrupt::MsiX)?.count as usize;
        let wanted = 1 + 2 * usize::from(queues);
        let count = wanted.min(there).min(hardware.model.vectors());
        if count < 2 {
            return Err(Error::new(ErrorKind::Unsupported, "use interrupts of", hardware.name())
                .with_reason(format!("it offers {there} vectors of MSI-X"))
                .with_advice("poll its queues instead (Settings::interrupts)"));
        }
        Ok(Self { vectors: hardware.device.vectors(Interrupt::MsiX, count)?, queues })
    }

    pub fn link(&self) -> Result<Vector> {
        self.vectors.vector(LINK.into())
    }

    /// The vector of a queue, if it has one.
    pub fn of(&self, hardware: &Hardware, direction: Direction, queue: u16) -> Result<Waker> {
        let number = vector_of(direction, queue, self.queues, self.vectors.count());
        let Some(number) = number else { return Ok(Waker::none()) };
        let cause = match (hardware.model, direction) {
            (Model::I82576, _) => 1 << number,
            (Model::I82574, Direction::Receive) => 1 << (QUEUES_82574 + u32::from(queue)),
            (Model::I82574, Direction::Transmit) => 1 << (QUEUES_82574 + 2 + u32::from(queue)),
        };
        let vector = self.vectors.vector(number.into())?;
        let (model, port) = (hardware.model, hardware.port.clone());
        Ok(Waker { by: Some(By { vector, cause, model, port }) })
    }

    /// Tells the card which cause leads to which vector, and how long a vector is silent after it has fired.
    /// The link's is on from now on.
    pub fn route(&self, hardware: &Hardware, moderation: Duration) -> Result<()> {
        let port = &hardware.port;
        let count = self.vectors.count();
        let entry = |direction, queue, valid: u32| {
            let vector = vector_of(direction, queue, self.queues, count);
            vector.filter(|_| queue < self.queues).map_or(0, |vector| u32::from(vector) | valid)
        };
        let nanoseconds = moderation.as_nanos();
        match hardware.model {
            Model::I82576 => {
                port.write(Port::GPIE, SEVERAL_VECTORS)?;
                for low in 0..8 {
                    // Four entries: of queue n, and of n + 8.
                    let pair = |queue| {
                        entry(Direction::Receive, queue, VALID_82576)
                            | entry(Direction::Transmit, queue, VALID_82576) << 8
                    };
                    port.write(Port::IVAR.at(low.into()), pair(low) | pair(low + 8) << 16)?;
                }
                port.write(Port::IVAR_MISC, (u32::from(LINK) | VALID_82576) << 8)?;
                let interval = (nanoseconds / 1000).min(MOST_82576) as u32;
                for vector in 1..count {
                    port.write(Port::EITR.at(vector), interval << 2)?;
                }
                port.write(Port::EIAC, (1u32 << count) - 1)?;
                port.write(Port::IMS, LINK_CHANGED)?;
                port.write(Port::EIMS, 1 << LINK)
            }
            Model::I82574 => {
                port.update(Port::CTRL_EXT, |control| control.with_clear_pending(true))?;
                let receive = |queue| entry(Direction::Receive, queue, VALID_82574);
                let transmit = |queue| entry(Direction::Transmit, queue, VALID_82574);
                let queues = receive(0) | receive(1) << 4 | transmit(0) << 8 | transmit(1) << 12;
                port.write(Port::IVAR_82574, queues | (u32::from(LINK) | VALID_82574) << 16)?;
                let interval = (nanoseconds / UNIT_82574).min(MOST_82574) as u32;
                for vector in 1..count {
                    port.write(Port::EITR_82574.at(vector), interval)?;
                }
                port.write(Port::EIAC_82574, 0xf << QUEUES_82574)?;
                port.write(Port::IMS, LINK_CHANGED | OTHER)
            }
        }
    }
}

impl Hardware {
    /// Forgets that the link has changed, and has the next change interrupt.
    pub fn rearm_link(&self) -> Result<()> {
        match self.model {
            Model::I82576 => {
                // Cleared as it is read.
                self.port.read(Port::ICR)?;
                self.port.write(Port::EIMS, 1 << LINK)
            }
            Model::I82574 => {
                self.port.write(Port::ICR, LINK_CHANGED | OTHER)?;
                self.port.write(Port::IMS, LINK_CHANGED | OTHER)
            }
        }
    }
}

impl Model {
    /// How many vectors a card can have (82576 datasheet §7.3.1, 82574 datasheet §7.4.2). It may offer fewer.
    const fn vectors(self) -> usize {
        match self {
            Self::I82576 => 25,
            Self::I82574 => 5,
        }
    }
}

/// How a queue is waited for: by its vector, if it has one.
#[derive(Debug)]
pub struct Waker {
    by: Option<By>,
}

#[derive(Debug)]
struct By {
    vector: Vector,
    /// The queue's bit of EIMS (82576), or of IMS (82574).
    cause: u32,
    model: Model,
    port: IoRegisterBlock<Port>,
}

impl Waker {
    pub const fn none() -> Self {
        Self { by: None }
    }

    pub fn vector(&self) -> Option<&Vector> {
        self.by.as_ref().map(|by| &by.vector)
    }

    /// Has the next event interrupt. One before may go unnoticed: look once more.
    pub fn arm(&self) -> Result<()> {
        let Some(By { cause, model, port, .. }) = &self.by else { return Ok(()) };
        match model {
            Model::I82576 => {
                port.write(Port::EICR, *cause)?;
                port.write(Port::EIMS, *cause)
            }
            Model::I82574 => {
                port.write(Port::ICR, *cause)?;
                port.write(Port::IMS, *cause)
            }
        }
    }

    pub fn disarm(&self) -> Result<()> {
        let Some(By { cause, model, port, .. }) = &self.by else { return Ok(()) };
        match model {
            Model::I82576 => port.write(Port::EIMC, *cause),
            Model::I82574 => port.write(Port::IMC, *cause),
        }
    }

    /// Waits until `ready` says so, and whether it did in time: polls for a while, then sleeps until the
    /// queue interrupts.
    pub fn wait(
        &self,
        poll: Duration,
        timeout: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<bool> {
        let begin = Instant::now();
        let mut elapsed = Duration::ZERO;
        while elapsed < poll.min(timeout) {
            for _ in 0..LOOKS {
                if ready() {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            elapsed = begin.elapsed();
        }
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            let Some(By { vector, .. }) = &self.by else {
                if ready() {
                    return Ok(true);
                }
                if left.is_zero() {
                    return Ok(false);
                }
                std::thread::sleep(left.min(NAP));
                continue;
            };
            self.arm()?;
            let is_ready = ready();
            if !is_ready && !left.is_zero() {
                fires(vector, left.min(LOOK))?;
            }
            self.disarm()?;
            if is_ready || left.is_zero() {
                return Ok(is_ready);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_have_vectors_as_far_as_there_are_any() {
        let vectors = |queues: u16, count| -> Vec<Option<u8>> {
            let of = |direction| {
                (0..queues).map(move |queue| vector_of(direction, queue, queues, count))
            };
            of(Direction::Receive).chain(of(Direction::Transmit)).collect()
        };
        assert_eq!(vectors(1, 3), [Some(1), Some(2)]);
        assert_eq!(vectors(2, 5), [Some(1), Some(2), Some(3), Some(4)]);
        assert_eq!(vectors(2, 4), [Some(1), Some(2), Some(3), None]);
        assert_eq!(vectors(3, 3), [Some(1), Some(2), None, None, None, None]);
    }
}
