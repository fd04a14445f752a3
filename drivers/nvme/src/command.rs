//! Commands: 64 bytes (NVMe Base 1.4 §4.2), here as eight words of 64 bits.

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
    pub const ASYNCHRONOUS_EVENTS: u8 = 0x0b;
}

/// A command without its identifier and its data pointer, which the queue adds.
#[derive(Clone, Copy, Debug)]
pub struct Command([u64; 8]);

impl Command {
    #[inline]
    pub const fn new(opcode: u8, namespace: u32) -> Self {
        Self([opcode as u64 | (namespace as u64) << 32, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Sets double words 10 and 11.
    #[inline]
    pub const fn dwords_10(mut self, low: u32, high: u32) -> Self {
        self.0[5] = low as u64 | (high as u64) << 32;
        self
    }

    /// Sets the blocks: `count`, at least one, starting with `first`.
    #[inline]
    pub const fn blocks(mut self, first: u64, count: u64) -> Self {
        self.0[5] = first;
        self.0[6] = (count - 1) & 0xffff;
        self
    }

    /// Sets the address of a queue.
    #[inline]
    pub const fn address(mut self, iova: u64) -> Self {
        self.0[3] = iova;
        self
    }

    /// The submission queue entry. Both PRP entries are zero if the command has no data.
    #[inline]
    pub const fn finish(self, id: u16, prps: [u64; 2]) -> [u64; 8] {
        let mut words = self.0;
        words[0] |= (id as u64) << 16;
        words[3] |= prps[0];
        words[4] = prps[1];
        words
    }
}
