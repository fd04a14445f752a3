//! Commands, completions and status codes (NVMe Base 2.0 §3.3.3, NVMe 1.4 §4.2, §4.6).

/// The size of a command and of a completion, in bytes.
pub(super) const COMMAND: usize = 64;
pub(super) const COMPLETION: usize = 16;

/// A submission queue entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command([u8; COMMAND]);

impl Command {
    pub(super) fn new(bytes: [u8; COMMAND]) -> Self {
        Self(bytes)
    }

    /// Double word `index` of 16.
    pub(super) fn dword(&self, index: usize) -> u32 {
        let (words, _) = self.0.as_chunks::<4>();
        words.get(index).map_or(0, |word| u32::from_le_bytes(*word))
    }

    fn qword(&self, index: usize) -> u64 {
        u64::from(self.dword(index)) | u64::from(self.dword(index + 1)) << 32
    }

    pub(super) fn opcode(&self) -> u8 {
        self.dword(0) as u8
    }

    pub(super) fn id(&self) -> u16 {
        (self.dword(0) >> 16) as u16
    }

    /// Whether it belongs to a fused pair, or uses a scatter-gather list.
    pub(super) fn is_fused_or_sgl(&self) -> bool {
        self.dword(0) & 0xc300 != 0
    }

    pub(super) fn namespace(&self) -> u32 {
        self.dword(1)
    }

    pub(super) fn prps(&self) -> [u64; 2] {
        [self.qword(6), self.qword(8)]
    }

    /// The first logical block of a read or write.
    pub(super) fn block(&self) -> u64 {
        self.qword(10)
    }
}

/// The status of a completion: status code type and status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status(pub(super) u16);

impl Status {
    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const INVALID_OPCODE: Self = Self(0x01);
    pub(super) const INVALID_FIELD: Self = Self(0x02);
    pub(super) const TRANSFER_ERROR: Self = Self(0x04);
    pub(super) const INTERNAL_ERROR: Self = Self(0x06);
    pub(super) const ABORT_REQUESTED: Self = Self(0x07);
    pub(super) const INVALID_NAMESPACE: Self = Self(0x0b);
    pub(super) const INVALID_PRP_OFFSET: Self = Self(0x13);
    pub(super) const WRITE_PROTECTED: Self = Self(0x20);
    pub(super) const LBA_OUT_OF_RANGE: Self = Self(0x80);
    pub(super) const INVALID_COMPLETION_QUEUE: Self = Self(0x100);
    pub(super) const INVALID_QUEUE_ID: Self = Self(0x101);
    pub(super) const INVALID_QUEUE_SIZE: Self = Self(0x102);
    pub(super) const TOO_MANY_EVENT_REQUESTS: Self = Self(0x105);
    pub(super) const INVALID_VECTOR: Self = Self(0x108);
    pub(super) const INVALID_LOG_PAGE: Self = Self(0x109);
    pub(super) const INVALID_QUEUE_DELETION: Self = Self(0x10c);
    pub(super) const NOT_SAVEABLE: Self = Self(0x10d);

    /// Bits 31:17 of the last double word of a completion. An error has the bit Do Not Retry.
    pub(super) fn field(self) -> u16 {
        if self == Self::SUCCESS { 0 } else { self.0 | 0x4000 }
    }
}

/// The result of a command, double word 0 of its completion, or the error status.
pub(super) type Outcome = Result<u32, Status>;
