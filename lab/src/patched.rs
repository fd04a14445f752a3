//! Kernels that the lab builds: Debian's newest source, with the patches and the
//! configuration of `lab/kernel`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::apt::Suite;
use crate::cache::{self, Store};
use crate::command;
use crate::kernels::{self, NEWEST_SUITE};
use crate::klog::tail;
use crate::payload;
use crate::tools::{self, Need};
use crate::ui::{self, Stage};

/// It depends on the package with the newest source.
const METAPACKAGE: &str = "linux-source";

/// Lines of a failed build that are shown.
const TAIL: usize = 30;

/// Held while a kernel is checked and built.
static BUILDING: Mutex<()> = Mutex::new(());

/// The directory of the selftests in the kernel's source.
const SELFTESTS: &str = "tools/testing/selftests";

/// What a kernel is built from.
pub struct Recipe {
    /// The directories of `lab/kernel` with its patches, in the order in
    /// which they apply.
    pub patches: &'static [&'static str],
    /// The selftests that are built with it: directory and program, such as `mm/pfnmap`.
    pub selftests: &'static [&'static str],
}

/// A recipe and the contents of its files.
struct Series {
    config: String,
    /// Name and content, in the order in which they apply.
    patches: Vec<(String, String)>,
    selftests: &'static [&'static str],
    /// The version of the source package that the patches were made for.
    made_for: String,
}

impl Series {
    fn read(recipe: &Recipe) -> Result<Self> {
        let directory = payload::workspace().join("lab/kernel");
        let read = |path: &Path| {
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
        };
        let mut patches = Vec::new();
        for &part in recipe.patches {
            let mut paths = fs::read_dir(directory.join(part))?
                .map(|entry| Ok(entry?.path()))
                .collect::<Result<Vec<_>>>()?;
            paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
            paths.sort();
            for path in paths {
                let name = path.file_name().context("an entry has a name")?.to_string_lossy();
                patches.push((format!("{part}/{name}"), read(&path)?));
            }
        }
        let made_for = read(&directory.join("made-for"))?.trim().to_owned();
        let config = read(&directory.join("config"))?;
        Ok(Self { config, patches, selftests: recipe.selftests, made_for })
    }

    /// The text that the cache stores with a kernel, to recognize what it was built from:
    /// all of it, since it is short, except the messages of the patches.
    fn text(&self) -> String {
        let patches = self.patches.iter().map(|(_, patch)| changes(patch));
        patches.chain(self.selftests.iter().copied()).chain([self.config.as_str()]).collect()
    }

    /// Whether the kernel in a directory was built from it.
    fn is_built(&self, directory: &Path) -> bool {
        let built_from = fs::read_to_string(directory.join("series"));
        built_from.is_ok_and(|built_from| built_from == self.text())
    }
}

/// A patch without its message.
fn changes(patch: &str) -> &str {
    patch.find("\ndiff --git ").map_or(patch, |at| &patch[at..])
}

/// Whether `directory` holds a kernel of this recipe, from any source version.
pub fn is_built(recipe: &Recipe, directory: &Path) -> Result<bool> {
    Ok(Series::read(recipe)?.is_built(directory))
}

/// Makes sure that `directory` holds the kernel of this recipe. Builds it if the directory
/// has none, or one from another recipe or an older source. `false` if the mirror has no
/// source and no kernel was built before.
pub fn ensure(recipe: &Recipe, store: &Store, directory: &Path) -> Result<bool> {
    // A second caller waits for the build of the first, and finds the kernel there.
    let _one_at_a_time = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let series = Series::read(recipe)?;
    let current = series.is_built(directory);
    if current && !kernels::is_old(directory) {
        return Ok(true);
    }
    let source = match Source::find(store) {
        Ok(Some(source)) => source,
        Ok(None) => return Ok(current),
        Err(error) if current => {
            ui::warning(&format!("cannot check for a newer source: {error:#}"));
            return Ok(true);
        }
        Err(error) => return Err(error),
    };
    let version = fs::read_to_string(directory.join("version"));
    if current && version.is_ok_and(|version| version == source.version) {
        // Records that it was checked today.
        fs::write(directory.join("version"), source.version)?;
        return Ok(true);
    }
    tools::ensure(&[Need::Building])?;
    build(&series, &source, store, directory)?;
    Ok(true)
}

/// The newest source that the mirror has.
struct Source {
    suite: Suite,
    package: String,
    version: String,
}

impl Source {
    fn find(store: &Store) -> Result<Option<Self>> {
        let Some(suite) = Suite::open(NEWEST_SUITE, store)? else {
            return Ok(None);
        };
        let Some(metapackage) = suite.show(METAPACKAGE)? else {
            return Ok(None);
        };
        let version = metapackage.version().context("a package has a version")?.to_owned();
        let package = metapackage
            .depends()
            .first()
            .with_context(|| format!("{METAPACKAGE} depends on no package"))?
            .to_string();
        Ok(Some(Self { suite, package, version }))
    }

    /// Fetches and unpacks it. Returns its directory.
    fn unpack(&self, into: &Path) -> Result<PathBuf> {
        self.suite.unpack(std::slice::from_ref(&self.package), into)?;
        let archive = into.join("usr/src").join(format!("{}.tar.xz", self.package));
        command::output(Command::new("tar").arg("-xJf").arg(&archive).arg("-C").arg(into))?;
        fs::remove_file(archive)?;
        Ok(into.join(&self.package))
    }
}

fn build(series: &Series, source: &Source, store: &Store, directory: &Path) -> Result<()> {
    let Source { package, version, .. } = source;
    let stage = Stage::new("Fetching", &format!("{package} {version}"));
    let work = cache::work_directory(&store.directory, "build-of-")?;
    let tree = source.unpack(work.path())?;
    stage.done("Fetched", package);

    let what = format!("linux {version}, patched");
    let mut stage = Stage::new("Building", &what);
    for (name, patch) in &series.patches {
        apply(&tree, patch).with_context(|| {
            format!(
                "lab/kernel/{name} does not apply to {package} {version}; it was made for {}: \
                 update it and lab/kernel/made-for",
                series.made_for
            )
        })?;
    }
    configure(&tree, &series.config)?;
    compile(&tree, &mut stage)?;
    build_selftests(&tree, series.selftests)?;
    cache::replace(directory, |new| {
        fs::copy(tree.join("vmlinux"), new.join("vmlinux"))?;
        // All drivers are built in.
        fs::create_dir(new.join("modules"))?;
        fs::create_dir(new.join("selftests"))?;
        for selftest in series.selftests {
            let program = tree.join(SELFTESTS).join(selftest);
            let name = program.file_name().context("a selftest is a file")?;
            fs::copy(&program, new.join("selftests").join(name))?;
        }
        fs::write(new.join("series"), series.text())?;
        Ok(fs::write(new.join("version"), version)?)
    })?;
    stage.done("Built", &what);
    Ok(())
}

/// Applies a patch completely or fails. Lines may have moved, but their context must not
/// have changed.
fn apply(tree: &Path, patch: &str) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(patch.as_bytes())?;
    let applied = command::unchecked(
        Command::new("patch")
            .args(["--strip=1", "--fuzz=0", "--forward", "--batch", "--input"])
            .arg(file.path())
            .current_dir(tree),
    )?;
    ensure!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stdout).trim_end());
    Ok(())
}

/// Writes the kernel's smallest configuration with our options added, and checks that all
/// of them are in the result: make silently drops an option whose dependency is missing.
fn configure(tree: &Path, config: &str) -> Result<()> {
    fs::write(tree.join("kernel/configs/lab.config"), config)?;
    command::output(make(tree).args(["tinyconfig", "lab.config"]))?;
    let result = fs::read_to_string(tree.join(".config"))?;
    let lost = lost(config, &result);
    ensure!(
        lost.is_empty(),
        "this kernel does not accept these lines of lab/kernel/config, whose names or dependencies \
         have changed: {}",
        lost.join(", ")
    );
    Ok(())
}

/// The wanted lines that a configuration does not have. An option that must not be set may
/// be absent.
fn lost<'a>(wanted: &'a str, result: &str) -> Vec<&'a str> {
    let has = |wanted: &str| match unset(wanted) {
        Some(name) => !result
            .lines()
            .any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))),
        None => result.lines().any(|line| line == wanted),
    };
    wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_") || unset(line).is_some())
        .filter(|wanted| !has(wanted))
        .collect()
}

/// The name in a line such as `# CONFIG_VT is not set`.
fn unset(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?.strip_suffix(" is not set").filter(|name| name.starts_with("CONFIG_"))
}

fn compile(tree: &Path, stage: &mut Stage) -> Result<()> {
    fs::create_dir_all(payload::logs())?;
    let log = payload::logs().join("patched-build.log");
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut child = make(tree)
        .args([&format!("-j{jobs}"), "vmlinux"])
        .stdout(Stdio::piped())
        .stderr(File::create(&log)?)
        .spawn()
        .context("cannot run make")?;
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    // Each line names a file that is being built.
    for (count, line) in BufReader::new(stdout).lines().enumerate() {
        let line = line?;
        let file = line.split_whitespace().next_back().unwrap_or_default();
        stage.progress(&format!("the patched kernel, file {}: {file}", count + 1));
    }
    if !child.wait()?.success() {
        let said = fs::read_to_string(&log).unwrap_or_default();
        bail!("the kernel does not compile; {} ends with\n{}", log.display(), tail(&said, TAIL));
    }
    Ok(())
}

/// Builds selftests. They are static, since a guest has no libraries.
fn build_selftests(tree: &Path, selftests: &[&str]) -> Result<()> {
    if selftests.is_empty() {
        return Ok(());
    }
    command::output(make(tree).arg("headers"))?;
    for selftest in selftests {
        let program = tree.join(SELFTESTS).join(selftest);
        let directory = program.parent().context("a selftest has a directory")?;
        command::output(make(tree).arg("-C").arg(directory).arg("LDFLAGS=-static").arg(&program))?;
    }
    Ok(())
}

/// make, which is killed when the lab ends (see [`crate::qemu::command`]). The kernel does
/// not contain the names of the user and the machine that built it.
fn make(tree: &Path) -> Command {
    let mut make = Command::new("setpriv");
    make.current_dir(tree)
        .args(["--pdeathsig", "TERM", "make"])
        .args(["KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=lab"])
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS")
        .stdin(Stdio::null());
    make
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_recognized_by_all_its_parts() {
        let patches = &["fixes", "selftests", "rfc"];
        let series = Series::read(&Recipe { patches, selftests: &["one"] }).unwrap();
        let order: Vec<_> = series.patches.iter().map(|(name, _)| name.as_str()).collect();
        assert!(order[0].starts_with("fixes/0001-"), "{order:?}");
        assert!(order[order.len() - 1].starts_with("rfc/"), "{order:?}");
        assert!(series.patches.iter().all(|(_, patch)| series.text().contains(changes(patch))));
        assert!(series.text().contains("one"));
        assert!(series.text().ends_with(&series.config));
    }

    #[test]
    fn the_message_of_a_patch_does_not_matter() {
        let patch =
            |message| format!("{message}\n---\n file | 1 +\n\ndiff --git a/file b/file\n+x\n");
        assert_eq!(changes(&patch("one")), changes(&patch("two")));
        assert!(changes(&patch("one")).ends_with("+x\n"));
    }

    #[test]
    fn a_patch_applies_completely_or_is_an_error() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("file"), "one\ntwo\n").unwrap();
        let patch = "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n";
        apply(tree.path(), patch).unwrap();
        assert_eq!(fs::read_to_string(tree.path().join("file")).unwrap(), "one\nthree\n");
        assert!(apply(tree.path(), patch).is_err());
    }

    #[test]
    fn settings_that_the_kernel_drops_are_named() {
        let wanted = "# Memory\nCONFIG_SHMEM=y\nCONFIG_UDMABUF=y\n";
        assert_eq!(lost(wanted, "CONFIG_SHMEM=y\n"), ["CONFIG_UDMABUF=y"]);
        assert!(lost(wanted, "CONFIG_UDMABUF=y\nCONFIG_SHMEM=y\n").is_empty());
    }

    #[test]
    fn settings_that_the_kernel_turns_on_are_named() {
        let wanted = "# not a setting\n# CONFIG_VT is not set\n";
        assert_eq!(lost(wanted, "CONFIG_VT=y\n"), ["# CONFIG_VT is not set"]);
        assert!(lost(wanted, "# CONFIG_VT is not set\nCONFIG_VTX=y\n").is_empty());
    }
}
