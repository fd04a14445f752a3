//! I/O commands (NVMe 1.4 §6), and the data of all commands.

use std::collections::VecDeque;

use super::command::{Command, Status};
use super::long::Zeros;
use super::queue::parts;
use super::storage::Namespace;
use super::{MAX_TRANSFER_PAGES, Nvme, Progress, admin};
use crate::emulated::Bus;

impl Nvme {
    pub(super) fn io(
        &mut self,
        bus: &Bus,
        command: &Command,
    ) -> std::result::Result<Progress, Status> {
        if command.is_fused_or_sgl() {
            return Err(Status::INVALID_FIELD);
        }
        let page = self.page();
        // If the cache is disabled, every write is durable.
        let uncached = self.features.get(&admin::WRITE_CACHE).is_some_and(|value| value & 1 == 0);
        let failed = |_| Status::INTERNAL_ERROR;
        if (command.opcode(), command.namespace()) == (0x00, u32::MAX) {
            self.namespaces.iter_mut().try_for_each(Namespace::flush).map_err(failed)?;
            return Ok(Progress::Done(0));
        }
        let id = command.namespace();
        let namespace = self.namespace(id)?;
        let (block, control) = (command.block(), command.dword(12));
        let count = u64::from(control & 0xffff) + 1;
        let len = (count << namespace.shift()) as usize;
        let durable = uncached || control & 1 << 30 != 0;
        match command.opcode() {
            0x00 => namespace.flush().map_err(failed)?,
            0x01 | 0x02 => {
                namespace.check(block, count)?;
                if len > MAX_TRANSFER_PAGES * 4096 {
                    return Err(Status::INVALID_FIELD);
                }
                let mut data = vec![0; len];
                if command.opcode() == 0x01 {
                    namespace.check_write(block, count)?;
                    gather(bus, command, page, &mut data)?;
                    namespace.write(block, &data, durable).map_err(failed)?;
                } else {
                    namespace.read(block, &mut data).map_err(failed)?;
                    scatter(bus, command, page, &data)?;
                }
            }
            0x08 => {
                namespace.check_write(block, count)?;
                let ranges = [(block, count)].into();
                return Ok(Progress::Long(Zeros { namespace: id, ranges, durable }));
            }
            0x09 => {
                let mut ranges = vec![0; 16 * (command.dword(10) as usize % 256 + 1)];
                gather(bus, command, page, &mut ranges)?;
                let (ranges, _) = ranges.as_chunks::<16>();
                // All attributes but Deallocate are hints.
                let deallocate = command.dword(11) & 1 << 2 != 0;
                let ranges = ranges.iter().filter(|_| deallocate).map(|range| {
                    let [low, block] = [0, 8].map(|at| {
                        let word: [u8; 8] = std::array::from_fn(|index| range[at + index]);
                        u64::from_le_bytes(word)
                    });
                    let count = low >> 32;
                    namespace.check_write(block, count).map(|()| (block, count))
                });
                let ranges: VecDeque<_> = ranges.collect::<std::result::Result<_, _>>()?;
                let ranges = ranges.into_iter().filter(|(_, count)| *count > 0).collect();
                return Ok(Progress::Long(Zeros { namespace: id, ranges, durable }));
            }
            _ => return Err(Status::INVALID_OPCODE),
        }
        Ok(Progress::Done(0))
    }
}

/// Reads a command's data.
pub(super) fn gather(
    bus: &Bus,
    command: &Command,
    page: usize,
    data: &mut [u8],
) -> std::result::Result<(), Status> {
    let mut rest = data;
    for (address, len) in parts(bus, command.prps(), rest.len(), page)? {
        let (part, after) = rest.split_at_mut(len);
        bus.dma_read(address, part).map_err(|_| Status::TRANSFER_ERROR)?;
        rest = after;
    }
    Ok(())
}

/// Writes a command's data.
pub(super) fn scatter(
    bus: &Bus,
    command: &Command,
    page: usize,
    data: &[u8],
) -> std::result::Result<(), Status> {
    let mut rest = data;
    for (address, len) in parts(bus, command.prps(), rest.len(), page)? {
        let (part, after) = rest.split_at(len);
        bus.dma_write(address, part).map_err(|_| Status::TRANSFER_ERROR)?;
        rest = after;
    }
    Ok(())
}
