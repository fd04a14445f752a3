//! A namespace as the command line has it.

use std::fs::File;
use std::io::{self, ErrorKind as Io};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::{Error, ErrorKind, Result};

/// `memory:SIZE` or `file:PATH`, and options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub source: Source,
    /// The size of a block in bytes.
    pub block: u32,
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// So many bytes, all zero.
    Memory(u64),
    /// All of a file, which is made with this size if there is none.
    File(PathBuf, Option<u64>),
}

impl Spec {
    /// What a controller has if nothing is said.
    pub fn usual() -> Vec<Self> {
        let memory = |block| Self { source: Source::Memory(64 << 20), block, read_only: false };
        vec![memory(512), memory(4096)]
    }

    pub fn open(&self) -> Result<Namespace> {
        let namespace = match &self.source {
            Source::Memory(size) => Namespace::memory(*size, self.block)?,
            Source::File(path, size) => Namespace::file(self.file(path, *size)?, self.block)?,
        };
        Ok(if self.read_only { namespace.read_only() } else { namespace })
    }

    fn file(&self, path: &Path, size: Option<u64>) -> Result<File> {
        let failed = |error: io::Error| {
            Error::new(ErrorKind::Os, "open", path.display()).with_reason(error.to_string())
        };
        let mut options = File::options();
        // To open a FIFO would wait for its other end.
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        options.read(true).write(!self.read_only);
        let file = match (options.open(path), size) {
            (Err(error), Some(size)) if error.kind() == Io::NotFound => {
                options.write(true).create_new(true);
                let file = options.open(path).map_err(failed)?;
                if let Err(error) = file.set_len(size) {
                    // It is this program's, and of no use.
                    let _ = std::fs::remove_file(path);
                    return Err(failed(error));
                }
                file
            }
            (opened, _) => opened.map_err(failed)?,
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "open", path.display())
                .with_reason("it is no regular file")
                .with_advice("name one, or one that does not exist yet, and its size"));
        }
        let has = metadata.len();
        if let Some(size) = size.filter(|size| *size != has) {
            return Err(Error::new(ErrorKind::OutOfRange, "open", path.display())
                .with_reason(format!("it has {has} bytes, and size={size} was asked for"))
                .with_advice("leave size out, or name another file"));
        }
        Ok(file)
    }
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (mut block, mut read_only, mut size) = (512, false, None);
        // The options are at the end: a path may have commas.
        let mut source = text;
        while let Some((before, option)) = source.rsplit_once(',') {
            match option.split_once('=') {
                None if option == "read-only" => read_only = true,
                Some(("block", "512")) => block = 512,
                Some(("block", "4096")) => block = 4096,
                Some(("block", other)) => {
                    return Err(format!("a block has 512 or 4096 bytes, not {other:?}"));
                }
                Some(("size", number)) => size = Some(bytes(number)?),
                _ if text.starts_with("file:") => break,
                _ => return Err(format!("there is no option {option:?}")),
            }
            source = before;
        }
        let source = match source.split_once(':') {
            Some(("memory", _)) if size.is_some() => {
                return Err("the size of memory follows \"memory:\"".to_owned());
            }
            Some(("memory", number)) => Source::Memory(bytes(number)?),
            Some(("file", "")) => return Err("the path of the file is missing".to_owned()),
            Some(("file", path)) => Source::File(path.into(), size),
            _ => return Err("it begins with \"memory:\" or \"file:\"".to_owned()),
        };
        // Before anything is made.
        let (Source::Memory(whole) | Source::File(_, Some(whole))) = source else {
            return Ok(Self { source, block, read_only });
        };
        if !whole.is_multiple_of(block.into()) {
            return Err(format!("{whole} bytes are not a whole number of blocks of {block}"));
        }
        Ok(Self { source, block, read_only })
    }
}

/// A number of bytes: digits, and perhaps K, M, G or T for a power of 1024.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    number.filter(|number| *number > 0).ok_or_else(|| {
        format!("{text:?} is not a size: a number of bytes, or one with K, M, G or T, such as 64M")
    })
}
