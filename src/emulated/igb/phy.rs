//! The PHY behind MDIC: the link and autonegotiation (IEEE 802.3 §22.2.4, 82576 datasheet §3.5.8).

/// The MDIO address of the PHY.
const ADDRESS: u32 = 1;

const CONTROL: u8 = 0;
const STATUS: u8 = 1;
const ID_HIGH: u8 = 2;
const ID_LOW: u8 = 3;
const ADVERTISEMENT: u8 = 4;
const PARTNER: u8 = 5;
const EXPANSION: u8 = 6;
const GIGABIT_CONTROL: u8 = 9;
const GIGABIT_STATUS: u8 = 10;
const EXTENDED_STATUS: u8 = 15;
const PORT_STATUS: u8 = 0x11;
const PAGE: u8 = 0x1f;

const RESET: u16 = 1 << 15;
const LOOPBACK: u16 = 1 << 14;
const NEGOTIATE: u16 = 1 << 12;
const POWER_DOWN: u16 = 1 << 11;
const RESTART: u16 = 1 << 9;

const GIGABIT_FULL_DUPLEX: u16 = 1 << 9;

const READ: u32 = 2 << 26;
const WRITE: u32 = 1 << 26;
const READY: u32 = 1 << 28;
pub(super) const INTERRUPT: u32 = 1 << 29;
const ERROR: u32 = 1 << 30;

#[derive(Debug)]
pub(super) struct Phy {
    registers: [u16; 32],
    mdic: u32,
    /// The wire has a link.
    carrier: bool,
    /// The link was lost since the last read of the status.
    lost: bool,
}

impl Phy {
    pub(super) fn new() -> Self {
        let mut phy = Self { registers: [0; 32], mdic: 0, carrier: false, lost: false };
        phy.reset();
        phy
    }

    /// Sets the values of power on.
    pub(super) fn reset(&mut self) {
        self.registers = [0; 32];
        self.registers[usize::from(CONTROL)] = NEGOTIATE | 0x0140;
        self.registers[usize::from(ADVERTISEMENT)] = 0x0de1;
        self.registers[usize::from(GIGABIT_CONTROL)] = 0x0300;
        self.mdic = READY;
        self.lost = true;
    }

    fn control(&self) -> u16 {
        self.registers[usize::from(CONTROL)]
    }

    /// Whether the PHY loops frames back.
    pub(super) fn is_looped(&self) -> bool {
        self.control() & LOOPBACK != 0
    }

    /// Whether there is a link.
    pub(super) fn is_up(&self) -> bool {
        self.carrier && self.control() & POWER_DOWN == 0
    }

    /// Whether the negotiated speed is 1 Gb/s; it is 100 Mb/s otherwise.
    pub(super) fn is_gigabit(&self) -> bool {
        self.registers[usize::from(GIGABIT_CONTROL)] & GIGABIT_FULL_DUPLEX != 0
    }

    pub(super) fn set_carrier(&mut self, carrier: bool) {
        self.lost |= self.carrier && !carrier;
        self.carrier = carrier;
    }

    fn read(&mut self, register: u8) -> u16 {
        let up = self.is_up();
        let when_up = |value: u16| if up { value } else { 0 };
        match register {
            STATUS => {
                let lost = std::mem::take(&mut self.lost);
                let link = if up && !lost { 0x0004 } else { 0 };
                0x7949 | link | when_up(0x0020)
            }
            ID_HIGH => 0x02a8,
            ID_LOW => 0x0391,
            PARTNER => when_up(0x4de1),
            EXPANSION => when_up(0x0001),
            GIGABIT_STATUS => when_up(0x3c00),
            EXTENDED_STATUS => 0x3000,
            // On the pages of the gain of each pair, from which drivers compute the length of the cable.
            PORT_STATUS if self.registers[usize::from(PAGE)] & 0xff == 0xb1 => 0x2000,
            // The negotiated speed, full duplex.
            PORT_STATUS => when_up(if self.is_gigabit() { 0xc200 } else { 0x8200 }),
            _ => self.registers[usize::from(register & 31)],
        }
    }

    /// Writes a register. Returns whether that interrupts the link.
    fn write(&mut self, register: u8, value: u16) -> bool {
        match register {
            CONTROL if value & RESET != 0 => {
                self.reset();
                true
            }
            CONTROL => {
                let was = std::mem::replace(
                    &mut self.registers[usize::from(CONTROL)],
                    value & !(RESTART | 0x3f),
                );
                let restarted = value & (RESTART | NEGOTIATE) == RESTART | NEGOTIATE;
                let interrupted = restarted || (was ^ value) & POWER_DOWN != 0;
                self.lost |= interrupted;
                interrupted
            }
            STATUS..=ID_LOW
            | PARTNER
            | EXPANSION
            | GIGABIT_STATUS..=EXTENDED_STATUS
            | PORT_STATUS => false,
            _ => {
                self.registers[usize::from(register & 31)] = value;
                false
            }
        }
    }

    /// MDIC.
    pub(super) fn mdic(&self) -> u32 {
        self.mdic
    }

    /// Writes MDIC, which reads or writes a register at once. Returns whether that interrupts the link.
    pub(super) fn access(&mut self, value: u32) -> bool {
        let (register, address) = ((value >> 16 & 31) as u8, value >> 21 & 31);
        self.mdic = value & 0x2fff_ffff | READY;
        match value & (READ | WRITE) {
            READ | WRITE if address != ADDRESS => {
                self.mdic |= ERROR;
                false
            }
            READ => {
                self.mdic = self.mdic & !0xffff | u32::from(self.read(register));
                false
            }
            WRITE => self.write(register, value as u16),
            _ => {
                self.mdic |= ERROR;
                false
            }
        }
    }
}
