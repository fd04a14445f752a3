//! Protects data on a device from accidental destruction.

use vfio_remap::{Error, ErrorKind, Result};

use crate::mover::Mover;
use crate::options::Common;
use crate::session::Session;

/// How many bytes of a device are examined: btrfs has its first superblock at 64 KiB.
const EXAMINED: u64 = 128 << 10;

/// Signatures: a name, an offset, and the bytes there.
const SIGNATURES: [(&str, usize, &[u8]); 17] = [
    ("a GUID partition table", 512, b"EFI PART"),
    ("a GUID partition table", 4096, b"EFI PART"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("an XFS file system", 0, b"XFSB"),
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("a btrfs file system", 0x1_0040, b"_BHRfS_M"),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("swap space", 4086, b"SWAP-SPACE"),
    ("swap space", 65526, b"SWAPSPACE2"),
    ("an LVM physical volume", 0, b"LABELONE"),
    ("an LVM physical volume", 512, b"LABELONE"),
    ("an LVM physical volume", 1024, b"LABELONE"),
    ("an LVM physical volume", 1536, b"LABELONE"),
    ("a member of an MD array", 4096, b"\xfc\x4e\x2b\xa9"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
];

/// The end of a partition table or of a boot block, including that of most FAT file systems.
const BOOT_BLOCK: (&str, usize, &[u8]) =
    ("a partition table (MBR) or a boot block", 510, b"\x55\xaa");

/// The contents of a device with these first bytes, if they are known.
pub fn found(start: &[u8]) -> Option<&'static str> {
    let holds =
        |&(_, at, magic): &(&str, usize, &[u8])| start.get(at..at + magic.len()) == Some(magic);
    // The specific signatures before the generic one.
    SIGNATURES
        .iter()
        .find(|signature| holds(signature))
        .or(Some(&BOOT_BLOCK).filter(|s| holds(s)))
        .map(|(name, ..)| *name)
}

/// Whether the device is emulated for this run only.
pub fn is_emulated(common: &Common) -> bool {
    common.device.starts_with("emulated:")
}

/// Checks that a device may be written: it is emulated and has no known signature, or the user has allowed it.
///
/// # Errors
/// `InUse`, with what was found.
pub fn permit(common: &Common, session: &Session, mover: &mut Mover) -> Result<()> {
    if common.yes_destroy_data {
        return Ok(());
    }
    let size = session.namespace.size().min(EXAMINED);
    let mut start = vec![0; size as usize];
    let shift = session.namespace.block_shift();
    mover.read(0..size >> shift, |block, bytes| {
        let at = (block << shift) as usize;
        start[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    })?;
    let found = found(&start);
    let object = format!("namespace {} of {}", session.namespace.id(), common.device);
    let refuse = |reason: String| {
        Err(Error::new(ErrorKind::InUse, "write to", object)
            .with_reason(reason)
            .with_advice("add --yes-destroy-data if that may be lost"))
    };
    match found {
        Some(what) => refuse(format!("it holds {what}")),
        None if is_emulated(common) => Ok(()),
        None => refuse("it is not emulated, and may hold unknown data".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use vfio_remap::emulated::Nvme;
    use vfio_remap::emulated::nvme::Namespace;

    use super::*;
    use crate::options::Options;

    #[test]
    fn data_is_destroyed_only_on_request() {
        let session = Session::with(Nvme::new(vec![Namespace::memory(1 << 20, 4096).unwrap()]));
        let permitted = |arguments: &[&str]| {
            let options = Options::parse_from([&["nvme", "verify"], arguments].concat());
            let mut mover = Mover::new(&session).unwrap();
            permit(&options.common, &session, &mut mover).map_err(|error| error.to_string())
        };
        let real = ["--device", "0000:00:03.0"];
        assert_eq!(permitted(&[]), Ok(()), "an emulated device that holds nothing");
        assert!(permitted(&real).unwrap_err().contains("it is not emulated"));
        assert_eq!(permitted(&[&real[..], &["--yes-destroy-data"]].concat()), Ok(()));
        // The signature of a file system in its first superblock.
        let mut mover = Mover::new(&session).unwrap();
        let ext = |_, bytes: &mut [u8]| {
            bytes[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
            Ok(())
        };
        mover.write(0..1, ext).unwrap();
        drop(mover);
        for arguments in [&[][..], &real] {
            let error = permitted(arguments).unwrap_err();
            assert!(error.contains("it holds an ext2, ext3 or ext4 file system"), "{error}");
            assert!(error.contains("--yes-destroy-data"), "{error}");
        }
        assert_eq!(permitted(&["--yes-destroy-data"]), Ok(()));
        session.close().unwrap();
    }

    #[test]
    fn what_a_device_holds_is_named() {
        let mut start = vec![0; EXAMINED as usize];
        assert_eq!(found(&start), None);
        assert_eq!(found(&[]), None, "a device may be shorter than any of them");
        start[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(found(&start).unwrap().contains("MBR"));
        for (name, at, magic) in SIGNATURES {
            let mut start = start.clone();
            start[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(found(&start), Some(name));
        }
    }
}
