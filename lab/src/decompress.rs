//! Decompresses the kernels and modules of Debian's packages: QEMU boots an
//! uncompressed kernel in half the time, and a guest needs no decompressor for
//! uncompressed modules.

use std::io::{Seek, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

const ELF: &[u8] = b"\x7fELF";
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";

/// The ELF file in `content`, decompressed if needed.
pub fn elf(content: Vec<u8>) -> Result<Vec<u8>> {
    let program = if content.starts_with(ELF) {
        return Ok(content);
    } else if content.starts_with(XZ) {
        "xz"
    } else if content.starts_with(ZSTD) {
        "zstd"
    } else {
        bail!("its compression is not supported");
    };
    // A file, since writing to one pipe while reading from another requires a thread.
    let mut compressed = tempfile::tempfile()?;
    compressed.write_all(&content)?;
    compressed.rewind()?;
    let output = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::from(compressed))
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program} failed");
    ensure!(output.stdout.starts_with(ELF), "the output of {program} is not an ELF file");
    Ok(output.stdout)
}

/// The kernel in a bzImage, as the kernel's `Documentation/arch/x86/boot.rst`
/// describes it: boot sectors, then code that decompresses the payload. The
/// payload's last four bytes are its decompressed length.
pub fn kernel(bz_image: &[u8]) -> Result<Vec<u8>> {
    const SECTOR: usize = 512;
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;

    let field = |at: usize| -> Option<usize> {
        let bytes = bz_image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let payload = || {
        if bz_image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
            return None;
        }
        // 0 means 4, for compatibility with very old boot loaders.
        let setup_sectors = match bz_image[SETUP_SECTORS] {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let start = (setup_sectors + 1) * SECTOR + field(PAYLOAD_OFFSET)?;
        let end = start + field(PAYLOAD_LENGTH)?.checked_sub(4)?;
        bz_image.get(start..end)
    };
    elf(payload().context("not a bzImage")?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_in_a_bz_image() {
        let payload = b"\x7fELF kernel\x0b\0\0\0";
        let mut image = vec![0; 0x500];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&0x10_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image[0x410..0x410 + payload.len()].copy_from_slice(payload);
        assert_eq!(kernel(&image).unwrap(), b"\x7fELF kernel");
    }

    #[test]
    fn other_files_are_refused() {
        assert!(kernel(b"").is_err());
        assert!(kernel(&[0; 0x400]).is_err());
        assert!(elf(b"\x1f\x8b gzip".to_vec()).is_err());
    }
}
