//! Programs of Debian's for a guest, with the shared libraries that they need, since they are
//! not static.

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

/// The suite of the programs: that of kernel 6.1, which they are measured on.
const SUITE: &str = "bookworm";

/// The dynamic loader, which programs refer to by its path.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A program, and where it is.
pub struct Recipe {
    /// Its file name.
    pub name: &'static str,
    /// Where its package has it.
    directory: &'static str,
    /// The packages that it and its libraries are in, without those that these depend on. The
    /// first is its own, whose version counts.
    pub packages: &'static [&'static str],
    /// The libraries that it loads when it runs.
    pub plugins: &'static [&'static str],
}

/// The flexible I/O tester: 3.33, which supports io_uring.
pub const FIO: Recipe =
    Recipe { name: "fio", directory: "usr/bin", packages: &["fio"], plugins: &[] };

/// Shows what a network driver says of its card.
pub const ETHTOOL: Recipe =
    Recipe { name: "ethtool", directory: "sbin", packages: &["ethtool"], plugins: &[] };

/// The test program of DPDK, with its driver of Intel's cards. libgcc is loaded to end a thread.
pub const TESTPMD: Recipe = Recipe {
    name: "dpdk-testpmd",
    directory: "usr/bin",
    packages: &[
        "dpdk-dev",
        "librte-net-e1000-23",
        "librte-mempool-ring23",
        "libgcc-s1",
        // testpmd is linked to the drivers of other cards.
        "ibverbs-providers",
    ],
    plugins: &["librte_net_e1000.so.23", "librte_mempool_ring.so.23", "libgcc_s.so.1"],
};

/// A program in the cache.
pub struct Program {
    /// The version of its package.
    pub version: String,
    name: &'static str,
    directory: PathBuf,
}

impl Program {
    /// Returns a program from the cache, after fetching it if needed.
    pub fn ensure(store: &Store, recipe: &Recipe) -> Result<Self> {
        let directory = store.directory.join(recipe.name);
        if !directory.join("version").exists() {
            fetch(store, recipe, &directory)?;
        }
        let version = fs::read_to_string(directory.join("version"))?;
        Ok(Self { version, name: recipe.name, directory })
    }

    /// The files that it needs, with their paths in the guest.
    pub fn files(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.directory.join("files"))? {
            let path = entry?.path();
            let name = path.file_name().context("an entry has a name")?.to_string_lossy();
            files.push((guest_path(self.name, &name), path.clone()));
        }
        Ok(files)
    }
}

/// Where a guest has a file of a program.
fn guest_path(program: &str, name: &str) -> String {
    match name {
        LOADER => format!("lib64/{name}"),
        _ if name == program => format!("bin/{name}"),
        // Debian's loader searches this directory by default.
        _ => format!("lib/x86_64-linux-gnu/{name}"),
    }
}

fn fetch(store: &Store, recipe: &Recipe, directory: &Path) -> Result<()> {
    let Recipe { name, directory: from, packages, plugins } = recipe;
    let stage = Stage::new("Fetching", name);
    let Some(suite) = Suite::open(SUITE, store)? else {
        bail!("the mirror has no suite {SUITE}, which {name} comes from");
    };
    let [own, ..] = packages else { bail!("{name} is in no package") };
    let control = suite.show(own)?.with_context(|| format!("{SUITE} has no {own}"))?;
    let version = control.version().context("a package has a version")?.to_owned();
    let packages = with_libraries(&suite, packages)?;
    cache::replace(directory, |new| {
        let tree = tempfile::tempdir_in(&store.directory)?;
        suite.unpack(&packages, tree.path())?;
        let files = new.join("files");
        fs::create_dir(&files)?;
        for (name, path) in needed(&tree.path().join(from).join(name), plugins, tree.path())? {
            fs::copy(path, files.join(name))?;
        }
        Ok(fs::write(new.join("version"), &version)?)
    })?;
    stage.done("Fetched", &format!("{name} {version}"));
    Ok(())
}

/// Packages and their library packages, including those of indirect dependencies.
fn with_libraries(suite: &Suite, packages: &[&str]) -> Result<Vec<String>> {
    let mut asked = BTreeSet::new();
    let mut found = Vec::new();
    let mut new: Vec<_> = packages.iter().map(|&package| package.to_owned()).collect();
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

/// Whether it is a library package by Debian's naming rule, or zlib, the exception. A package to
/// build programs with has no libraries that they need.
fn is_library(package: &str) -> bool {
    package.starts_with("lib") && !package.ends_with("-dev") || package == "zlib1g"
}

/// A program, its plugins, and the libraries that they need directly or indirectly: their paths
/// in a tree of unpacked packages, by file name.
fn needed(program: &Path, plugins: &[&str], tree: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut libraries = BTreeMap::new();
    find_libraries(tree, &mut libraries)?;
    let mut found = BTreeMap::new();
    let mut new = Vec::new();
    let library = |name: &str| -> Result<_> {
        let path = libraries.get(name);
        let path = path.with_context(|| format!("no package has the library {name}"))?;
        Ok((name.to_owned(), path.clone()))
    };
    for plugin in plugins {
        new.push(library(plugin)?);
    }
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    new.push((name.into_owned(), program.to_owned()));
    while let Some((name, path)) = new.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let wanted = needed_names(&fs::read(&path)?)
            .with_context(|| format!("cannot read {}", path.display()))?;
        found.insert(name, path);
        for name in wanted {
            new.push(library(&name)?);
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
    fn a_package_to_build_with_is_no_library() {
        assert!(["libaio1", "librte-eal23", "zlib1g"].into_iter().all(is_library));
        assert!(!["libdpdk-dev", "python3", "zlib1g-dev"].into_iter().any(is_library));
    }

    #[test]
    fn files_are_at_the_paths_that_programs_use() {
        let path = |name| guest_path("fio", name);
        assert_eq!(path("ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2");
        assert_eq!(path("libc.so.6"), "lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(path("fio"), "bin/fio");
    }
}
