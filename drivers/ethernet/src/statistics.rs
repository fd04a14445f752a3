//! What a card counts (82576 datasheet §8.18, 82574 datasheet §10.2).

use vfio_remap::{IoRegisterBlock, Result};

use super::registers::Port;

/// Counts since the card was brought up.
///
/// Lengths are those on the wire, with the checksum of Ethernet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Good packets that passed the filters (GPRC).
    pub received: u64,
    /// Bytes of those (GORC).
    pub received_bytes: u64,
    /// Those that were for everybody (BPRC).
    pub received_broadcast: u64,
    /// Those that were for a group (MPRC).
    pub received_multicast: u64,
    /// All packets that came, good or not, whoever they were for (TPR).
    pub seen: u64,
    /// Packets that were lost since the card's own memory was full (MPC).
    pub missed: u64,
    /// Packets for which the ring had no descriptor when they came (RNBC).
    pub no_buffer: u64,
    /// Wrong checksums of Ethernet (CRCERRS).
    pub crc_errors: u64,
    /// Packets with bytes that are none (RXERRC).
    pub symbol_errors: u64,
    /// Packets whose length is not what they say (RLEC).
    pub length_errors: u64,
    /// Shorter than 64 bytes, with a good and with a wrong checksum (RUC, RFC).
    pub too_short: u64,
    /// Longer than is received, with a good and with a wrong checksum (ROC, RJC).
    pub too_long: u64,
    /// Packets that were sent (GPTC).
    pub sent: u64,
    /// Bytes of those (GOTC).
    pub sent_bytes: u64,
    /// Those that were for everybody (BPTC).
    pub sent_broadcast: u64,
    /// Those that were for a group (MPTC).
    pub sent_multicast: u64,
    /// Segments by the card, one count for each request (TSCTC).
    pub segmented: u64,
}

impl Statistics {
    /// Adds what the card has counted since: reading clears its registers.
    pub(crate) fn collect(&mut self, port: &IoRegisterBlock<Port>) -> Result<()> {
        for (count, registers) in [
            (&mut self.received, &[Port::GPRC][..]),
            (&mut self.received_broadcast, &[Port::BPRC]),
            (&mut self.received_multicast, &[Port::MPRC]),
            (&mut self.seen, &[Port::TPR]),
            (&mut self.missed, &[Port::MPC]),
            (&mut self.no_buffer, &[Port::RNBC]),
            (&mut self.crc_errors, &[Port::CRCERRS]),
            (&mut self.symbol_errors, &[Port::RXERRC]),
            (&mut self.length_errors, &[Port::RLEC]),
            (&mut self.too_short, &[Port::RUC, Port::RFC]),
            (&mut self.too_long, &[Port::ROC, Port::RJC]),
            (&mut self.sent, &[Port::GPTC]),
            (&mut self.sent_broadcast, &[Port::BPTC]),
            (&mut self.sent_multicast, &[Port::MPTC]),
            (&mut self.segmented, &[Port::TSCTC]),
        ] {
            for register in registers {
                *count = count.wrapping_add(port.read(*register)?.into());
            }
        }
        for (count, low, high) in [
            (&mut self.received_bytes, Port::GORCL, Port::GORCH),
            (&mut self.sent_bytes, Port::GOTCL, Port::GOTCH),
        ] {
            // The upper half is read last: that clears both.
            let low = port.read(low)?;
            let high = port.read(high)?;
            *count = count.wrapping_add(u64::from(high) << 32 | u64::from(low));
        }
        Ok(())
    }
}
