//! The files of a directory, and none outside of it.

use std::fs::{self, File};
use std::io::{ErrorKind as Io, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use vfio_remap::{Error, ErrorKind, Result};

use crate::request::{BROKEN, FORBIDDEN, NOT_FOUND, Status};
use crate::server::{Body, Content};

/// What is served for a directory.
const INDEX: &str = "index.html";

/// A directory.
pub struct Files {
    root: OwnedFd,
}

impl Files {
    /// # Errors
    /// Why there is no such directory.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::from_io(error, "serve", path.display());
        let root = File::open(path).map_err(failed)?;
        if !root.metadata().map_err(failed)?.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "serve", path.display())
                .with_reason("it is no directory")
                .with_advice("pass the directory that the file is in"));
        }
        Ok(Self { root: root.into() })
    }

    /// Opens what is below the directory: the kernel follows no link that leads out of it (`man 2 openat2`,
    /// Linux 5.6).
    fn open_below(&self, path: &str) -> std::result::Result<File, Status> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        // A FIFO without a writer does not block.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let how = OpenHow::new().flags(flags).resolve(resolve);
        let path = if path.is_empty() { "." } else { path };
        let opened = openat2(&self.root, path, how).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG => NOT_FOUND,
            Errno::EXDEV | Errno::ELOOP | Errno::EACCES | Errno::EPERM | Errno::ENXIO => FORBIDDEN,
            _ => BROKEN,
        })?;
        Ok(opened.into())
    }
}

impl Content for Files {
    fn open(&self, path: &[String]) -> std::result::Result<Body, Status> {
        let mut path = path.join("/");
        let mut file = self.open_below(&path)?;
        let mut metadata = file.metadata().map_err(|_| BROKEN)?;
        if metadata.is_dir() {
            path = if path.is_empty() { INDEX.to_owned() } else { format!("{path}/{INDEX}") };
            file = self.open_below(&path)?;
            metadata = file.metadata().map_err(|_| BROKEN)?;
        }
        if !metadata.is_file() {
            return Err(FORBIDDEN);
        }
        // A file that grows is sent as long as it was.
        let (length, kind) = (metadata.len(), kind(&path));
        Ok(Body { length: Some(length), reader: Box::new(file.take(length)), kind })
    }
}

fn kind(path: &str) -> &'static str {
    match path.rsplit_once('.').map_or("", |(_, ending)| ending) {
        "css" => "text/css",
        "htm" | "html" => "text/html; charset=utf-8",
        "jpg" | "jpeg" => "image/jpeg",
        "js" => "text/javascript",
        "json" => "application/json",
        "png" => "image/png",
        "svg" => "image/svg+xml",
        "md" | "toml" | "txt" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

/// Paths below a directory that lead to files, `most` at most, in order; links are not followed.
pub fn list(root: &Path, most: usize) -> Result<Vec<PathBuf>> {
    let mut directories = vec![PathBuf::new()];
    let mut files = Vec::new();
    while let Some(below) = directories.pop() {
        let path = root.join(&below);
        let failed = |error| Error::from_io(error, "list", path.display());
        let entries = match fs::read_dir(&path) {
            // It is gone by now, or not ours to read.
            Err(error) if below != Path::new("") && error.kind() != Io::Other => continue,
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            names.push((below.join(entry.file_name()), entry.file_type().map_err(failed)?));
        }
        names.sort_by(|one, other| one.0.cmp(&other.0));
        for (path, kind) in names {
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() && files.len() < most {
                files.push(path);
            }
        }
        if files.len() >= most {
            break;
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;
    use crate::tests::Scratch;

    fn contents(files: &Files, path: &str) -> std::result::Result<String, Status> {
        let names: Vec<String> = path.split('/').map(str::to_owned).collect();
        let names = if path.is_empty() { Vec::new() } else { names };
        let mut body = files.open(&names)?;
        let mut text = String::new();
        body.reader.read_to_string(&mut text).unwrap();
        assert_eq!(body.length, Some(text.len() as u64));
        Ok(text)
    }

    #[test]
    fn only_what_is_below_the_directory_is_served() {
        let scratch = Scratch::new("files");
        let (root, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        fs::create_dir_all(root.join("a")).unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        fs::write(&outside, "secret").unwrap();
        fs::write(root.join("a/b.txt"), "b").unwrap();
        fs::write(root.join("index.html"), "index").unwrap();
        symlink("../../outside", root.join("a/out")).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("a", root.join("in")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        symlink("round", root.join("round")).unwrap();
        mkfifo(&root.join("fifo"), Mode::S_IRUSR).unwrap();
        let files = Files::open(&root).unwrap();
        for (path, expected) in [
            ("", Ok("index")),
            ("index.html", Ok("index")),
            ("a/b.txt", Ok("b")),
            ("in/b.txt", Ok("b")),
            ("a", Err(NOT_FOUND)),
            ("empty", Err(NOT_FOUND)),
            ("none", Err(NOT_FOUND)),
            ("a/b.txt/c", Err(NOT_FOUND)),
            ("a/out", Err(FORBIDDEN)),
            ("absolute", Err(FORBIDDEN)),
            ("magic", Err(FORBIDDEN)),
            ("../outside", Err(FORBIDDEN)),
            ("round", Err(FORBIDDEN)),
            ("fifo", Err(FORBIDDEN)),
            (&"n".repeat(300), Err(NOT_FOUND)),
        ] {
            assert_eq!(contents(&files, path), expected.map(str::to_owned), "{path}");
        }
        assert_eq!(
            list(&root, 9).unwrap(),
            ["index.html", "a/b.txt"].map(PathBuf::from),
            "no links"
        );
        assert_eq!(list(&root, 1).unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_directory_is_refused() {
        let scratch = Scratch::new("no-directory");
        let file = scratch.path().join("file");
        let kind = || Files::open(&file).err().unwrap().kind();
        assert_eq!(kind(), ErrorKind::NotFound);
        fs::write(&file, "").unwrap();
        assert_eq!(kind(), ErrorKind::InvalidInput);
    }
}
