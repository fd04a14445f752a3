//! fio for a guest: Debian's program, and the shared libraries that it needs, since it
//! is not static.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use elf::ElfBytes;
use elf::abi::{DT_NEEDED, ET_DYN};
use elf::endian::AnyEndian;

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::ui::Stage;

/// It has fio 3.33, which supports io_uring.
const SUITE: &str = "bookworm";
const PACKAGE: &str = "fio";

/// The dynamic loader, which programs refer to by its path.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// fio in the cache.
pub struct Fio {
    /// The version of the package.
    pub version: String,
    directory: PathBuf,
}

impl Fio {
    /// Returns fio from the cache, after fetching it if needed.
    pub fn ensure(store: &Store) -> Result<Self> {
        let directory = store.directory.join(PACKAGE);
        if !directory.join("version").exists() {
            fetch(store, &directory)?;
        }
        Ok(Self { version: fs::read_to_string(directory.join("version"))?, directory })
    }

    /// The files that it needs, with their paths in the guest.
    pub fn files(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.directory.join("files"))? {
            let path = entry?.path();
            let name = path.file_name().context("an entry has a name")?.to_string_lossy();
            files.push((guest_path(&name), path.clone()));
        }
        Ok(files)
    }
}

fn guest_path(name: &str) -> String {
    match name {
        PACKAGE => format!("bin/{name}"),
        LOADER => format!("lib64/{name}"),
        // Debian's loader searches this directory by default.
        _ => format!("lib/x86_64-linux-gnu/{name}"),
    }
}

fn fetch(store: &Store, directory: &Path) -> Result<()> {
    let stage = Stage::new("Fetching", PACKAGE);
    let Some(suite) = Suite::open(SUITE, store)? else {
        bail!("the mirror has no suite {SUITE}, which {PACKAGE} comes from");
    };
    let control = suite.show(PACKAGE)?.with_context(|| format!("{SUITE} has no {PACKAGE}"))?;
    let version = control.version().context("a package has a version")?.to_owned();
    let packages = with_libraries(&suite, PACKAGE)?;
    cache::replace(directory, |new| {
        let tree = tempfile::tempdir_in(&store.directory)?;
        suite.unpack(&packages, tree.path())?;
        let files = new.join("files");
        fs::create_dir(&files)?;
        for (name, path) in needed(&tree.path().join("usr/bin").join(PACKAGE), tree.path())? {
            fs::copy(path, files.join(name))?;
        }
        Ok(fs::write(new.join("version"), &version)?)
    })?;
    stage.done("Fetched", &format!("{PACKAGE} {version}"));
    Ok(())
}

/// A package and its library packages, including those of indirect dependencies.
fn with_libraries(suite: &Suite, package: &str) -> Result<Vec<String>> {
    let mut asked = BTreeSet::new();
    let mut found = Vec::new();
    let mut new = vec![package.to_owned()];
    // One level of dependencies at a time, since each call of apt is slow.
    while !new.is_empty() {
        let shown = suite.show_all(&new)?;
        asked.extend(new);
        let depends = shown.iter().flat_map(|(_, control)| control.depends());
        let libraries: BTreeSet<_> = depends.filter(|name| is_library(name)).collect();
        let unknown = libraries.into_iter().filter(|name| !asked.contains(*name));
        new = unknown.map(str::to_owned).collect();
        // A package that is not shown is a virtual one.
        found.extend(shown.into_iter().map(|(name, _)| name));
    }
    Ok(found)
}

/// Whether it is a library package by Debian's naming rule, or zlib, the exception.
fn is_library(package: &str) -> bool {
    package.starts_with("lib") || package == "zlib1g"
}

/// A program and the libraries that it needs directly or indirectly: their paths in a
/// tree of unpacked packages, by file name.
fn needed(program: &Path, tree: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut libraries = BTreeMap::new();
    find_libraries(tree, &mut libraries)?;
    let mut found = BTreeMap::new();
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let mut new = vec![(name.into_owned(), program.to_owned())];
    while let Some((name, path)) = new.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let wanted = needed_names(&fs::read(&path)?)
            .with_context(|| format!("cannot read {}", path.display()))?;
        found.insert(name, path);
        for name in wanted {
            let path = libraries.get(&name);
            let path = path.with_context(|| format!("no package has the library {name}"))?;
            new.push((name, path.clone()));
        }
    }
    Ok(found)
}

/// Collects libraries, and links to them inside the tree, by file name.
fn find_libraries(directory: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            find_libraries(&entry.path(), found)?;
        } else if name.contains(".so") && !leaves_the_tree(&entry.path()) {
            found.insert(name, entry.path());
        }
    }
    Ok(())
}

fn leaves_the_tree(link: &Path) -> bool {
    fs::read_link(link).is_ok_and(|target| target.is_absolute())
}

/// The libraries that an executable or a library depends on directly.
fn needed_names(bytes: &[u8]) -> Result<Vec<String>> {
    let elf = ElfBytes::<AnyEndian>::minimal_parse(bytes)?;
    if elf.ehdr.e_type != ET_DYN {
        bail!("it is not dynamically linked");
    }
    let common = elf.find_common_data()?;
    let dynamic = common.dynamic.context("it has no dynamic section")?;
    let strings = common.dynsyms_strs.context("it has no strings")?;
    let needed = dynamic.iter().filter(|entry| entry.d_tag == DT_NEEDED);
    needed.map(|entry| Ok(strings.get(entry.d_val() as usize)?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_read() {
        let this_test = fs::read(std::env::current_exe().unwrap()).unwrap();
        let needed = needed_names(&this_test).unwrap();
        assert!(needed.iter().any(|name| name == "libc.so.6"), "{needed:?}");
        assert!(needed_names(b"#!/bin/sh").is_err());
    }

    #[test]
    fn files_are_at_the_paths_that_programs_use() {
        assert_eq!(guest_path("ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2");
        assert_eq!(guest_path("libc.so.6"), "lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(guest_path("fio"), "bin/fio");
    }
}
