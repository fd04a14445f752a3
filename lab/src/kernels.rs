//! The kernels that the lab boots, and where they come from.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::decompress;
use crate::modules::{self, Set};
use crate::patched::{self, Recipe};
use crate::ui::{self, Stage};

/// After this time the lab checks whether the mirror has a newer kernel for `newest`.
const FRESH: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A kernel that the lab knows by name.
pub struct Kernel {
    pub name: &'static str,
    /// What it is, for `--help`.
    pub about: &'static str,
    source: Source,
}

enum Source {
    /// The kernel that `linux-image-amd64` depends on in a Debian suite.
    Debian {
        suite: &'static str,
        /// Whether the suite gets new kernel series.
        moves: bool,
    },
    /// Built from Debian's newest source: see [`patched`].
    Patched(Recipe),
}

pub const KERNELS: [Kernel; 5] = [
    Kernel {
        name: "5.10",
        about: "stock Debian 11 (bullseye)",
        source: Source::Debian { suite: "bullseye", moves: false },
    },
    Kernel {
        name: "6.1",
        about: "stock Debian 12 (bookworm)",
        source: Source::Debian { suite: "bookworm", moves: false },
    },
    Kernel {
        name: "6.12",
        about: "stock Debian 13 (trixie)",
        source: Source::Debian { suite: "trixie", moves: false },
    },
    Kernel {
        name: NEWEST,
        about: "the newest of trixie-backports, checked every week",
        source: Source::Debian { suite: NEWEST_SUITE, moves: true },
    },
    Kernel {
        name: PATCHED,
        about: "newest, built here with the patches and the configuration of lab/kernel",
        source: Source::Patched(Recipe {
            patches: &["fixes", "selftests", "rfc"],
            selftests: &["vfio/vfio_pci_mremap_test", "mm/mremap_duplicate", "mm/pfnmap"],
        }),
    },
];

/// A kernel that no test runs on. It is built only to show a hazard.
pub const FIRST_PATCH: Kernel = Kernel {
    name: "first-patch",
    about: "as patched, but with only the first version of its first patch: for a hazard",
    source: Source::Patched(Recipe { patches: &["tests/first-patch"], selftests: &[] }),
};

pub const NEWEST: &str = "newest";
pub const PATCHED: &str = "patched";

/// The suite of the newest kernel and its source.
pub const NEWEST_SUITE: &str = "trixie-backports";

/// A kernel in the cache, ready to boot.
pub struct Image {
    pub name: &'static str,
    /// The version of the package, such as 6.1.176-1.
    pub version: String,
    directory: PathBuf,
}

impl Image {
    /// The kernel itself, an ELF file that QEMU boots by its PVH entry.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// A set of modules, in the order in which to load them; none if all are built in.
    pub fn modules(&self, set: &Set) -> Result<Vec<PathBuf>> {
        let directory = self.directory.join(set.directory);
        if directory.exists() { sorted_entries(&directory) } else { Ok(Vec::new()) }
    }

    /// As [`modules`](Self::modules), each after its path in a guest.
    pub fn module_files(&self, set: &Set) -> Result<Vec<(String, PathBuf)>> {
        let path = |module: PathBuf| {
            let name = module.file_name().context("a module is a file")?.to_string_lossy();
            Ok((format!("lab/{}/{name}", set.directory), module))
        };
        self.modules(set)?.into_iter().map(path).collect()
    }

    /// The kernel's selftests that were built with it; none for a stock kernel.
    pub fn selftests(&self) -> Result<Vec<PathBuf>> {
        let directory = self.directory.join("selftests");
        if directory.exists() { sorted_entries(&directory) } else { Ok(Vec::new()) }
    }

    fn cached(name: &'static str, directory: PathBuf) -> Option<Self> {
        let version = fs::read_to_string(directory.join("version")).ok()?;
        Some(Self { name, version, directory })
    }

    /// As [`cached`](Self::cached), but only if it has all modules that this lab needs.
    fn cached_with_modules(name: &'static str, directory: PathBuf) -> Option<Self> {
        let selection = fs::read_to_string(directory.join("selection")).ok()?;
        if selection == modules::selection() { Self::cached(name, directory) } else { None }
    }
}

fn sorted_entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

/// Looks a kernel up by its name on the command line.
pub fn by_name(name: &str) -> Result<&'static Kernel, String> {
    all().find(|kernel| kernel.name == name).ok_or_else(|| {
        let names: Vec<_> = all().map(|kernel| kernel.name).collect();
        format!("the kernels are {}", names.join(", "))
    })
}

/// The kernels that tests run on, and the one that only shows a hazard.
pub fn all() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().chain([&FIRST_PATCH])
}

/// Starts to build the kernels that are not built yet, in background threads. [`Kernel::image`] waits
/// for a running build. If a build fails, `image` tries again and returns the error.
pub fn build_ahead(store: &Store, kernels: &[&'static Kernel]) -> Result<()> {
    for &kernel in kernels {
        if kernel.is_to_be_built(store)? {
            let store = Store { directory: store.directory.clone(), mirror: store.mirror.clone() };
            thread::spawn(move || {
                if let Err(error) = kernel.image(&store) {
                    ui::warning(&format!("{error:#}"));
                }
            });
        }
    }
    Ok(())
}

impl Kernel {
    /// Whether it has to be built before it can be booted.
    pub fn is_to_be_built(&self, store: &Store) -> Result<bool> {
        let Source::Patched(recipe) = &self.source else { return Ok(false) };
        Ok(!patched::is_built(recipe, &self.directory(store))?)
    }

    /// Fails if the kernel has no nvme driver, which `what` needs.
    pub fn must_have_nvme(&self, what: &str) -> Result<()> {
        let has_nvme = |kernel: &Kernel| matches!(kernel.source, Source::Debian { .. });
        let names: Vec<_> =
            KERNELS.iter().filter(|kernel| has_nvme(kernel)).map(|kernel| kernel.name).collect();
        ensure!(
            has_nvme(self),
            "kernel {} is built without an nvme driver, which {what} needs: use one of {}",
            self.name,
            names.join(", ")
        );
        Ok(())
    }

    fn directory(&self, store: &Store) -> PathBuf {
        store.directory.join("kernels").join(self.name)
    }

    /// Returns the kernel from the cache, after fetching it if needed. `None` if the
    /// mirror does not have it (any more).
    pub fn image(&'static self, store: &Store) -> Result<Option<Image>> {
        let directory = self.directory(store);
        let (suite, moves) = match &self.source {
            Source::Debian { suite, moves } => (*suite, *moves),
            Source::Patched(recipe) => {
                let built = patched::ensure(recipe, store, &directory)
                    .with_context(|| format!("cannot build kernel {}", self.name));
                return Ok(if built? { Image::cached(self.name, directory) } else { None });
            }
        };
        let cached = Image::cached_with_modules(self.name, directory.clone());
        if cached.is_some() && !(moves && is_old(&directory)) {
            return Ok(cached);
        }
        match fetch(suite, store, &directory, cached.as_ref()) {
            Ok(true) => Ok(Image::cached_with_modules(self.name, directory)),
            Ok(false) => Ok(cached),
            Err(error) if cached.is_some() => {
                ui::warning(&format!(
                    "cannot check for a newer kernel than the cached one: {error:#}"
                ));
                Ok(cached)
            }
            Err(error) => Err(error.context(format!("cannot fetch kernel {}", self.name))),
        }
    }
}

/// Whether a cache entry is due for a check. Its age counts from the last write of its
/// file `version`.
pub fn is_old(directory: &Path) -> bool {
    fs::metadata(directory.join("version"))
        .and_then(|version| version.modified())
        .is_ok_and(|checked| SystemTime::now().duration_since(checked).is_ok_and(|age| age > FRESH))
}

/// Fetches a suite's kernel into `directory`, unless it is cached there already. `false`
/// if the mirror does not have it.
fn fetch(suite: &str, store: &Store, directory: &Path, cached: Option<&Image>) -> Result<bool> {
    let stage = Stage::new("Fetching", &format!("the kernel of {suite}"));
    let Some(suite) = Suite::open(suite, store)? else {
        return Ok(false);
    };
    let Some(metapackage) = suite.show("linux-image-amd64")? else {
        return Ok(false);
    };
    let version = metapackage.version().context("a package has a version")?;
    if cached.is_some_and(|cached| cached.version == version) {
        // Records that it was checked today.
        fs::write(directory.join("version"), version)?;
        return Ok(true);
    }

    let mut packages = Vec::new();
    for image in kernel_packages(&metapackage.depends()) {
        let image_control = suite
            .show(image)?
            .with_context(|| format!("the mirror has linux-image-amd64 but not {image}"))?;
        packages.push(image.to_owned());
        packages.extend(kernel_packages(&image_control.depends()).map(str::to_owned));
    }
    cache::replace(directory, |new| {
        let tree = tempfile::tempdir_in(&store.directory)?;
        suite.unpack(&packages, tree.path())?;
        keep(tree.path(), new)?;
        fs::write(new.join("selection"), modules::selection())?;
        Ok(fs::write(new.join("version"), version)?)
    })?;
    stage.done("Fetched", &format!("linux {version}"));
    Ok(true)
}

/// The packages among dependencies that contain a kernel or its modules. Up to 6.x one
/// package has both; since 7.x the image depends on one package with the binary and one
/// with the modules. Metapackages have no version in their names.
fn kernel_packages<'a>(depends: &[&'a str]) -> impl Iterator<Item = &'a str> {
    depends.iter().copied().filter(|name| {
        ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .filter_map(|prefix| name.strip_prefix(prefix))
            .any(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    })
}

/// Copies what a boot needs from an unpacked kernel.
fn keep(tree: &Path, new: &Path) -> Result<()> {
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|path| only_entry(&tree.join(path)))
        .context("the packages contain no modules")?;
    let release = modules.file_name().context("modules are in a directory")?.to_string_lossy();
    let images = [tree.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")];
    let Some(image) = images.iter().find(|image| image.exists()) else {
        bail!("the packages contain no vmlinuz");
    };
    fs::write(new.join("vmlinux"), decompress::kernel(&fs::read(image)?)?)?;
    modules::install(&modules, new)
}

fn only_entry(directory: &Path) -> Option<PathBuf> {
    Some(fs::read_dir(directory).ok()?.next()?.ok()?.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_one_package_or_two() {
        let metapackage =
            ["linux-base-amd64", "linux-image-7.3.4+deb13-amd64", "linux-modules-amd64"];
        let image = [
            "dracut",
            "linux-base-7.3.4+deb13-amd64",
            "linux-binary-7.3.4+deb13-amd64",
            "linux-modules-7.3.4+deb13-amd64",
        ];
        let found: Vec<_> = kernel_packages(&metapackage).collect();
        assert_eq!(found, ["linux-image-7.3.4+deb13-amd64"]);
        let found: Vec<_> = kernel_packages(&image).collect();
        assert_eq!(found, &image[2..]);
    }

    #[test]
    fn a_kernel_without_nvme_is_refused_by_name() {
        let config = include_str!("../kernel/config");
        assert!(!config.contains("CONFIG_BLK_DEV_NVME=y"));
        let error = by_name(PATCHED).unwrap().must_have_nvme("this").unwrap_err().to_string();
        assert!(error.starts_with("kernel patched") && error.contains("6.12, newest"), "{error}");
        assert!(by_name(NEWEST).unwrap().must_have_nvme("this").is_ok());
    }

    #[test]
    fn the_error_for_an_unknown_kernel_names_the_known_ones() {
        assert!(by_name("6.12").is_ok());
        let Err(error) = by_name("6.6") else { panic!("6.6 is no kernel of the lab") };
        assert!(error.contains("5.10, 6.1, 6.12, newest, patched"), "{error}");
    }
}
