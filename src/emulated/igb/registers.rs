//! The offsets of registers, which of them can be written, and their values after a reset (82576 datasheet §8).

pub(super) const CTRL: u32 = 0x0000;
pub(super) const CTRL_ALIAS: u32 = 0x0004;
pub(super) const STATUS: u32 = 0x0008;
pub(super) const EECD: u32 = 0x0010;
pub(super) const EERD: u32 = 0x0014;
pub(super) const MDIC: u32 = 0x0020;
pub(super) const VET: u32 = 0x0038;
pub(super) const RCTL: u32 = 0x0100;
pub(super) const TCTL: u32 = 0x0400;
pub(super) const EEMNGCTL: u32 = 0x1010;
pub(super) const EITR: u32 = 0x1680;
pub(super) const IVAR: u32 = 0x1700;
pub(super) const IVAR_MISC: u32 = 0x1740;
pub(super) const RXCSUM: u32 = 0x5000;
pub(super) const RLPML: u32 = 0x5004;
pub(super) const MTA: u32 = 0x5200;
pub(super) const RAL: u32 = 0x5400;
pub(super) const RAH: u32 = 0x5404;
/// The addresses from number 16 on.
pub(super) const RAL_HIGH: u32 = 0x54e0;
pub(super) const VFTA: u32 = 0x5600;
pub(super) const MRQC: u32 = 0x5818;
pub(super) const SWSM: u32 = 0x5b50;
pub(super) const RETA: u32 = 0x5c00;
pub(super) const RSSRK: u32 = 0x5c80;
pub(super) const UTA: u32 = 0xa000;

pub(super) const CTRL_FULL_DUPLEX: u32 = 1;
pub(super) const CTRL_MASTER_DISABLE: u32 = 1 << 2;
pub(super) const CTRL_SET_LINK_UP: u32 = 1 << 6;
pub(super) const CTRL_RESET: u32 = 1 << 26;
pub(super) const CTRL_VLAN: u32 = 1 << 30;
pub(super) const CTRL_PHY_RESET: u32 = 1 << 31;

pub(super) const STATUS_FULL_DUPLEX: u32 = 1;
pub(super) const STATUS_LINK_UP: u32 = 1 << 1;
pub(super) const STATUS_SPEED_100: u32 = 1 << 6;
pub(super) const STATUS_SPEED_1000: u32 = 2 << 6;
pub(super) const STATUS_PHY_RESET: u32 = 1 << 10;
pub(super) const STATUS_MASTER: u32 = 1 << 19;

pub(super) const RCTL_ENABLE: u32 = 1 << 1;
pub(super) const RCTL_UNICAST: u32 = 1 << 3;
pub(super) const RCTL_MULTICAST: u32 = 1 << 4;
pub(super) const RCTL_LONG: u32 = 1 << 5;
pub(super) const RCTL_LOOPBACK: u32 = 1 << 6;
pub(super) const RCTL_BROADCAST: u32 = 1 << 15;
pub(super) const RCTL_VLAN_FILTER: u32 = 1 << 18;
pub(super) const RCTL_CFI_ENABLE: u32 = 1 << 19;
pub(super) const RCTL_CFI: u32 = 1 << 20;
pub(super) const RCTL_STRIP_CRC: u32 = 1 << 26;

pub(super) const TCTL_ENABLE: u32 = 1 << 1;
pub(super) const TCTL_PAD: u32 = 1 << 3;

pub(super) const RXCSUM_IP: u32 = 1 << 8;
pub(super) const RXCSUM_TRANSPORT: u32 = 1 << 9;
pub(super) const RXCSUM_HASH: u32 = 1 << 13;

pub(super) const ADDRESS_VALID: u32 = 1 << 31;

/// Registers without side effects that can be written: start and end.
const PLAIN: [(u32, u32); 48] = [
    (0x0018, 0x001c), // CTRL_EXT
    (0x0024, 0x0040), // SCTL, flow control addresses, CONNSW, VET
    (RCTL, 0x0104),
    (0x0170, 0x017c), // FCTTV, TXCW
    (TCTL, 0x0408),
    (0x0410, 0x0414),     // TIPG
    (0x0458, 0x045c),     // AIT
    (0x0800, 0x0c20),     // mailboxes
    (0x0c84, 0x0c88),     // MBVFIMR
    (0x0c8c, 0x0c94),     // VFRE, VFTE
    (0x0e00, 0x0e04),     // LEDCTL
    (0x1000, 0x100c),     // packet buffers
    (EITR, EITR + 100),   // for 25 vectors
    (IVAR, IVAR + 32),    // for 16 pairs of queues
    (IVAR_MISC, 0x1744),  //
    (0x2160, 0x216c),     // FCRTL, FCRTH
    (0x2404, 0x240c),     // RXPBS, QDE
    (0x2460, 0x2464),     // FCRTV
    (0x2508, 0x2518),     // DMA coalescing
    (0x3404, 0x3408),     // TXPBS
    (0x3500, 0x3504),     // DTXSWC
    (0x3540, 0x3560),     // DMA coalescing, misbehaviour of virtual functions
    (0x3590, 0x3594),     // DTXCTL
    (0x3604, 0x36b4),     // rate limits
    (0x3700, 0x3720),     // VMVIR
    (0x4200, 0x420c),     // PCS
    (0x4218, 0x4228),     // PCS
    (RXCSUM, 0x500c),     // RXCSUM, RLPML, RFCTL
    (MTA, MTA + 0x200),   //
    (RAL, 0x5520),        // receive addresses, PSRTYPE
    (0x55b0, 0x5600),     // VLAPQF, SYNQF
    (VFTA, VFTA + 0x200), //
    (0x5800, 0x5824),     // wake-up, MRQC, VT_CTL, MANC
    (0x5838, 0x5904),     // IP addresses of wake-up
    (0x5980, 0x5a00),     // five-tuple filters
    (0x5a80, 0x5b00),     // immediate interrupts, TXSWC, VMOLR, RPLOLR
    (0x5b00, 0x5b04),     // GCR
    (0x5b44, 0x5b50),     // GIOCTL, CCMCTL, SCCTL
    (0x5b5c, 0x5b60),     // SW_FW_SYNC
    (0x5b74, 0x5b78),     // DCA_CTRL
    (0x5bb8, 0x5bc0),     // PCIEMISC, IOVCTL
    (RETA, 0x5ca8),       // RETA, RSSRK
    (0x5cb0, 0x5cd0),     // ETQF
    (0x5d00, 0x5d80),     // VLVF
    (0x5f00, 0x6000),     // flexible filters, TSYNCRXCFG
    (0x9000, 0x9c00),     // flexible filters
    (UTA, UTA + 0x200),   //
    (0xb600, 0xb680),     // time synchronization
];

/// Values after a reset, unless zero.
const INITIAL: [(u32, u32); 12] = [
    (CTRL, CTRL_FULL_DUPLEX),
    (0x0028, 0x00c2_8001),
    (0x002c, 0x0000_0100),
    (0x0030, 0x0000_8808),
    (VET, 0x8100),
    // Collision threshold 15, distance 64, short frames are padded.
    (TCTL, 0x0004_00f8),
    (0x0410, 0x0060_2008),
    // The configuration of both ports has been loaded.
    (EEMNGCTL, 0x000c_0000),
    (0x2404, 0x40),
    (0x3404, 0x28),
    (RXCSUM, RXCSUM_IP | RXCSUM_TRANSPORT),
    (RLPML, 0x2600),
];

/// The registers of BAR 0, except those of queues.
pub(super) struct Registers(Box<[u32]>);

impl Registers {
    /// For a BAR of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self(vec![0; (size / 4) as usize].into())
    }

    pub(super) fn reset(&mut self) {
        self.0.fill(0);
        INITIAL.iter().for_each(|&(offset, value)| self.set(offset, value));
    }

    /// Zero past the end.
    pub(super) fn get(&self, offset: u32) -> u32 {
        self.0.get((offset / 4) as usize).copied().unwrap_or(0)
    }

    /// Whether all of `bits` are set in the register at `offset`.
    pub(super) fn has(&self, offset: u32, bits: u32) -> bool {
        self.get(offset) & bits == bits
    }

    pub(super) fn set(&mut self, offset: u32, value: u32) {
        if let Some(register) = self.0.get_mut((offset / 4) as usize) {
            *register = value;
        }
    }

    /// Writes a register for the driver. No effect if it is read-only.
    pub(super) fn write(&mut self, offset: u32, value: u32) {
        if PLAIN.iter().any(|&(start, end)| (start..end).contains(&offset)) {
            self.set(offset, value);
        }
    }
}
