//! Kernel modules: which ones a guest needs, and in which order.
//!
//! A Debian package has no `modules.dep`, which depmod writes at installation. So the
//! order is read from the modules themselves, as depmod does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use elf::ElfBytes;
use elf::endian::AnyEndian;

use crate::decompress;

/// A set of modules: a directory of the cache.
pub struct Set {
    pub directory: &'static str,
    wanted: &'static [&'static str],
}

/// What a guest loads at its start. The type 1 IOMMU driver is named because no module
/// depends on it; a kernel would load it by modprobe.
pub const LOADED: Set = Set { directory: "modules", wanted: &["vfio_iommu_type1", "vfio_pci"] };

/// What a payload may load for the kernel's own drivers. ext4 needs a checksum that is a
/// separate module up to 6.13.
pub const ON_DEMAND: Set =
    Set { directory: "on-demand", wanted: &["nvme", "crc32c_generic", "ext4"] };

/// The kernel's drivers of network cards, and its generator of packets.
pub const NETWORK: Set = Set { directory: "network", wanted: &["igb", "e1000e", "pktgen"] };

/// What the host of other guests loads: -cpu max of TCG has AMD's virtualization.
pub const HYPERVISOR: Set = Set { directory: "hypervisor", wanted: &["kvm_amd"] };

/// What the guest of a guest loads, for the devices that are passed through to it.
pub const DRIVERS: Set =
    Set { directory: "drivers", wanted: &["nvme", "e1000e", "uio_pci_generic"] };

/// All sets, and whether the modules of [`LOADED`] are loaded before.
const SETS: [(Set, bool); 5] =
    [(LOADED, false), (ON_DEMAND, true), (NETWORK, true), (HYPERVISOR, true), (DRIVERS, false)];

const GONE_FROM_SOME: [&str; 1] = ["crc32c_generic"];

/// The modules that [`install`] installs. The cache stores this, so that an entry of an
/// earlier lab with other modules is recognized.
pub fn selection() -> String {
    SETS.map(|(set, _)| format!("{}: {}", set.directory, set.wanted.join(" "))).join("\n")
}

/// Writes each set to its directory in `new`: the modules and their dependencies,
/// decompressed, and numbered in the order in which to load them. Modules that are loaded
/// before are left out.
pub fn install(tree: &Path, new: &Path) -> Result<()> {
    let mut files = Vec::new();
    find(tree, &mut files)?;
    let path =
        |name: &str| files.iter().find(|path| module_name(path).is_some_and(|found| found == name));
    let read = |name: &str| -> Result<Vec<u8>> {
        let path =
            path(name).with_context(|| format!("{} has no module {name}", tree.display()))?;
        decompress::elf(fs::read(path)?).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut loaded = Vec::new();
    for wanted in LOADED.wanted {
        load_order(wanted, &read, &mut loaded)?;
    }
    for (set, after_others) in &SETS {
        let mut order = if *after_others { loaded.clone() } else { Vec::new() };
        let first = order.len();
        for wanted in set.wanted {
            if path(wanted).is_some() || !GONE_FROM_SOME.contains(wanted) {
                load_order(wanted, &read, &mut order)?;
            }
        }
        let directory = new.join(set.directory);
        fs::create_dir(&directory)?;
        for (number, (name, content)) in order.iter().enumerate().skip(first) {
            fs::write(directory.join(format!("{number:02}-{name}.ko")), content)?;
        }
    }
    Ok(())
}

/// Appends a module to `order`, after its dependencies.
fn load_order(
    name: &str,
    read: &impl Fn(&str) -> Result<Vec<u8>>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if order.iter().any(|(loaded, _)| loaded == name) {
        return Ok(());
    }
    let content = read(name)?;
    let depends = modinfo_depends(&content)
        .with_context(|| format!("module {name} does not list its dependencies"))?;
    for dependency in &depends {
        load_order(dependency, read, order)?;
    }
    order.push((name.to_owned(), content));
    Ok(())
}

/// The `depends=` of a module's `.modinfo` section: NUL-terminated strings.
fn modinfo_depends(module: &[u8]) -> Result<Vec<String>> {
    let elf = ElfBytes::<AnyEndian>::minimal_parse(module)?;
    let section =
        elf.section_header_by_name(".modinfo")?.context("there is no section .modinfo")?;
    let (modinfo, _) = elf.section_data(&section)?;
    parse_depends(modinfo).context("there is no depends=")
}

fn parse_depends(modinfo: &[u8]) -> Option<Vec<String>> {
    let depends =
        modinfo.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"depends="))?;
    Some(
        String::from_utf8_lossy(depends)
            .split(',')
            .filter(|name| !name.is_empty())
            .map(canonical)
            .collect(),
    )
}

/// `-` and `_` are equivalent in a module's name.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(canonical(stem))
}

fn find(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_are_read_from_modinfo() {
        let modinfo = b"license=GPL\0depends=vfio-pci-core,vfio\0name=vfio_pci\0";
        let depends = parse_depends(modinfo).unwrap();
        assert_eq!(depends, ["vfio_pci_core", "vfio"]);
        assert_eq!(parse_depends(b"depends=\0"), Some(Vec::new()));
        assert_eq!(parse_depends(b"license=GPL\0"), None);
    }

    #[test]
    fn a_module_is_known_by_its_canonical_name() {
        let name = module_name(Path::new("kernel/drivers/vfio/pci/vfio-pci-core.ko.xz"));
        assert_eq!(name.as_deref(), Some("vfio_pci_core"));
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}
