//! The archive format of an initramfs: cpio's "newc", as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// An archive that is built in memory.
///
/// The kernel unpacks entries in order and creates no parents, so a directory must
/// precede its contents.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, unless the archive has it already.
    pub fn directory(&mut self, path: &str) {
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY, &[]);
        }
    }

    /// As [`file`](Self::file), after adding missing parent directories.
    pub fn file_in_directories(&mut self, path: &str, content: &[u8]) {
        for (end, _) in path.match_indices('/') {
            self.directory(&path[..end]);
        }
        self.file(path, content);
    }

    /// Adds a file that everyone may read and execute.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, EXECUTABLE, content);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let length = u32::try_from(content.len()).expect("newc holds files below 4 GiB");
        let name_length = u32::try_from(path.len() + 1).expect("paths are short");
        let mut header = String::from("070701");
        for field in [
            self.entries, // inode
            mode,
            0, // owner
            0, // group
            1, // links
            0, // modification time
            length,
            0, // device, major and minor
            0,
            0, // device that a node stands for, major and minor
            0,
            name_length,
            0, // checksum, unused in newc
        ] {
            write!(header, "{field:08x}").expect("writing to a string succeeds");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_start_on_four_byte_boundaries() {
        let mut archive = Archive::default();
        archive.directory("lab");
        archive.file("lab/x", b"hello");
        let bytes = archive.finish();

        assert_eq!(bytes.len() % 4, 0);
        let second = (110 + 4_usize).next_multiple_of(4);
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 54..second + 62], b"00000005", "file size");
        let content = second + (110 + 6_usize).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 5], b"hello");
        let last = content + 8;
        assert_eq!(&bytes[last + 110..last + 121], b"TRAILER!!!\0");
    }
}
