//! What a client has mapped for DMA, by I/O virtual address, and access to memory of this process as a device
//! would do it.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::getpid;

use super::wire::{DMA_READABLE, DMA_WRITABLE};
use crate::space::{Access, DmaMemory};

/// What a device may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights(u32);

impl Rights {
    pub(crate) const READ: Self = Self(DMA_READABLE);
    pub(crate) const WRITE: Self = Self(DMA_WRITABLE);

    /// By the flags of a `DMA_MAP` message.
    pub(crate) fn from_flags(flags: u32) -> Self {
        Self(flags & (DMA_READABLE | DMA_WRITABLE))
    }

    pub(crate) fn flags(self) -> u32 {
        self.0
    }

    pub(crate) fn include(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

impl From<Access> for Rights {
    fn from(access: Access) -> Self {
        match access {
            Access::ReadOnly => Self::READ,
            Access::ReadWrite => Self(DMA_READABLE | DMA_WRITABLE),
        }
    }
}

/// Mappings by their first address.
#[derive(Debug)]
pub(crate) struct DmaTable<T> {
    entries: BTreeMap<u64, Entry<T>>,
    room: u32,
}

#[derive(Debug)]
struct Entry<T> {
    size: u64,
    rights: Rights,
    target: T,
}

/// A part of an access: the bytes `range` of it lie at `offset` in `target`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece<T> {
    pub(crate) target: T,
    pub(crate) offset: u64,
    pub(crate) range: Range<usize>,
}

impl<T: Clone> DmaTable<T> {
    /// No mappings, and never more than `room`.
    pub(crate) fn new(room: u32) -> Self {
        Self { entries: BTreeMap::new(), room }
    }

    /// How many more mappings there may be.
    pub(crate) fn room(&self) -> u32 {
        self.room.saturating_sub(self.entries.len() as u32)
    }

    /// EINVAL if the range is empty or wraps around, EEXIST if it overlaps another, ENOSPC if there is no room.
    pub(crate) fn insert(
        &mut self,
        address: u64,
        size: u64,
        rights: Rights,
        target: T,
    ) -> Result<(), Errno> {
        let last = size.checked_sub(1).and_then(|size| address.checked_add(size));
        let last = last.ok_or(Errno::EINVAL)?;
        if let Some((start, entry)) = self.entries.range(..=last).next_back()
            && start + (entry.size - 1) >= address
        {
            return Err(Errno::EEXIST);
        }
        if self.room() == 0 {
            return Err(Errno::ENOSPC);
        }
        self.entries.insert(address, Entry { size, rights, target });
        Ok(())
    }

    /// Removes a mapping if `may` accepts its target. ENOENT if it does not, or if there is no mapping of exactly
    /// this range.
    pub(crate) fn remove_if(
        &mut self,
        address: u64,
        size: u64,
        may: impl FnOnce(&T) -> bool,
    ) -> Result<T, Errno> {
        let entry = self.entries.get(&address).filter(|entry| entry.size == size);
        if !entry.is_some_and(|entry| may(&entry.target)) {
            return Err(Errno::ENOENT);
        }
        self.entries.remove(&address).map(|entry| entry.target).ok_or(Errno::ENOENT)
    }

    /// ENOENT if there is no mapping of exactly this range.
    pub(crate) fn remove(&mut self, address: u64, size: u64) -> Result<(), Errno> {
        self.remove_if(address, size, |_| true).map(drop)
    }

    /// Removes the mappings whose target `keep` rejects.
    #[cfg(feature = "emulated")]
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.entries.retain(|_, entry| keep(&entry.target));
    }

    /// Where the `len` bytes at `address` are. EFAULT if a part of them is not mapped, EACCES if it is not mapped
    /// for `wanted`.
    pub(crate) fn find(
        &self,
        address: u64,
        len: usize,
        wanted: Rights,
    ) -> Result<Vec<Piece<T>>, Errno> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = address.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let (start, entry) = self.entries.range(..=at).next_back().ok_or(Errno::EFAULT)?;
            let offset = at - start;
            let room = entry.size.checked_sub(offset).filter(|&room| room > 0);
            let room = room.ok_or(Errno::EFAULT)?;
            if !entry.rights.include(wanted) {
                return Err(Errno::EACCES);
            }
            let part = usize::try_from(room).unwrap_or(usize::MAX).min(len - done);
            pieces.push(Piece { target: entry.target.clone(), offset, range: done..done + part });
            done += part;
        }
        Ok(pieces)
    }
}

/// Reads memory of this process as a device would. The kernel copies: no reference to the memory exists, and a
/// page that is missing is EFAULT.
pub(crate) fn read(memory: &DmaMemory, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
    let remote = [place(memory, offset, data.len())?];
    let len = data.len();
    whole(process_vm_readv(getpid(), &mut [IoSliceMut::new(data)], &remote)?, len)
}

/// Writes memory of this process, as [`read`] reads.
pub(crate) fn write(memory: &DmaMemory, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let remote = [place(memory, offset, data.len())?];
    whole(process_vm_writev(getpid(), &[IoSlice::new(data)], &remote)?, data.len())
}

fn place(memory: &DmaMemory, offset: u64, len: usize) -> Result<RemoteIoVec, Errno> {
    let offset = usize::try_from(offset).map_err(|_| Errno::EFAULT)?;
    match offset.checked_add(len) {
        Some(end) if end <= memory.size() && memory.is_mapped() => {
            Ok(RemoteIoVec { base: memory.address() + offset, len })
        }
        _ => Err(Errno::EFAULT),
    }
}

fn whole(done: usize, len: usize) -> Result<(), Errno> {
    if done == len { Ok(()) } else { Err(Errno::EFAULT) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Rights = Rights(DMA_READABLE | DMA_WRITABLE);

    fn table() -> DmaTable<char> {
        let mut table = DmaTable::new(4);
        table.insert(0x1000, 0x1000, BOTH, 'a').unwrap();
        table.insert(0x2000, 0x1000, Rights::READ, 'b').unwrap();
        table.insert(u64::MAX - 0xfff, 0x1000, BOTH, 'z').unwrap();
        table
    }

    #[test]
    fn an_access_may_span_mappings_that_touch_and_nothing_else() {
        let table = table();
        let pieces = table.find(0x1ff0, 0x20, Rights::READ).unwrap();
        let expected = [
            Piece { target: 'a', offset: 0xff0, range: 0..0x10 },
            Piece { target: 'b', offset: 0, range: 0x10..0x20 },
        ];
        assert_eq!(pieces, expected);
        assert_eq!(table.find(0x1ff0, 0x20, Rights::WRITE), Err(Errno::EACCES));
        for (address, len) in [(0, 1), (0xfff, 2), (0x2ff0, 0x11), (0x3000, 1), (u64::MAX, 2)] {
            assert_eq!(table.find(address, len, Rights::READ), Err(Errno::EFAULT), "{address:#x}");
        }
        assert_eq!(table.find(u64::MAX, 1, Rights::WRITE).unwrap()[0].offset, 0xfff);
    }

    #[test]
    fn mappings_neither_overlap_nor_wrap_nor_grow_in_number() {
        let mut table = table();
        for (address, size) in [(0, 0), (2, u64::MAX), (u64::MAX, 2)] {
            assert_eq!(table.insert(address, size, BOTH, '-'), Err(Errno::EINVAL));
        }
        for (address, size) in [(0, 0x1001), (0x1800, 1), (0x2fff, 1), (0, u64::MAX), (u64::MAX, 1)]
        {
            assert_eq!(table.insert(address, size, BOTH, '-'), Err(Errno::EEXIST));
        }
        table.insert(0, 0x1000, BOTH, 'c').unwrap();
        assert_eq!(table.insert(0x3000, 1, BOTH, '-'), Err(Errno::ENOSPC));
    }

    #[test]
    fn only_what_was_mapped_is_unmapped() {
        let mut table = table();
        assert_eq!(table.remove(0x1000, 0x2000), Err(Errno::ENOENT));
        assert_eq!(table.remove(0x1800, 0x800), Err(Errno::ENOENT));
        assert_eq!(table.remove(0x1000, 0x1000), Ok(()));
        assert_eq!(table.remove(0x1000, 0x1000), Err(Errno::ENOENT));
        assert_eq!(table.room(), 2);
    }
}
