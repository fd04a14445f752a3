//! Boots side by side: guests run while the images of other kernels are fetched or built.

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
use crate::report::{self, Proof, Row};
use crate::ui;

/// How many guests run at a time, where there are as many processors. Each has two of its
/// own, which are idle often enough.
const GUESTS: usize = 2;

/// One boot to be made, of a kernel that is known elsewhere.
pub struct Job {
    /// The kernel's name, and what is special about this boot.
    pub label: String,
    pub variant: Variant,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// What the program needs beside it: see [`Payload`].
    pub files: Vec<(String, PathBuf)>,
    pub proof: Proof,
}

/// What is to be booted of a kernel, in this order.
pub struct Plan {
    pub kernel: &'static Kernel,
    pub jobs: Vec<Job>,
}

/// A job whose kernel is there.
struct Ready {
    place: usize,
    image: Arc<Image>,
    job: Job,
}

/// Rows of the table, and where in it they belong.
type Rows = Mutex<Vec<(usize, Row)>>;

/// Makes all boots, in the order of the plans as far as their kernels are there. One guest
/// comes after `first`. What it answers, and the rows in the order of the plans: what cannot be
/// booted is a row that says so.
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
        let answer = first();
        work();
        answer
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(place, _)| *place);
    (first, rows.into_iter().map(|(_, row)| row).collect())
}

/// Has each kernel there, one after the other, and its boots made.
fn provide(store: &Store, plans: Vec<Plan>, sender: Sender<Ready>, rows: &Rows) {
    let mut place = 0;
    for Plan { kernel, jobs } in plans {
        let reason = match kernel.image(store) {
            Ok(Some(image)) => {
                let image = Arc::new(image);
                for job in jobs {
                    let ready = Ready { place, image: image.clone(), job };
                    // Whoever boots them does so until there are no more.
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
        enter(rows, place, Row { label: kernel.name.to_owned(), result: reason });
        place += 1;
    }
}

/// Boots what is ready until nothing more comes.
fn boot_all(lab: &Lab, jobs: &Mutex<Receiver<Ready>>, rows: &Rows) {
    loop {
        // Whoever waits for the next one has the lock; the others wait for that.
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Ready { place, image, job }) = next else { return };
        let result = boot(lab, &image, &job).unwrap_or_else(|error| failed(&job.label, &error));
        enter(rows, place, Row { label: job.label, result });
    }
}

fn boot(lab: &Lab, image: &Image, job: &Job) -> Result<report::Result> {
    let Job { program, arguments, proof, .. } = job;
    let files = [job.files.clone(), selftests(image)?].concat();
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

/// Says at once what the table says at the end.
fn failed(label: &str, error: &anyhow::Error) -> report::Result {
    let reason = format!("{error:#}");
    ui::error(&format!("{label}: {reason}"));
    report::Result::Failed(reason)
}

fn enter(rows: &Rows, place: usize, row: Row) {
    rows.lock().unwrap_or_else(PoisonError::into_inner).push((place, row));
}
