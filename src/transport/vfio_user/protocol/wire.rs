//! The messages of vfio-user 0.1 (libvfio-user `docs/vfio-user.rst`, QEMU `docs/interop/vfio-user.rst`):
//! a header of 16 bytes, fixed fields, and data, all in this machine's byte order.

use nix::errno::Errno;

/// The version that is spoken here, as is every smaller minor version.
pub(crate) const MAJOR: u16 = 0;
pub(crate) const MINOR: u16 = 1;

/// Commands by number.
pub(crate) mod command {
    pub(crate) const VERSION: u16 = 1;
    pub(crate) const DMA_MAP: u16 = 2;
    pub(crate) const DMA_UNMAP: u16 = 3;
    pub(crate) const DEVICE_GET_INFO: u16 = 4;
    pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(crate) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(crate) const DEVICE_SET_IRQS: u16 = 8;
    pub(crate) const REGION_READ: u16 = 9;
    pub(crate) const REGION_WRITE: u16 = 10;
    pub(crate) const DMA_READ: u16 = 11;
    pub(crate) const DMA_WRITE: u16 = 12;
    pub(crate) const DEVICE_RESET: u16 = 13;
    pub(crate) const REGION_WRITE_MULTI: u16 = 15;

    /// How errors and logs name a command.
    pub(crate) fn name(command: u16) -> String {
        let name = match command {
            VERSION => "VERSION",
            DMA_MAP => "DMA_MAP",
            DMA_UNMAP => "DMA_UNMAP",
            DEVICE_GET_INFO => "DEVICE_GET_INFO",
            DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            REGION_READ => "REGION_READ",
            REGION_WRITE => "REGION_WRITE",
            DMA_READ => "DMA_READ",
            DMA_WRITE => "DMA_WRITE",
            DEVICE_RESET => "DEVICE_RESET",
            REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            _ => return format!("command {command}"),
        };
        name.to_owned()
    }
}

/// Fields one after another, without padding.
macro_rules! fields {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(crate) struct $name { $(pub(crate) $field: $type,)* }

        impl $name {
            /// How many bytes they are.
            pub(crate) const SIZE: usize = 0 $(+ size_of::<$type>())*;

            pub(crate) fn encode(&self) -> [u8; Self::SIZE] {
                let mut bytes = [0; Self::SIZE];
                let mut rest = &mut bytes[..];
                $(
                    let (field, after) = rest.split_at_mut(size_of::<$type>());
                    field.copy_from_slice(&self.$field.to_ne_bytes());
                    rest = after;
                )*
                let _ = rest;
                bytes
            }

            /// The fields at the start of `bytes`, and the bytes behind them; `None` if they are cut
            /// short.
            pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
                let rest = bytes;
                $(
                    let (field, rest) = rest.split_first_chunk()?;
                    let $field = <$type>::from_ne_bytes(*field);
                )*
                Some((Self { $($field,)* }, rest))
            }
        }
    };
}

fields! {
    /// What every message begins with. `size` includes the header; `error` is an errno.
    Header { id: u16, command: u16, size: u32, flags: u32, error: u32, }
}

fields! {
    /// Followed by capabilities in JSON, with a final NUL.
    Version { major: u16, minor: u16, }
}

fields! {
    /// `offset` is the offset in the file that comes with it.
    DmaMap { argsz: u32, flags: u32, offset: u64, address: u64, size: u64, }
}

fields! {
    /// Echoed in the reply.
    DmaUnmap { argsz: u32, flags: u32, address: u64, size: u64, }
}

fields! {
    /// `struct vfio_device_info` as the protocol has it.
    DeviceInfo { argsz: u32, flags: u32, regions: u32, irqs: u32, }
}

fields! {
    /// `struct vfio_region_info`; capabilities follow.
    RegionInfo { argsz: u32, flags: u32, index: u32, cap_offset: u32, size: u64, offset: u64, }
}

fields! {
    /// `struct vfio_irq_info`
    IrqInfo { argsz: u32, flags: u32, index: u32, count: u32, }
}

fields! {
    /// `struct vfio_irq_set`; booleans may follow.
    IrqSet { argsz: u32, flags: u32, index: u32, start: u32, count: u32, }
}

fields! {
    /// An access to a region; the data of a write, and of the reply to a read, follow.
    RegionAccess { offset: u64, region: u32, count: u32, }
}

fields! {
    /// What `REGION_WRITE_MULTI` begins with: how many writes follow. The reply has how many were done.
    WriteCount { count: u64, }
}

fields! {
    /// One of those writes: the first `count` bytes of `data`, of 8 at most.
    SmallWrite { offset: u64, region: u32, count: u32, data: u64, }
}

fields! {
    /// An access of the server to memory that was mapped for DMA; data follow as for regions.
    DmaAccess { address: u64, count: u64, }
}

/// `flags` of [`DmaMap`].
pub(crate) const DMA_READABLE: u32 = 1 << 0;
pub(crate) const DMA_WRITABLE: u32 = 1 << 1;
/// `flags` of [`DmaUnmap`]: everything, with an address and a size of 0.
pub(crate) const DMA_UNMAP_ALL: u32 = 1 << 1;

const TYPE: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

impl Header {
    /// The header of a command of `body` bytes.
    pub(crate) fn command(id: u16, command: u16, body: usize) -> Self {
        Self { id, command, size: size_with(body), flags: 0, error: 0 }
    }

    /// The header of the reply to `self`, of `body` bytes.
    pub(crate) fn reply(&self, body: usize) -> Self {
        Self { size: size_with(body), flags: REPLY, error: 0, ..*self }
    }

    /// A whole reply that reports an error.
    pub(crate) fn failure(&self, errno: Errno) -> Self {
        Self { flags: REPLY | ERROR, error: errno as u32, ..self.reply(0) }
    }

    pub(crate) fn is_command(&self) -> bool {
        self.flags & TYPE == 0
    }

    pub(crate) fn is_reply(&self) -> bool {
        self.flags & TYPE == REPLY
    }

    pub(crate) fn wants_reply(&self) -> bool {
        self.flags & NO_REPLY == 0
    }

    /// The errno of a reply that reports an error; 0 if the peer does not name one.
    pub(crate) fn failed(&self) -> Option<i32> {
        (self.flags & ERROR != 0).then(|| i32::try_from(self.error).unwrap_or(0))
    }
}

/// A body is never larger than a few MiB: see [`MAX_TRANSFER`](super::version::MAX_TRANSFER).
fn size_with(body: usize) -> u32 {
    u32::try_from(Header::SIZE + body).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_protocol_has_them() {
        let header = Header { id: 0x0102, command: 9, size: 32, flags: 1, error: 5 };
        let bytes = header.encode();
        assert_eq!(bytes[..2], 0x0102u16.to_ne_bytes());
        assert_eq!(bytes[4..8], 32u32.to_ne_bytes());
        assert_eq!(bytes[12..], 5u32.to_ne_bytes());
        assert_eq!(Header::decode(&bytes), Some((header, &[][..])));
        let sizes = [Header::SIZE, DmaMap::SIZE, DmaUnmap::SIZE, RegionInfo::SIZE, IrqSet::SIZE];
        assert_eq!(sizes, [16, 32, 24, 32, 20]);
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let bytes = RegionAccess { offset: 1, region: 2, count: 3 }.encode();
        for len in 0..bytes.len() {
            assert_eq!(RegionAccess::decode(&bytes[..len]), None);
        }
    }

    #[test]
    fn a_reply_echoes_id_and_command() {
        let command = Header::command(7, command::REGION_READ, 16);
        assert!(command.is_command() && command.wants_reply());
        let reply = command.reply(20);
        assert_eq!((reply.id, reply.command, reply.size), (7, command::REGION_READ, 36));
        assert!(reply.is_reply() && reply.failed().is_none());
        let failure = command.failure(Errno::EINVAL);
        assert_eq!((failure.size, failure.failed()), (16, Some(Errno::EINVAL as i32)));
    }
}
