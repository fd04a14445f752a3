//! `cargo lab mutants`: checks that tests can fail. Applies each mutation of a fixed list to
//! a copy of the repository, one at a time, and checks that a named test fails.

mod list;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};

use crate::boot::{Ending, Lab, Outcome};
use crate::cache::Store;
use crate::command;
use crate::guest::Payload;
use crate::kernels;
use crate::klog::tail;
use crate::libtest::Counts;
use crate::machine::Variant;
use crate::payload::{self, Sources};
use crate::ui::{self, Stage};

pub use list::MUTANTS;

/// How long a test may run. A test that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(300);

/// What names the package of a killer.
const PACKAGE: &str = "--package";

/// Lines of a failed build or test that an error shows.
const TAIL: usize = 25;

/// A change that must make a test fail.
pub struct Mutant {
    pub name: &'static str,
    /// The file that it changes, from the root of the repository.
    file: &'static str,
    /// The text to replace, which must occur exactly once.
    before: &'static str,
    /// The text that replaces it.
    after: &'static str,
    killer: Killer,
}

/// The test that must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killer {
    /// The arguments of `cargo test`: the package, if it is not vfio-remap, the target, ` -- `, and the test with its
    /// modules.
    Host(&'static str),
    /// A test of `tests/guest`, in the guest of a kernel.
    Guest { kernel: &'static str, test: &'static str },
}

/// The result of a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Killed,
    /// The test reached the time limit.
    Hung,
    Survived,
}

/// Looks a mutant up by its name on the command line.
pub fn by_name(name: &str) -> Result<&'static Mutant, String> {
    MUTANTS.iter().find(|mutant| mutant.name == name).ok_or_else(|| {
        let names: Vec<_> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        format!("the mutants are {}", names.join(", "))
    })
}

/// Whether the test of one of them runs in a guest.
pub fn need_guests(mutants: &[&Mutant]) -> bool {
    mutants.iter().any(|mutant| matches!(mutant.killer, Killer::Guest { .. }))
}

/// Runs mutants. Returns whether all are killed. `guests` is needed if
/// [`need_guests`].
pub fn run(mutants: &[&Mutant], guests: Option<&(Lab, Store)>) -> Result<bool> {
    let copy = Copy::new(guests)?;
    // Each killer once, in the order of the list.
    let mut killers: Vec<Killer> = Vec::new();
    for mutant in mutants {
        mutant.mutated(&copy.read(mutant.file)?)?;
        if !killers.contains(&mutant.killer) {
            killers.push(mutant.killer);
        }
    }
    for killer in killers {
        let stage = Stage::new("Checking", &killer.to_string());
        let verdict = copy.judge(killer, "unmutated")?;
        ensure!(
            verdict == Verdict::Survived,
            "{killer} fails without any mutation, so it cannot detect one; see {}",
            copy.log("unmutated").display()
        );
        stage.done("Checked", &killer.to_string());
    }
    let mut table = format!("{:<32}{:<11}{:>7}  {}\n", "mutant", "verdict", "time", "test");
    let mut all_killed = true;
    for mutant in mutants {
        let stage = Stage::new("Mutating", mutant.name);
        let started = Instant::now();
        let verdict = copy.mutate(mutant).with_context(|| format!("mutant {}", mutant.name))?;
        all_killed &= matches!(verdict, Verdict::Killed | Verdict::Hung);
        let seconds = started.elapsed().as_secs_f32();
        writeln!(
            table,
            "{:<32}{:<11}{seconds:>5.1} s  {}",
            mutant.name,
            verdict.to_string(),
            mutant.killer
        )?;
        stage.done("Mutated", &format!("{}: {verdict}", mutant.name));
    }
    println!("\n{table}");
    if !all_killed {
        ui::error("not every mutant makes a test fail: see the table above");
    }
    Ok(all_killed)
}

impl Mutant {
    /// The file's text with the mutation.
    fn mutated(&self, text: &str) -> Result<String> {
        let Self { name, file, before, after, .. } = self;
        match text.matches(before).count() {
            1 => Ok(text.replacen(before, after, 1)),
            count => bail!(
                "mutant {name}: what it changes occurs {count} times in {file}, not once: bring \
                 lab/src/mutants/list.rs up to date"
            ),
        }
    }
}

impl std::fmt::Display for Killer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host(arguments) => write!(f, "cargo test {arguments}"),
            Self::Guest { kernel, test } => write!(f, "cargo lab test --kernel {kernel} -- {test}"),
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Killed => "killed",
            Self::Hung => "killed, hung",
            Self::Survived => "SURVIVED",
        })
    }
}

/// A copy of the repository's tracked files in their current state, and its build directory.
/// Both are kept, so that the next run builds only what has changed.
struct Copy<'a> {
    sources: Sources,
    guests: Option<&'a (Lab, Store)>,
}

impl<'a> Copy<'a> {
    fn new(guests: Option<&'a (Lab, Store)>) -> Result<Self> {
        let directory = payload::workspace().join("target/mutants");
        let sources =
            Sources { workspace: directory.join("copy"), target: directory.join("target") };
        copy_tracked(payload::workspace(), &sources.workspace)?;
        fs::create_dir_all(payload::logs())?;
        Ok(Self { sources, guests })
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.sources.workspace.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The file for the output of a build and a test.
    fn log(&self, name: &str) -> PathBuf {
        payload::logs().join(format!("mutant-{name}.log"))
    }

    /// Applies a mutant and runs its killer.
    fn mutate(&self, mutant: &Mutant) -> Result<Verdict> {
        let original = self.read(mutant.file)?;
        let path = self.sources.workspace.join(mutant.file);
        fs::write(&path, mutant.mutated(&original)?)?;
        let verdict = self.judge(mutant.killer, mutant.name);
        fs::write(&path, original)?;
        verdict
    }

    /// Builds and runs a killer. A failed build is an error, since the test did not run.
    fn judge(&self, killer: Killer, name: &str) -> Result<Verdict> {
        match killer {
            Killer::Host(arguments) => self.judge_on_host(arguments, &self.log(name)),
            Killer::Guest { kernel, test } => self.judge_in_guest(kernel, test, name),
        }
    }

    /// The cargo command that runs a target's tests.
    fn cargo_test(&self, target: &str) -> Command {
        let mut cargo = self.sources.cargo();
        cargo
            .args(["test", "--locked", "--all-features", "--target-dir"])
            .arg(&self.sources.target);
        if !target.contains(PACKAGE) {
            cargo.args([PACKAGE, "vfio-remap"]);
        }
        cargo.args(target.split(' '));
        cargo
    }

    fn build(&self, target: &str) -> Result<()> {
        let built = command::unchecked(self.cargo_test(target).arg("--no-run"))?;
        let said = String::from_utf8_lossy(&built.stderr);
        ensure!(built.status.success(), "it does not compile:\n{}", tail(&said, TAIL));
        Ok(())
    }

    fn judge_on_host(&self, arguments: &str, log: &Path) -> Result<Verdict> {
        let (target, test) = arguments.split_once(" -- ").context("a killer names a test")?;
        self.build(target)?;
        let mut run = Command::new("setpriv");
        run.args(["--pdeathsig", "TERM", "timeout", "--kill-after=10"]);
        run.arg(LIMIT.as_secs().to_string());
        let cargo = self.cargo_test(target);
        run.arg(cargo.get_program()).args(cargo.get_args()).args(["--", "--exact", test]);
        let started = Instant::now();
        let ran = command::unchecked(run.current_dir(&self.sources.workspace))?;
        let said = String::from_utf8_lossy(&ran.stdout);
        fs::write(log, [&*ran.stderr, &*ran.stdout].concat())?;
        match (ran.status.code(), Counts::find(&said)) {
            _ if started.elapsed() >= LIMIT => Ok(Verdict::Hung),
            (Some(0), Some(Counts { passed: 1, .. })) => Ok(Verdict::Survived),
            (Some(0), _) => bail!("cargo test {arguments}: there is no such test"),
            // Cargo's exit status for a failed test. It is not a failed build, which was made before.
            (Some(101), _) => Ok(Verdict::Killed),
            _ => bail!("cargo test {arguments}: {}; see {}", ran.status, log.display()),
        }
    }

    fn judge_in_guest(&self, kernel: &str, test: &str, name: &str) -> Result<Verdict> {
        let (lab, store) = self.guests.context("a mutant needs a guest")?;
        let kernel = kernels::by_name(kernel).map_err(Error::msg)?;
        let image = kernel
            .image(store)?
            .with_context(|| format!("the mirror does not have kernel {} any more", kernel.name))?;
        let program = payload::guest_tests_of(&self.sources).context("it does not compile")?;
        let arguments = ["--exact", test].map(str::to_owned);
        let payload = Payload { program: &program, arguments: &arguments, files: &[] };
        let outcome = lab.boot(&image, Variant::Usual, &payload, &format!("mutant-{name}"))?;
        judge_outcome(&outcome).with_context(|| format!("{test}: {}", outcome.complaints()))
    }
}

/// The verdict of a boot with one test; `None` if it has none.
fn judge_outcome(outcome: &Outcome) -> Option<Verdict> {
    let counts = Counts::find(&outcome.output);
    match &outcome.ending {
        Ending::TimedOut(_) => Some(Verdict::Hung),
        Ending::Panicked => Some(Verdict::Killed),
        Ending::Exited(0) if !outcome.log.offences().is_empty() => Some(Verdict::Killed),
        Ending::Exited(0) if counts.is_some_and(|counts| counts.passed == 1) => {
            Some(Verdict::Survived)
        }
        Ending::Exited(1..) => Some(Verdict::Killed),
        _ => None,
    }
}

/// Copies the tracked files of the repository at `from` to `to` and removes other files. Equal
/// files are not written, so that cargo does not build them again.
pub fn copy_tracked(from: &Path, to: &Path) -> Result<()> {
    let listed =
        command::output(Command::new("git").current_dir(from).args(["ls-files", "-z", "--cached"]))
            .context("cannot list the tracked files")?;
    // git still lists deleted files.
    let tracked: Vec<&Path> = listed
        .split_terminator('\0')
        .map(Path::new)
        .filter(|path| from.join(path).exists())
        .collect();
    fs::create_dir_all(to)?;
    for path in files(to)? {
        if !tracked.contains(&path.strip_prefix(to)?) {
            fs::remove_file(path)?;
        }
    }
    for path in tracked {
        let (source, copy) = (from.join(path), to.join(path));
        if fs::read(&copy).is_ok_and(|copy| fs::read(&source).is_ok_and(|source| source == copy)) {
            continue;
        }
        fs::create_dir_all(copy.parent().context("a file is in a directory")?)?;
        fs::copy(&source, &copy).with_context(|| format!("cannot copy {}", source.display()))?;
    }
    Ok(())
}

/// All files below a directory.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => found.extend(files(&entry.path())?),
            false => found.push(entry.path()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::ended;

    #[test]
    fn mutants_fit_the_sources() {
        for mutant in MUTANTS {
            let text = fs::read_to_string(payload::workspace().join(mutant.file)).unwrap();
            let mutated = mutant.mutated(&text).unwrap();
            assert_ne!(mutated, text, "{}", mutant.name);
            assert!(std::ptr::eq(by_name(mutant.name).unwrap(), mutant), "{}", mutant.name);
            let (root, test) = match mutant.killer {
                Killer::Host(arguments) => {
                    let (target, test) = arguments.split_once(" -- ").unwrap();
                    let directory = match target.strip_prefix("--package vfio-remap-") {
                        Some(target) => format!("drivers/{}", target.split_once(' ').unwrap().0),
                        None => ".".to_owned(),
                    };
                    let tests = if target.ends_with("--lib") { "src" } else { "tests/host" };
                    (format!("{directory}/{tests}"), test)
                }
                Killer::Guest { kernel, test } => {
                    assert!(kernels::by_name(kernel).is_ok());
                    ("tests/guest".to_owned(), test)
                }
            };
            assert!(is_there(&payload::workspace().join(root), test), "{}: {test}", mutant.name);
        }
    }

    /// Whether a test is in the file of its modules, or of those around them.
    fn is_there(root: &Path, test: &str) -> bool {
        let (modules, name) = test.rsplit_once("::").unwrap_or(("", test));
        let mut file = modules.split("::").fold(root.to_owned(), |file, module| file.join(module));
        loop {
            let files = [file.with_extension("rs"), file.join("mod.rs"), file.join("main.rs")];
            let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
            if texts.into_iter().any(|text| text.contains(&format!("fn {name}("))) {
                return true;
            }
            if file == root || !file.pop() {
                return false;
            }
        }
    }

    #[test]
    fn a_mutant_that_does_not_fit_is_an_error() {
        let killer = Killer::Host("--lib -- a_test");
        let mutant = Mutant { name: "x", file: "y.rs", before: "a < b", after: "true", killer };
        assert_eq!(mutant.mutated("if a < b {").unwrap(), "if true {");
        for text in ["", "a < b; a < b"] {
            let error = mutant.mutated(text).unwrap_err().to_string();
            assert!(error.starts_with("mutant x: ") && error.contains("in y.rs"), "{error}");
        }
    }

    #[test]
    fn a_guest_kills_by_a_failure_and_not_by_its_own_end() {
        let exited = |status: u8| format!("lab: payload ended with status {status}");
        let judge = |log: &str, output: &str| judge_outcome(&ended(log, output));
        let passed = "test result: ok. 1 passed; 0 failed; 0 ignored";
        assert_eq!(judge(&exited(0), passed), Some(Verdict::Survived));
        assert_eq!(judge(&exited(101), "test result: FAILED. 0 passed"), Some(Verdict::Killed));
        assert_eq!(judge(&format!("BUG: x\n{}", exited(0)), passed), Some(Verdict::Killed));
        assert_eq!(judge("Kernel panic - not syncing: x", ""), Some(Verdict::Killed));
        // No test ran, or it is not known which.
        assert_eq!(judge(&exited(0), "test result: ok. 0 passed; 0 failed; 0 ignored"), None);
        assert_eq!(judge("lab: setup failed: x", ""), None);
        assert_eq!(judge("", ""), None);
    }

    #[test]
    fn a_copy_follows_the_tracked_files() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir().unwrap();
        let git = |arguments: &[&str]| {
            command::output(Command::new("git").current_dir(&from).args(arguments)).unwrap();
        };
        git(&["init", "--quiet"]);
        fs::create_dir(from.path().join("src")).unwrap();
        for (file, text) in [("src/a", "one"), ("b", "two"), ("untracked", "three")] {
            fs::write(from.path().join(file), text).unwrap();
        }
        git(&["add", "src/a", "b"]);
        copy_tracked(from.path(), to.path()).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("src/a")).unwrap(), "one");
        assert!(!to.path().join("untracked").exists());

        let time = || fs::metadata(to.path().join("src/a")).unwrap().modified().unwrap();
        let before = time();
        fs::remove_file(from.path().join("b")).unwrap();
        copy_tracked(from.path(), to.path()).unwrap();
        assert!(!to.path().join("b").exists());
        assert_eq!(time(), before, "it was the same already");

        fs::write(to.path().join("src/a"), "mutated").unwrap();
        copy_tracked(from.path(), to.path()).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("src/a")).unwrap(), "one");
    }
}
