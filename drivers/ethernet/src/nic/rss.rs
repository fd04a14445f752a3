//! Which queue a packet is received by (82576 datasheet §7.1.1.7, 82574 datasheet §7.1).

use vfio_remap::{Error, ErrorKind, Result};

use super::super::hardware::Hardware;
use super::super::model::Model;
use super::super::registers::Port;
use super::{Nic, State};

/// Entries of the table that leads from hashes to queues.
pub const TABLE: usize = 128;
/// The key of the examples in Microsoft's specification of receive side scaling.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// MRQC: addresses and ports of TCP over IPv4, addresses of IPv4, likewise of IPv6; and what comes by UDP.
const FIELDS: u32 = 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21;
const FIELDS_82576: u32 = 1 << 18 | 1 << 22 | 1 << 23 | 1 << 24;

impl Hardware {
    /// Has the card spread packets over its queues by their hashes.
    pub fn spread(&self, key: Option<&[u8; 40]>) -> Result<()> {
        self.set_key(key.unwrap_or(&KEY))?;
        let modes = match self.model {
            Model::I82576 => 2 | FIELDS | FIELDS_82576,
            Model::I82574 => 1 | FIELDS,
        };
        self.port.write(Port::MRQC, modes)
    }

    fn set_key(&self, key: &[u8; 40]) -> Result<()> {
        for (at, bytes) in key.chunks_exact(4).enumerate() {
            let word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            self.port.write(Port::RSSRK.at(at), word)?;
        }
        Ok(())
    }

    fn set_table(&self, queue: impl Fn(usize) -> u16) -> Result<()> {
        // The 82576 has the number in the lowest bits of an entry, the 82574 in the highest.
        let shift = if self.model == Model::I82576 { 0 } else { 7 };
        for at in 0..TABLE / 4 {
            let word = (0..4).fold(0, |word, byte| {
                word | (u32::from(queue(4 * at + byte)) << shift & 0xff) << (8 * byte)
            });
            self.port.write(Port::RETA.at(at), word)?;
        }
        Ok(())
    }
}

impl Nic {
    /// Has flows spread by another key, of 40 bytes. A key that is not known to others keeps them from having
    /// all flows go to one queue.
    ///
    /// # Errors
    /// `Unsupported` if the card has one queue; what the transport answers.
    pub fn set_rss_key(&self, key: &[u8; 40]) -> Result<()> {
        self.must_spread()?;
        let mut state = self.state();
        state.key = Some(*key);
        self.hardware.set_key(key)
    }

    /// Has the 128 values of the lowest seven bits of a hash lead to these queues; `None` spreads them evenly
    /// over the queues whose receivers are alive, as at first. Packets without a hash go to queue 0. What goes
    /// to a queue without a receiver is lost.
    ///
    /// # Errors
    /// `OutOfRange` if there is no such queue; as [`set_rss_key`](Self::set_rss_key).
    pub fn set_rss_table(&self, table: Option<&[u16; 128]>) -> Result<()> {
        self.must_spread()?;
        let queues = self.settings.queues;
        if let Some(queue) = table.and_then(|table| table.iter().find(|queue| **queue >= queues)) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                "lead",
                format!("flows to queue {queue}"),
            )
            .with_reason(format!("{} was brought up with {queues}", self.name()))
            .with_advice("name one of those, or ask for more (Settings::queues)"));
        }
        let mut state = self.state();
        state.table = table.copied().map(Box::new);
        let receiving = state.receiving;
        self.lead(&state, receiving)
    }

    /// Writes the table, for these queues to receive.
    pub(super) fn lead(&self, state: &State, receiving: u32) -> Result<()> {
        if self.settings.queues == 1 {
            return Ok(());
        }
        if let Some(table) = &state.table {
            return self.hardware.set_table(|at| table[at]);
        }
        let queues: Vec<u16> = (0..16).filter(|queue| receiving & 1 << queue != 0).collect();
        self.hardware.set_table(|at| queues.get(at % queues.len().max(1)).copied().unwrap_or(0))
    }

    fn must_spread(&self) -> Result<()> {
        if self.settings.queues > 1 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "spread", format!("the flows of {}", self.name()))
            .with_reason("it was brought up with one queue")
            .with_advice("ask for more (Settings::queues)"))
    }
}
