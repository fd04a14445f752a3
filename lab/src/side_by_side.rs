//! Concurrent boots: guests run while other kernels are fetched or built.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use crate::boot::Lab;
use crate::cache::Store;
use crate::guest::Payload;
use crate::kernels::{Image, Kernel};
use crate::machine::Variant;
use crate::modules::Set;
use crate::report::{self, Proof, Row};
use crate::ui;

/// How many guests run at a time, if there are as many processors. Each guest has two virtual
/// processors, which are often idle.
const GUESTS: usize = 2;

/// One boot to make.
pub struct Job {
    /// The kernel's name and the variant of this boot.
    pub label: String,
    pub variant: Variant,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Other files that the program needs: see [`Payload`].
    pub files: Vec<(String, PathBuf)>,
    /// A set of modules of the kernel that it needs, too.
    pub modules: Option<&'static Set>,
    pub proof: Proof,
}

/// The boots of a kernel, in order.
pub struct Plan {
    pub kernel: &'static Kernel,
    pub jobs: Vec<Job>,
}

/// A job whose kernel is available.
struct Ready {
    place: usize,
    image: Arc<Image>,
    job: Job,
}

/// Rows of the table, with their places in it.
type Rows = Mutex<Vec<(usize, Row)>>;

/// Makes all boots in the order of the plans, as their kernels become available. One of the
/// concurrent guests starts after `first`. Returns the result of `first`, and the rows in the
/// order of the plans, with a row for each kernel that could not be booted.
pub fn run<T: Send>(
    lab: &Lab,
    store: &Store,
    plans: Vec<Plan>,
    first: impl FnOnce() -> T + Send,
) -> (T, Vec<Row>) {
    let rows = Rows::default();
    let (sender, receiver) = mpsc::channel();
    let jobs = Mutex::new(receiver);
    let guests = thread::available_parallelism().map_or(1, |cores| GUESTS.min(cores.get()));
    let work = || boot_all(lab, &jobs, &rows);
    let first = thread::scope(|scope| {
        scope.spawn(|| provide(store, plans, sender, &rows));
        for _ in 1..guests {
            scope.spawn(work);
        }
        let result = first();
        work();
        result
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(place, _)| *place);
    (first, rows.into_iter().map(|(_, row)| row).collect())
}

/// Makes the kernels available one after the other, and sends their jobs.
fn provide(store: &Store, plans: Vec<Plan>, sender: Sender<Ready>, rows: &Rows) {
    let mut place = 0;
    for Plan { kernel, jobs } in plans {
        let reason = match kernel.image(store) {
            Ok(Some(image)) => {
                let image = Arc::new(image);
                for job in jobs {
                    let ready = Ready { place, image: image.clone(), job };
                    // The receiver exists until all jobs are sent.
                    let _ = sender.send(ready);
                    place += 1;
                }
                continue;
            }
            Ok(None) => report::Result::Skipped(
                "the mirror does not have it any more, and neither does the cache".to_owned(),
            ),
            Err(error) => failed(kernel.name, &error),
        };
        add(rows, place, Row { label: kernel.name.to_owned(), result: reason });
        place += 1;
    }
}

/// Boots jobs until there are no more.
fn boot_all(lab: &Lab, jobs: &Mutex<Receiver<Ready>>, rows: &Rows) {
    loop {
        // The thread that waits for the next job holds the lock; the others wait for the lock.
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Ready { place, image, job }) = next else { return };
        let result = boot(lab, &image, &job).unwrap_or_else(|error| failed(&job.label, &error));
        add(rows, place, Row { label: job.label, result });
    }
}

fn boot(lab: &Lab, image: &Image, job: &Job) -> Result<report::Result> {
    let Job { program, arguments, proof, .. } = job;
    let mut files = [job.files.clone(), selftests(image)?].concat();
    if let Some(set) = job.modules {
        files.extend(image.module_files(set)?);
    }
    let payload = Payload { program, arguments, files: &files };
    let outcome = lab.boot(image, job.variant, &payload, &job.label)?;
    Ok(report::Result::Ran { version: image.version.clone(), outcome, proof: *proof })
}

/// The kernel's own selftests, for the guest's `/lab/selftests`.
fn selftests(image: &Image) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for path in image.selftests()? {
        let name = path.file_name().context("a selftest is a file")?.to_string_lossy();
        files.push((format!("lab/selftests/{name}"), path));
    }
    Ok(files)
}

/// Prints an error immediately, and returns it for the table.
fn failed(label: &str, error: &anyhow::Error) -> report::Result {
    let reason = format!("{error:#}");
    ui::error(&format!("{label}: {reason}"));
    report::Result::Failed(reason)
}

fn add(rows: &Rows, place: usize, row: Row) {
    rows.lock().unwrap_or_else(PoisonError::into_inner).push((place, row));
}
