//! Loads a kernel and its initramfs, and writes what the kernel reads first: by the 64-bit boot protocol of Linux
//! (Documentation/arch/x86/boot.rst of its source).

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::{self, GuestMemory, LEGACY};

/// Where the parts lie, below the kernel. The page tables of the lower levels follow the top-level one.
pub const GDT: u64 = 0x500;
pub const ZERO_PAGE: u64 = 0x7000;
pub const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_SIZE: usize = 4096;

/// The offset of the 64-bit entry in a bzImage, and the flag in `xloadflags` that says that there is one.
const ENTRY_64: u64 = 0x200;
const HAS_ENTRY_64: u16 = 1;
/// An initramfs ends below this address.
const INITRD_END: u64 = 0x8000_0000;
/// What identifies the parts.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const UNKNOWN_LOADER: u8 = 0xff;

const NO_KERNEL: &str =
    "give an ELF file (vmlinux) or a bzImage (vmlinuz) of Linux for x86-64: --kernel";
const TOO_SMALL: &str = "the guest's memory is too small for it; give it more: --memory";

/// Loads everything. Returns the address of the first instruction.
pub fn load(
    memory: &GuestMemory,
    kernel: &Path,
    initrd: Option<&Path>,
    append: &str,
) -> Result<u64> {
    let (loaded, needed) = load_kernel(memory, kernel)
        .with_context(|| format!("cannot load the kernel {}", kernel.display()))?;
    // An ELF file has no header.
    let hdr = loaded.setup_header.unwrap_or_default();
    let mut page = boot_params { hdr, ..Default::default() };
    if let Some(path) = initrd {
        let (address, size) = load_initrd(memory, path, needed)
            .with_context(|| format!("cannot load the initramfs {}", path.display()))?;
        page.hdr.ramdisk_image = address as u32;
        page.hdr.ramdisk_size = size as u32;
    }
    let text = [append.as_bytes(), &[0]].concat();
    ensure!(text.len() <= COMMAND_LINE_SIZE, "the kernel's command line is too long: --append");
    memory.write_slice(&text, GuestAddress(COMMAND_LINE))?;
    write_zero_page(memory, page)?;
    write_page_tables(memory)?;
    let offset = if loaded.setup_header.is_some() { ENTRY_64 } else { 0 };
    Ok(loaded.kernel_load.0 + offset)
}

/// The kernel, and the end of what it uses before it knows its memory.
fn load_kernel(memory: &GuestMemory, path: &Path) -> Result<(KernelLoaderResult, u64)> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).context(NO_KERNEL)?;
    file.rewind()?;
    let lowest = Some(GuestAddress(LEGACY.end));
    let loaded = match magic {
        ELF_MAGIC => Elf::load(memory, None, &mut file, lowest),
        _ => BzImage::load(memory, None, &mut file, lowest),
    };
    let loaded = match loaded {
        Err(_) if file.metadata()?.len() > memory.last_addr().0 => bail!(TOO_SMALL),
        other => other.context(NO_KERNEL)?,
    };
    let old = loaded.setup_header.is_some_and(|header| header.xloadflags & HAS_ENTRY_64 == 0);
    ensure!(!old, "it has no 64-bit entry; {NO_KERNEL}");
    let (start, size) = match loaded.setup_header {
        // It unpacks itself, at this address or where it was loaded.
        Some(header) => (loaded.kernel_load.0.max(header.pref_address), header.init_size.into()),
        None => (loaded.kernel_end, 0),
    };
    let needed = start.checked_add(size).context(NO_KERNEL)?;
    ensure!(needed <= memory.last_addr().0 + 1, TOO_SMALL);
    Ok((loaded, needed))
}

/// Loads the initramfs as high as possible, but not below `after`. Returns its address and size.
fn load_initrd(memory: &GuestMemory, path: &Path, after: u64) -> Result<(u64, u64)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let end = INITRD_END.min(memory.last_addr().0 + 1);
    let start = end.checked_sub(size).map(|start| start & !0xfff);
    let start = start.filter(|start| *start >= after).context(TOO_SMALL)?;
    memory.read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)?;
    Ok((start, size))
}

fn write_zero_page(memory: &GuestMemory, mut page: boot_params) -> Result<()> {
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.type_of_loader = UNKNOWN_LOADER;
    page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    page.hdr.cmdline_size = COMMAND_LINE_SIZE as u32;
    let map = memory::map(memory.last_addr().0 + 1);
    page.e820_entries = map.len() as u8;
    for (entry, (addr, size, type_)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: type_ };
    }
    Ok(memory.write_obj(page, GuestAddress(ZERO_PAGE))?)
}

/// Page tables that map the first GiB to itself by pages of 2 MiB, and the descriptors of a flat code and a flat data
/// segment, in the places 0x10 and 0x18.
fn write_page_tables(memory: &GuestMemory) -> Result<()> {
    const PRESENT_AND_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let [second, third] = [PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000];
    let large = (0..512).map(|n| (third + 8 * n, n << 21 | LARGE));
    for (address, entry) in large.chain([(PAGE_TABLES, second), (second, third)]) {
        memory.write_obj(entry | PRESENT_AND_WRITABLE, GuestAddress(address))?;
    }
    memory.write_obj(0x00af_9b00_0000_ffff_u64, GuestAddress(GDT + 0x10))?;
    Ok(memory.write_obj(0x00cf_9300_0000_ffff_u64, GuestAddress(GDT + 0x18))?)
}

#[cfg(test)]
pub mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    pub fn file(name: &str, content: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmm-test-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        path
    }

    fn refused(name: &str, content: &[u8], initrd: Option<&Path>) -> String {
        let path = file(name, content);
        let memory = memory::create(memory::LEAST).unwrap();
        let error = load(&memory, &path, initrd, "").unwrap_err();
        fs::remove_file(path).unwrap();
        format!("{error:#}")
    }

    /// A bzImage that begins with these instructions.
    pub fn program(code: &[u8]) -> Vec<u8> {
        let mut image = bzimage(0, 1 << 20);
        image[0x400 + ENTRY_64 as usize..][..code.len()].copy_from_slice(code);
        image
    }

    /// A bzImage of at least `size` bytes that says it needs `init_size` bytes of memory.
    fn bzimage(size: usize, init_size: u32) -> Vec<u8> {
        let mut image = vec![0; size.max(0x1000)];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&HAS_ENTRY_64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_with_advice() {
        let mut old = bzimage(0, 0);
        old[0x236] = 0;
        // It is to be at the last address.
        let mut last = bzimage(0, 1 << 20);
        last[0x258..0x260].fill(0xff);
        for (name, content) in [
            ("empty", &b""[..]),
            ("text", b"#!/bin/sh\n"),
            ("elf", b"\x7fELF and no more"),
            ("old", &old),
            ("last", &last),
        ] {
            let error = refused(name, content, None);
            assert!(error.contains(name) && error.contains("vmlinuz"), "{error}");
        }
    }

    #[test]
    fn what_exceeds_the_memory_is_refused_with_advice() {
        let size = (memory::LEAST as usize) << 20;
        let initrd = file("initrd", &vec![0; size - (1 << 20)]);
        for (name, content, initrd) in [
            ("file", bzimage(size + 1, 0), None),
            ("unpacked", bzimage(0, size as u32), None),
            ("both", bzimage(0, 1 << 20), Some(&*initrd)),
        ] {
            let error = refused(name, &content, initrd);
            assert!(error.contains("--memory"), "{name}: {error}");
        }
        fs::remove_file(initrd).unwrap();
    }

    #[test]
    fn a_kernel_finds_its_initramfs_at_the_end_of_memory() {
        let path = file("good", &bzimage(0, 1 << 20));
        let memory = memory::create(memory::LEAST).unwrap();
        let entry = load(&memory, &path, Some(&path), "quiet").unwrap();
        assert_eq!(entry, LEGACY.end + ENTRY_64);
        let image: u32 = memory.read_obj(GuestAddress(ZERO_PAGE + 0x218)).unwrap();
        assert_eq!(u64::from(image), (memory::LEAST << 20) - 0x1000);
        let magic: u32 = memory.read_obj(GuestAddress(u64::from(image) + 0x202)).unwrap();
        assert_eq!(magic, HEADER_MAGIC);
        fs::remove_file(path).unwrap();
    }
}
