//! `nvme verify`: writes a pattern to all blocks, and checks all of them.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vfio_remap::{Error, ErrorKind, Result};

use crate::copy::segments;
use crate::guard;
use crate::mover::Mover;
use crate::options::{Options, Verify};
use crate::pattern::{self, Fault};
use crate::progress::Progress;
use crate::session::Session;
use vfio_remap_nvme::Settings;

/// The amount of data, in bytes, after which the progress is saved.
const SEGMENT: u64 = 16 << 20;
/// How many faults are printed.
const PRINTED: usize = 8;

/// Blocks without the pattern: their count, and the first few. The count can be as large as that of all blocks.
#[derive(Default)]
struct Faults {
    count: usize,
    first: Vec<(u64, Fault)>,
}

impl Faults {
    fn add(&mut self, block: u64, fault: Fault) {
        self.count += 1;
        let at = self.first.partition_point(|(other, _)| *other < block);
        if at < PRINTED {
            self.first.insert(at, (block, fault));
            self.first.truncate(PRINTED);
        }
    }
}

/// The progress of a run: all blocks below `written` were written, all below `checked` were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    /// The controller and the namespace.
    subject: String,
    seed: u64,
    written: u64,
    checked: u64,
}

pub fn run(options: &Options, verify: &Verify) -> Result<()> {
    if verify.state.is_some() && guard::is_emulated(&options.common) {
        return Err(Error::new(ErrorKind::Unsupported, "continue on", &options.common.device)
            .with_reason("its blocks are lost at the end of this run")
            .with_advice(
                "omit --state, or let `serve` emulate the device: --device vfio-user:PATH",
            ));
    }
    let session = Session::open(&options.common, Settings::default())?;
    let mut mover = Mover::new(&session)?;
    let mut state = State::begin(verify, &session)?;
    guard::permit(&options.common, &session, &mut mover)?;
    if state.written > 0 && !options.common.json {
        say!("continuing after {} of {} blocks", state.written, session.namespace.block_count());
    }
    let start = Instant::now();
    write(options, verify, &session, &mut mover, &mut state)?;
    let faults = check(options, verify, &session, &mut mover, &mut state)?;
    State::end(verify)?;
    report(options, &session, &state, &faults, start);
    drop(mover);
    session.close()?;
    match faults.first.first() {
        None => Ok(()),
        Some((block, fault)) => {
            let object = format!("{} blocks", faults.count);
            Err(Error::new(ErrorKind::Malformed, "verify", object)
                .with_reason(format!("first block {block}: {fault}")))
        }
    }
}

fn write(
    options: &Options,
    verify: &Verify,
    session: &Session,
    mover: &mut Mover,
    state: &mut State,
) -> Result<()> {
    let namespace = session.namespace;
    let progress = Progress::new(&options.common, "writing", namespace.size());
    let seed = state.seed;
    for part in segments(state.written..namespace.block_count(), SEGMENT >> namespace.block_shift())
    {
        let end = part.end;
        mover.write(part, |first, bytes| {
            let blocks = bytes.chunks_exact_mut(namespace.block_size());
            blocks.zip(first..).for_each(|(bytes, block)| pattern::fill(bytes, seed, block));
            Ok(())
        })?;
        state.written = end;
        state.save(verify)?;
        progress.set(end << namespace.block_shift());
    }
    progress.done();
    Ok(())
}

fn check(
    options: &Options,
    verify: &Verify,
    session: &Session,
    mover: &mut Mover,
    state: &mut State,
) -> Result<Faults> {
    let namespace = session.namespace;
    let progress = Progress::new(&options.common, "checking", namespace.size());
    let mut faults = Faults::default();
    let mut room = vec![0; namespace.block_size()];
    let seed = state.seed;
    for part in segments(state.checked..namespace.block_count(), SEGMENT >> namespace.block_shift())
    {
        let end = part.end;
        mover.read(part, |first, bytes| {
            let blocks = bytes.chunks_exact(namespace.block_size());
            for (bytes, block) in blocks.zip(first..) {
                if let Some(fault) = pattern::check(bytes, seed, block, &mut room) {
                    faults.add(block, fault);
                }
            }
            Ok(())
        })?;
        progress.set(end << namespace.block_shift());
        // After a fault, a continued run has to check these blocks again.
        if faults.count == 0 {
            state.checked = end;
            state.save(verify)?;
        }
    }
    progress.done();
    Ok(faults)
}

fn report(options: &Options, session: &Session, state: &State, faults: &Faults, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    let (blocks, bytes) = (session.namespace.block_count(), session.namespace.size());
    if options.common.json {
        say!(
            "{}",
            json!({"blocks": blocks, "bytes": bytes, "faults": faults.count, "seed": state.seed,
                "seconds": seconds})
        );
        return;
    }
    for (block, fault) in &faults.first {
        say!("block {block}: {fault}");
    }
    if faults.count > PRINTED {
        say!("and {} more", faults.count - PRINTED);
    }
    if faults.count == 0 {
        say!("all {blocks} blocks are correct: {bytes} bytes, {seconds:.2} s");
    }
}

impl State {
    /// Reads the state from the file, if it exists and is about the same blocks.
    fn begin(verify: &Verify, session: &Session) -> Result<Self> {
        let identity = session.controller.identity();
        let namespace = &session.namespace;
        let subject = format!(
            "{} {} namespace {}, {} blocks of {}",
            identity.model,
            identity.serial,
            namespace.id(),
            namespace.block_count(),
            namespace.block_size()
        );
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        let fresh =
            Self { subject, seed: verify.seed.unwrap_or(time as u64), written: 0, checked: 0 };
        let Some(path) = verify.state.as_deref().filter(|path| path.exists()) else {
            return Ok(fresh);
        };
        let text = fs::read_to_string(path).map_err(|error| about(path, "read", &error))?;
        let refuse = |reason: String| {
            Error::new(ErrorKind::Malformed, "continue from", path.display())
                .with_reason(reason)
                .with_advice("remove it to start a new run")
        };
        let found =
            Self::parse(&text).ok_or_else(|| refuse("it is not the state of a run".to_owned()))?;
        if found.subject != fresh.subject {
            return Err(refuse(format!("it is about {}, not {}", found.subject, fresh.subject)));
        }
        if verify.seed.is_some_and(|seed| seed != found.seed) {
            return Err(refuse(format!("its seed is {}", found.seed)));
        }
        if found.written > namespace.block_count() || found.checked > found.written {
            return Err(refuse("its progress is beyond the last block".to_owned()));
        }
        Ok(found)
    }

    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let number = |name: &str| value.get(name)?.as_u64();
        Some(Self {
            subject: value.get("subject")?.as_str()?.to_owned(),
            seed: number("seed")?,
            written: number("written")?,
            checked: number("checked")?,
        })
    }

    /// Saves the state. The old file stays until the new one is complete.
    fn save(&self, verify: &Verify) -> Result<()> {
        let Some(path) = &verify.state else { return Ok(()) };
        let Self { subject, seed, written, checked } = self;
        let text =
            json!({"subject": subject, "seed": seed, "written": written, "checked": checked});
        let mut new = path.clone().into_os_string();
        new.push(".partial");
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(text.to_string().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, path)
        });
        written.map_err(|error| about(path, "write", &error))
    }

    /// Removes the file, because the run is complete.
    fn end(verify: &Verify) -> Result<()> {
        match &verify.state {
            Some(path) if path.exists() => {
                fs::remove_file(path).map_err(|error| about(path, "remove", &error))
            }
            _ => Ok(()),
        }
    }
}

fn about(path: &Path, operation: &'static str, error: &std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(errno) => Error::from_errno(errno, operation, path.display()),
        None => Error::new(ErrorKind::Os, operation, path.display()).with_reason(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_faults_are_kept_and_all_are_counted() {
        let mut faults = Faults::default();
        for block in (0..100).rev() {
            faults.add(block, pattern::check(&[0; 512], 1, block, &mut [0; 512]).unwrap());
        }
        let blocks: Vec<_> = faults.first.iter().map(|(block, _)| *block).collect();
        assert_eq!((faults.count, blocks), (100, (0..PRINTED as u64).collect()));
    }

    #[test]
    fn a_run_continues_from_its_saved_state() {
        let path = std::env::temp_dir().join(format!("vfio-remap-verify-{}", std::process::id()));
        let verify = Verify { state: Some(path.clone()), seed: None };
        let state = State { subject: "a \"b\"".to_owned(), seed: u64::MAX, written: 9, checked: 3 };
        state.save(&verify).unwrap();
        assert_eq!(State::parse(&fs::read_to_string(&path).unwrap()), Some(state));
        State::end(&verify).unwrap();
        assert!(!path.exists());
        State::end(&verify).unwrap();
        assert_eq!(State::parse("{}"), None);
    }
}
