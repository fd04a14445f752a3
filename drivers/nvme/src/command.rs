//! Commands: 64 bytes (NVMe Base 1.4 §4.2), here as eight words of 64 bits.

use vfio_remap::device::DmaEntry;

/// Opcodes of admin commands (NVMe Base 1.4 §5).
pub mod admin {
    pub const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
    pub const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_COMPLETION_QUEUE: u8 = 0x04;
    pub const CREATE_COMPLETION_QUEUE: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNCHRONOUS_EVENT_REQUEST: u8 = 0x0c;
}

/// Opcodes of the NVM command set (NVMe Base 1.4 §6).
pub mod io {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Features (NVMe Base 1.4 §5.21.1).
pub mod feature {
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const ASYNCHRONOUS_EVENTS: u8 = 0x0b;
}

/// A command without its identifier and its data pointer, which the queue adds.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Double words 0 and 1: the opcode, the namespace.
    head: u64,
    /// Double words 6 and 7: the address of a queue, for commands without data.
    address: u64,
    /// Double words 10 and 11.
    low: u64,
    /// Double words 12 and 13.
    high: u64,
}

impl Command {
    #[inline]
    pub const fn new(opcode: u8, namespace: u32) -> Self {
        Self { head: opcode as u64 | (namespace as u64) << 32, address: 0, low: 0, high: 0 }
    }

    /// Sets double words 10 and 11.
    #[inline]
    pub const fn dwords_10(self, low: u32, high: u32) -> Self {
        Self { low: low as u64 | (high as u64) << 32, ..self }
    }

    /// Sets the blocks: `first`, and up to 65535 `more`.
    #[inline]
    pub const fn blocks(self, first: u64, more: u64) -> Self {
        Self { low: first, high: more, ..self }
    }

    /// Sets the address of a queue.
    #[inline]
    pub const fn address(self, iova: u64) -> Self {
        Self { address: iova, ..self }
    }

    /// Writes the submission queue entry. Both PRP entries are zero if the command has no data.
    ///
    /// The other words are zero in all commands: a queue begins with zeros, and nothing else is stored there.
    #[inline]
    pub fn store(self, entry: DmaEntry<'_, u64, 8>, id: u16, prps: (u64, u64)) {
        entry.store::<0>(self.head | u64::from(id) << 16);
        entry.store::<3>(self.address | prps.0);
        entry.store::<4>(prps.1);
        entry.store::<5>(self.low);
        entry.store::<6>(self.high);
    }
}
