//! Our client with the `vfio_user` crate's server, and its client with our server.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{Transport, VfioUser, irq_index};
use vfio_remap::{Device, ErrorKind, Placement, Strategy};
use vfio_user::{
    Client, DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

use crate::support::memory_files::{self, Mapped};
use crate::support::{edu, server, shared};

/// A device of theirs: BAR 0 is a trapped page of bytes, and a mapped one; what is done to it is noted.
struct Backend {
    page: [u8; 0x1000],
    memory: Option<(u64, File, u64)>,
    eventfds: Vec<File>,
    resets: u8,
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        match region {
            0 => data.copy_from_slice(
                self.page.get(start..start + data.len()).ok_or(io::ErrorKind::InvalidInput)?,
            ),
            _ => data.fill(0),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        let page = self.page.get_mut(start..start + data.len()).filter(|_| region == 0);
        page.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
        // A register that copies a word of the driver's memory, and fires.
        if offset == 0x100 {
            let (_, file, start) = self.memory.as_ref().ok_or(io::ErrorKind::NotFound)?;
            file.read_exact_at(&mut self.page[0x200..0x204], *start)?;
            for eventfd in &self.eventfds {
                io::Write::write_all(&mut &*eventfd, &1u64.to_ne_bytes())?;
            }
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        offset: u64,
        address: u64,
        _: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        self.memory = Some((address, fd.ok_or(io::ErrorKind::InvalidInput)?, offset));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, _: u64) -> io::Result<()> {
        let known = self.memory.take_if(|(mapped, ..)| *mapped == address);
        known.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.resets += 1;
        self.page = [0; 0x1000];
        self.page[0x300] = self.resets;
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, flags: u32, _: u32, _: u32, fds: Vec<File>) -> io::Result<()> {
        if flags & VFIO_IRQ_SET_ACTION_TRIGGER != 0 {
            self.eventfds = fds;
        }
        Ok(())
    }
}

/// Memory of each sort that this machine has: of a memfd, a file on a disk, and of huge pages.
fn memories() -> Vec<DmaMemory> {
    let on_disk = memory_files::on_disk(0x1_0000).map(|file| (file, 0x1_0000));
    let huge = memory_files::of_huge_pages(1).map(|file| (file, memory_files::HUGE));
    let files = [on_disk, huge].into_iter().flatten();
    let of_files = files.map(|(file, size)| Mapped::new(&file, size).unwrap().dma(file));
    [shared::memory(0x1_0000, true)].into_iter().chain(of_files).collect()
}

fn region(index: u32, size: u64, memory: Option<&File>) -> ServerRegion {
    let mut flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let mut sparse_areas = Vec::new();
    if memory.is_some() {
        flags |= VFIO_REGION_INFO_FLAG_MMAP;
        let area = vfio_region_sparse_mmap_area { offset: 0x1000, size: 0x1000 };
        sparse_areas.push(SparseArea { area });
    }
    let argsz = size_of::<vfio_region_info>() as u32;
    let region_info = vfio_region_info { argsz, flags, index, size, ..Default::default() };
    ServerRegion { region_info, sparse_areas, mmap_fd: memory.map(AsRawFd::as_raw_fd) }
}

#[test]
fn our_client_drives_a_device_of_their_server() {
    let path = server::path();
    let memory = File::from(memfd_create("vfio-remap-test-bar", MFdFlags::MFD_CLOEXEC).unwrap());
    memory.set_len(0x2000).unwrap();
    let mut regions: Vec<_> = (0..9).map(|index| region(index, 0, None)).collect();
    regions[0] = region(0, 0x2000, Some(&memory));
    regions[7] = region(7, 256, None);
    let irqs = (0..5).map(|index| IrqInfo {
        index,
        flags: VFIO_IRQ_INFO_EVENTFD,
        count: (index == 2).into(),
    });
    let theirs = Server::new(&path, true, irqs.collect(), regions).unwrap();
    let thread = std::thread::spawn(move || {
        let mut backend =
            Backend { page: [0; 0x1000], memory: None, eventfds: Vec::new(), resets: 0 };
        theirs.run(&mut backend).unwrap();
    });

    let client = Arc::new(VfioUser::connect(&path).unwrap());
    let info = client.info();
    assert!(
        info.pci && info.resettable && (info.region_count, info.irq_count) == (9, 5),
        "{info:?}"
    );
    edu::write(&*client, 0x10, 7);
    assert_eq!(edu::read(&*client, 0x10), 7);
    let error = client.read_at(1, 0, &mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let event = edu::event();
    client.set_irqs(irq_index::MSIX, 0, &[Some(event.as_fd())]).unwrap();
    let error = client.set_irqs(irq_index::MSI, 0, &[Some(event.as_fd())]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    for dma in memories() {
        shared::put(&dma, 0, b"ping");
        client.dma_map(0x1000, &dma, Access::ReadWrite).unwrap();
        edu::write(&*client, 0x200, 0);
        edu::write(&*client, 0x100, 1);
        assert_eq!(edu::fired(&event), 1);
        assert_eq!(edu::read(&*client, 0x200), u32::from_le_bytes(*b"ping"));
        client.dma_unmap(0x1000, dma.size() as u64).unwrap();
    }
    // An error of the backend, of which the server does not say the errno.
    let error = client.write_at(0, 0x100, &[0; 4]).unwrap_err();
    assert!(error.to_string().contains("rejected"), "{error}");
    client.reset().unwrap();
    assert_eq!(edu::read(&*client, 0x300), 1);

    let device = Device::new(client);
    let bar = device.bar(0).unwrap();
    let mut window = bar.map(0x1000..0x2000, Placement::Anywhere).unwrap();
    let (copy, report) = window.duplicate(Placement::Anywhere).unwrap();
    assert_eq!(report.strategy, Strategy::DontUnmap, "{report}");
    window.relocate(Placement::Anywhere).unwrap();
    copy.register::<u32>(4).unwrap().write(0xcafe_f00d);
    assert_eq!(window.register::<u32>(4).unwrap().read(), 0xcafe_f00d);
    let mut word = [0; 4];
    memory.read_exact_at(&mut word, 0x1004).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0xcafe_f00d);
    drop((window, copy));
    device.close().unwrap();
    thread.join().unwrap();
}

#[test]
fn their_client_drives_our_edu() {
    let (path, ours) = server::edu();
    let mut client = Client::new(&path).unwrap();
    let bar = client.region(0).unwrap();
    let areas: Vec<_> = bar.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(bar.size, 1 << 20);
    assert_eq!(areas, [(0x1_0000, 0x1_0000), (0x4_0000, 0x1_0000)]);
    let file = bar.file_offset.as_ref().unwrap().file().try_clone().unwrap();
    let mut word = [0; 4];
    file.read_exact_at(&mut word, 0x1_0000).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0x0100_00ed);

    client.region_read(0, 0, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0x0100_00ed);
    client.region_write(0, 4, &7u32.to_le_bytes()).unwrap();
    client.region_read(0, 4, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), !7);

    assert_eq!(client.get_irq_info(1).unwrap().count, 1);
    let event = edu::event();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(1, flags, 0, 1, &[event.as_fd().as_raw_fd()]).unwrap();
    client.region_write(7, 4, &6u16.to_le_bytes()).unwrap();
    for memory in memories() {
        shared::put(&memory, 0x80, b"a block of bytes");
        let (fd, offset) = memory.file().unwrap();
        let size = memory.size() as u64;
        client.dma_map(offset, 0x100_0000, size, fd.as_raw_fd()).unwrap();
        // Into the device, and behind it again in memory.
        for (from, to, command) in [(0x100_0080, 0x4_0000, 5), (0x4_0000, 0x100_0100, 7u64)] {
            for (offset, value) in [(0x80, from), (0x88, to), (0x90, 16), (0x98, command)] {
                client.region_write(0, offset, &value.to_le_bytes()).unwrap();
            }
            assert_eq!(edu::fired(&event), 1);
        }
        let mut block = [0; 16];
        client.region_read(0, 0x4_0000, &mut block).unwrap();
        assert_eq!(&block, b"a block of bytes");
        assert_eq!(shared::get(&memory, 0x100, 16), b"a block of bytes");
        client.dma_unmap(0x100_0000, size).unwrap();
        client.region_write(0, 0x4_0000, &[0; 16]).unwrap();
    }
    client.reset().unwrap();
    client.region_read(0, 4, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0);
    client.shutdown().unwrap();
    ours.join().unwrap().unwrap();
}
