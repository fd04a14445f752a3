//! The registers (82576 datasheet §8, 82574 datasheet §10).
//!
//! What both have lies in the same places in both, most of it. Queues do not: see
//! [`Model`](super::model::Model).

use vfio_remap::register_block;

register_block! {
    /// What there is one of, whichever queues there are.
    pub Port[0x6000] {
        /// Device control.
        CTRL(u32 => Control) @ 0x0000 {
            pub full_duplex: bool,
            __: bool,
            pub master_disable: bool,
            pub link_reset: bool,
            #[bits(2)]
            __: u8,
            /// The link comes up once the PHY says so.
            pub set_link_up: bool,
            #[bits(4)]
            __: u8,
            pub force_speed: bool,
            pub force_duplex: bool,
            #[bits(13)]
            __: u16,
            pub reset: bool,
            pub receive_flow_control: bool,
            pub transmit_flow_control: bool,
            __: bool,
            /// VLAN tags are stripped on receive, and may be inserted.
            pub vlan: bool,
            pub phy_reset: bool,
        }
        /// Device status.
        STATUS(ro u32 => Status) @ 0x0008 {
            pub full_duplex: bool,
            pub link_up: bool,
            /// Which port of the card it is.
            #[bits(2)]
            pub function: u8,
            #[bits(2)]
            __: u8,
            #[bits(2)]
            pub speed: u8,
            #[bits(11)]
            __: u16,
            /// It may still access memory.
            pub master_enabled: bool,
            #[bits(12)]
            __: u16,
        }
        /// EEPROM control: bit 9 says that it was read after a reset.
        EECD(ro u32 => EepromControl) @ 0x0010 {
            #[bits(9)]
            __: u16,
            pub read: bool,
            #[bits(22)]
            __: u32,
        }
        CTRL_EXT(u32 => ControlExtended) @ 0x0018 {
            #[bits(22)]
            __: u32,
            /// 0 is the PHY within (82576).
            #[bits(2)]
            pub link_mode: u8,
            #[bits(4)]
            __: u8,
            /// That a driver is there, for the firmware.
            pub driver_loaded: bool,
            #[bits(2)]
            __: u8,
            /// A vector's pending bit is cleared as it fires (82574).
            pub clear_pending: bool,
        }
        /// Access to the PHY's registers.
        MDIC(u32 => Mdi) @ 0x0020 {
            pub data: u16,
            #[bits(5)]
            pub register: u8,
            #[bits(5)]
            pub phy: u8,
            /// 1 write, 2 read.
            #[bits(2)]
            pub operation: u8,
            pub ready: bool,
            __: bool,
            pub error: bool,
            __: bool,
        }
        FCAL(u32) @ 0x0028;
        FCAH(u32) @ 0x002c;
        FCT(u32) @ 0x0030;
        /// The EtherType of VLAN tags.
        VET(u32) @ 0x0038;
        /// Interrupt causes, cleared by ones; and which of them interrupt, set and cleared by ones.
        ICR(u32) @ 0x00c0;
        IMS(wo u32) @ 0x00d0;
        IMC(wo u32) @ 0x00d8;
        /// Causes that are cleared as they interrupt; vectors of causes; times between interrupts.
        EIAC_82574(u32) @ 0x00dc;
        IVAR_82574(u32) @ 0x00e4;
        EITR_82574(u32)[5] @ 0x00e8;
        /// Receive control.
        RCTL(u32 => ReceiveControl) @ 0x0100 {
            __: bool,
            pub enabled: bool,
            pub store_bad: bool,
            pub unicast_promiscuous: bool,
            pub multicast_promiscuous: bool,
            pub long_packets: bool,
            /// 1 leads what the MAC sends back to it.
            #[bits(2)]
            pub loopback: u8,
            #[bits(7)]
            __: u8,
            pub broadcast: bool,
            #[bits(2)]
            pub buffer_size: u8,
            pub vlan_filter: bool,
            #[bits(3)]
            __: u8,
            pub discard_pause: bool,
            #[bits(2)]
            __: u8,
            pub buffer_size_times_16: bool,
            pub strip_crc: bool,
            /// The size of a buffer in KiB, rather than by the fields above (82574).
            #[bits(4)]
            pub buffer_kib: u8,
            __: bool,
        }
        /// Transmit control.
        TCTL(u32 => TransmitControl) @ 0x0400 {
            __: bool,
            pub enabled: bool,
            __: bool,
            pub pad_short: bool,
            pub collision_threshold: u8,
            #[bits(10)]
            pub collision_distance: u16,
            #[bits(2)]
            __: u8,
            pub retransmit_late_collision: bool,
            #[bits(3)]
            __: u8,
            /// Several requests at a time (82574).
            pub multiple_requests: bool,
            #[bits(3)]
            __: u8,
        }
        TIPG(u32) @ 0x0410;
        /// Who may use the PHY's registers: firmware or software (82574).
        EXTCNF_CTRL(u32 => ExtendedConfiguration) @ 0x0f00 {
            #[bits(5)]
            __: u8,
            pub software_owns_mdio: bool,
            #[bits(26)]
            __: u32,
        }
        /// What the firmware has configured after a reset (82576).
        EEMNGCTL(ro u32 => ManagementControl) @ 0x1010 {
            #[bits(18)]
            __: u32,
            /// One bit for each port.
            #[bits(4)]
            pub configured: u8,
            #[bits(10)]
            __: u16,
        }
        /// How interrupts work; which vectors are on, set and cleared by ones; vectors that are cleared as they
        /// fire; vectors that are pending; times between interrupts; vectors of causes (82576).
        GPIE(u32) @ 0x1514;
        EIMS(wo u32) @ 0x1524;
        EIMC(wo u32) @ 0x1528;
        EIAC(u32) @ 0x152c;
        EICR(wo u32) @ 0x1580;
        EITR(u32)[25] @ 0x1680;
        IVAR(u32)[8] @ 0x1700;
        IVAR_MISC(u32) @ 0x1740;
        FCRTL(u32) @ 0x2160;
        FCRTH(u32) @ 0x2168;
        /// Arbitration of the transmit queues (82574).
        TARC(u32)[2, stride = 0x100] @ 0x3840;

        CRCERRS(ro u32) @ 0x4000;
        RXERRC(ro u32) @ 0x400c;
        MPC(ro u32) @ 0x4010;
        RLEC(ro u32) @ 0x4040;
        GPRC(ro u32) @ 0x4074;
        BPRC(ro u32) @ 0x4078;
        MPRC(ro u32) @ 0x407c;
        GPTC(ro u32) @ 0x4080;
        GORCL(ro u32) @ 0x4088;
        GORCH(ro u32) @ 0x408c;
        GOTCL(ro u32) @ 0x4090;
        GOTCH(ro u32) @ 0x4094;
        RNBC(ro u32) @ 0x40a0;
        RUC(ro u32) @ 0x40a4;
        RFC(ro u32) @ 0x40a8;
        ROC(ro u32) @ 0x40ac;
        RJC(ro u32) @ 0x40b0;
        TPR(ro u32) @ 0x40d0;
        TPT(ro u32) @ 0x40d4;
        MPTC(ro u32) @ 0x40f0;
        BPTC(ro u32) @ 0x40f4;
        TSCTC(ro u32) @ 0x40f8;

        /// Checksums of received packets.
        RXCSUM(u32 => ReceiveChecksum) @ 0x5000 {
            pub start: u8,
            pub ip: bool,
            pub tcp_udp: bool,
            #[bits(3)]
            __: u8,
            /// Descriptors have the hash, rather than a checksum of the whole packet.
            pub no_packet_checksum: bool,
            #[bits(18)]
            __: u32,
        }
        /// The longest packet that is received (82576).
        RLPML(u32) @ 0x5004;
        /// What is done to packets as they are received (82574).
        RFCTL(u32 => ReceiveFilter) @ 0x5008 {
            #[bits(12)]
            __: u16,
            /// Packets that acknowledge by TCP are no cause of interrupts of their own, which would not be moderated
            /// (ACKDIS; FreeBSD's em sets it on this card, too).
            pub no_ack_acceleration: bool,
            #[bits(2)]
            __: u8,
            pub extended_descriptors: bool,
            __: u16,
        }
        /// The multicast table: 4,096 bits.
        MTA(u32)[128] @ 0x5200;
        /// Addresses to receive, in words: six bytes and a bit that says that they are valid.
        RA(u32)[32] @ 0x5400;
        /// The VLAN filter: 4,096 bits.
        VFTA(u32)[128] @ 0x5600;
        /// How packets are told to the queues.
        MRQC(u32) @ 0x5818;
        /// Semaphores between software and firmware (82576).
        SWSM(u32 => Semaphore) @ 0x5b50 {
            pub software: bool,
            pub firmware: bool,
            #[bits(30)]
            __: u32,
        }
        SW_FW_SYNC(u32) @ 0x5b5c;
        /// Which queue a hash leads to.
        RETA(u32)[32] @ 0x5c00;
        RSSRK(u32)[10] @ 0x5c80;
    }

    /// A queue, in either direction.
    pub Ring[0x40] {
        BASE_LOW(u32) @ 0x00;
        BASE_HIGH(u32) @ 0x04;
        /// In bytes.
        LENGTH(u32) @ 0x08;
        /// Split and replication (82576, receive).
        SRRCTL(u32 => ReceiveBuffers) @ 0x0c {
            #[bits(7)]
            pub kib: u8,
            #[bits(18)]
            __: u32,
            /// 1 is an advanced descriptor with one buffer.
            #[bits(3)]
            pub descriptor: u8,
            #[bits(3)]
            __: u8,
            /// A packet is dropped rather than kept for a ring that has no room.
            pub drop: bool,
        }
        HEAD(u32) @ 0x10;
        TAIL(u32) @ 0x18;
        /// Thresholds, and on the 82576 whether the queue is enabled.
        CONTROL(u32 => RingControl) @ 0x28 {
            #[bits(6)]
            pub prefetch: u8,
            #[bits(2)]
            __: u8,
            #[bits(6)]
            pub host: u8,
            #[bits(2)]
            __: u8,
            #[bits(6)]
            pub write_back: u8,
            /// Is to be set in transmit queues (82574).
            pub count_descriptors: bool,
            __: bool,
            /// Thresholds count descriptors, rather than cache lines (82574).
            pub in_descriptors: bool,
            /// (82576)
            pub enabled: bool,
            #[bits(6)]
            __: u8,
        }
    }
}

/// RAH: the address is valid.
pub const ADDRESS_VALID: u32 = 1 << 31;
/// TARC: the queue is served (82574).
pub const QUEUE_SERVED: u32 = 1 << 10;

impl Port {
    /// RAL and RAH of an address.
    pub const fn address_words(index: usize) -> (usize, usize) {
        (2 * index, 2 * index + 1)
    }
}
