//! A PCI device as a test describes it: its configuration space, its regions, which are memory files, and its
//! interrupts. It remembers what is written to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::write;
use vfio_remap::transport::{DeviceInfo, IrqInfo, RegionFile, RegionInfo};
use vfio_remap::{Error, ErrorKind, Result, Transport};

pub const CONFIG: u32 = 7;
pub const ROM: u32 = 6;

#[derive(Debug)]
pub struct Card {
    config: Mutex<Vec<u8>>,
    regions: BTreeMap<u32, (RegionInfo, Arc<OwnedFd>)>,
    irqs: [IrqInfo; 3],
    resettable: bool,
    /// What was written to configuration space: offset and bytes.
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Accesses to the other regions: the region, the offset, the length, whether it was a write.
    accesses: Mutex<Vec<(u32, u64, usize, bool)>>,
    connected: Mutex<BTreeMap<(u32, u32), OwnedFd>>,
    resets: Mutex<u32>,
    /// The vectors from this one on that cannot be connected, and how often that was tried.
    refused: Option<u32>,
    tries: Mutex<u32>,
    /// Where the regions begin in their files.
    file_start: u64,
    /// How often a byte of configuration space can still be read before it and those after it change.
    change: Mutex<Option<(u32, usize, Vec<u8>)>>,
    /// How many of the next writes to configuration space fail.
    failing: Mutex<u32>,
}

impl Card {
    /// A device without BARs, capabilities and interrupts, with `size` bytes of configuration space.
    pub fn new(size: usize) -> Self {
        let mut config = vec![0; size];
        config[..12].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10, 0, 0, 0, 0, 3, 0, 0, 2]);
        Self {
            config: Mutex::new(config),
            regions: BTreeMap::new(),
            irqs: Default::default(),
            resettable: true,
            written: Mutex::default(),
            accesses: Mutex::default(),
            connected: Mutex::default(),
            resets: Mutex::default(),
            refused: None,
            tries: Mutex::default(),
            file_start: 0,
            change: Mutex::default(),
            failing: Mutex::default(),
        }
    }

    pub fn with(self, at: usize, bytes: &[u8]) -> Self {
        self.config.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Adds capabilities: their offsets and bytes, of which the first is the ID. The second becomes the link.
    pub fn with_capabilities(self, all: &[(u8, &[u8])]) -> Self {
        let mut this = self.with(6, &[0x10, 0]);
        let mut link = 0x34;
        for (at, bytes) in all {
            this = this.with(usize::from(*at), bytes).with(link, &[*at]);
            link = usize::from(*at) + 1;
            this = this.with(link, &[0]);
        }
        this
    }

    /// Adds a BAR with these flag bits.
    pub fn with_bar(self, index: u32, flags: u8, info: RegionInfo) -> Self {
        self.with(0x10 + 4 * index as usize, &[flags]).with_region(index, info)
    }

    pub fn with_region(mut self, index: u32, info: RegionInfo) -> Self {
        let fd = memfd_create("vfio-remap-test-bar", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        let size = info.size.next_multiple_of(4096).min(1 << 40);
        file.set_len(self.file_start + size).unwrap();
        self.regions.insert(index, (info, Arc::new(file.into())));
        self
    }

    pub fn with_irqs(mut self, index: u32, info: IrqInfo) -> Self {
        self.irqs[index as usize] = info;
        self
    }

    pub fn without_reset(mut self) -> Self {
        self.resettable = false;
        self
    }

    /// The regions that are added later begin at this offset of their files.
    pub fn with_files_from(mut self, file_start: u64) -> Self {
        self.file_start = file_start;
        self
    }

    /// The machine has no interrupts left for this vector and those after it.
    pub fn with_vectors_up_to(mut self, first_refused: u32) -> Self {
        self.refused = Some(first_refused);
        self
    }

    /// Bytes of configuration space change when the first of them has been read so often.
    pub fn with_change(mut self, reads: u32, at: usize, bytes: &[u8]) -> Self {
        self.change = Mutex::new(Some((reads, at, bytes.to_vec())));
        self
    }

    /// The next writes to configuration space fail, so many.
    pub fn fail_writes(&self, count: u32) {
        *self.failing.lock().unwrap() = count;
    }

    /// How often a vector was refused.
    pub fn tries(&self) -> u32 {
        *self.tries.lock().unwrap()
    }

    /// What was written to configuration space since the last call.
    pub fn take_written(&self) -> Vec<(u64, Vec<u8>)> {
        std::mem::take(&mut self.written.lock().unwrap())
    }

    pub fn take_accesses(&self) -> Vec<(u32, u64, usize, bool)> {
        std::mem::take(&mut self.accesses.lock().unwrap())
    }

    pub fn set(&self, at: usize, bytes: &[u8]) {
        self.config.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn resets(&self) -> u32 {
        *self.resets.lock().unwrap()
    }

    /// The vectors of an index that are connected.
    pub fn connected(&self, index: u32) -> Vec<u32> {
        let connected = self.connected.lock().unwrap();
        connected.keys().filter(|(i, _)| *i == index).map(|(_, vector)| *vector).collect()
    }

    pub fn fire(&self, index: u32, vector: u32) {
        let connected = self.connected.lock().unwrap();
        write(&connected[&(index, vector)], &1u64.to_ne_bytes()).unwrap();
    }

    fn file(&self, region: u32) -> Result<File> {
        let missing = || Error::new(ErrorKind::NotFound, "find", format!("region {region}"));
        let (_, fd) = self.regions.get(&region).ok_or_else(missing)?;
        Ok(File::from(fd.try_clone().unwrap()))
    }
}

fn out_of_range(region: u32, offset: u64) -> Error {
    Error::new(ErrorKind::OutOfRange, "access", format!("region {region} at {offset:#x}"))
}

impl Transport for Card {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("0000:00:03.0", 9);
        (info.pci, info.resettable) = (true, self.resettable);
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        if index == CONFIG {
            return Ok(RegionInfo::trapped(self.config.lock().unwrap().len() as u64));
        }
        self.file(index).map(|_| self.regions[&index].0.clone())
    }

    fn read_at(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        if region != CONFIG {
            self.accesses.lock().unwrap().push((region, offset, data.len(), false));
            return self
                .file(region)?
                .read_exact_at(data, offset)
                .map_err(|_| out_of_range(region, offset));
        }
        let mut config = self.config.lock().unwrap();
        let mut change = self.change.lock().unwrap();
        if let Some((reads, at, bytes)) = &mut *change
            && (offset as usize..offset as usize + data.len()).contains(at)
        {
            match reads.checked_sub(1) {
                Some(left) => *reads = left,
                None => config[*at..*at + bytes.len()].copy_from_slice(bytes),
            }
        }
        let from = config.get(offset as usize..offset as usize + data.len());
        data.copy_from_slice(from.ok_or_else(|| out_of_range(region, offset))?);
        Ok(())
    }

    fn write_at(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        if region != CONFIG {
            self.accesses.lock().unwrap().push((region, offset, data.len(), true));
            let info = self.region(region)?;
            if offset + data.len() as u64 > info.size {
                return Err(out_of_range(region, offset));
            }
            self.file(region)?.write_all_at(data, offset).unwrap();
            return Ok(());
        }
        let mut failing = self.failing.lock().unwrap();
        if let Some(left) = failing.checked_sub(1) {
            *failing = left;
            return Err(Error::from_errno(libc::EIO, "write", "configuration space"));
        }
        self.written.lock().unwrap().push((offset, data.to_vec()));
        self.set(offset as usize, data);
        Ok(())
    }

    fn backing(&self, region: u32) -> Result<RegionFile> {
        RegionFile::memory(self.regions[&region].1.clone(), self.file_start)
    }

    fn reset(&self) -> Result<()> {
        *self.resets.lock().unwrap() += 1;
        self.set(4, &[0, 0]);
        Ok(())
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        Ok(self.irqs.get(index as usize).copied().unwrap_or_default())
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let mut connected = self.connected.lock().unwrap();
        assert!(connected.keys().all(|(other, _)| *other == index), "one kind at a time");
        if fds.is_empty() {
            connected.clear();
        }
        if self.refused.is_some_and(|first| first < start + fds.len() as u32) {
            *self.tries.lock().unwrap() += 1;
            return Err(Error::from_errno(libc::ENOSPC, "connect", "a vector"));
        }
        for (vector, fd) in (start..).zip(fds) {
            assert!(vector < self.irqs[index as usize].count);
            connected.remove(&(index, vector));
            if let Some(fd) = fd {
                connected.insert((index, vector), fd.try_clone_to_owned().unwrap());
            }
        }
        Ok(())
    }

    fn unmask_irq_by(&self, _: u32, _: u32, _: Option<BorrowedFd<'_>>) -> Result<()> {
        Ok(())
    }
}
