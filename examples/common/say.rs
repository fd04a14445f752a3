//! Standard output that may be closed or full: a program goes on, leaves its device as it should, and says so at its
//! end.

use std::fmt::Arguments;
use std::io::{self, ErrorKind as Io, Write};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vfio_remap::{Error, Result};

/// Why the first line was lost that was. No line follows it.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

fn lost() -> MutexGuard<'static, Option<io::Error>> {
    LOST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`println!`], but a line that cannot be written is an error at the end of the program.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}

pub fn line(text: Arguments<'_>) {
    if cfg!(test) {
        // The only output that a test harness shows with the test that it is of.
        return println!("{text}");
    }
    let mut lost = lost();
    if lost.is_none() {
        *lost = write(&mut io::stdout(), text).err();
    }
}

fn write(output: &mut dyn Write, text: Arguments<'_>) -> io::Result<()> {
    writeln!(output, "{text}")?;
    output.flush()
}

/// Whether lines are lost: for a program that has nothing to do but to print them.
///
/// # Errors
/// Why they are.
#[allow(dead_code, reason = "not every example does nothing else")]
pub fn check() -> Result<()> {
    match &*lost() {
        None => Ok(()),
        Some(error) => Err(failed(error)),
    }
}

/// A line on standard error, where nobody may be there to read it.
pub fn aside(text: Arguments<'_>) {
    let _ = write(&mut io::stderr(), text);
}

/// Ends a program: an error is a line on standard error.
pub fn end(program: &str, done: Result<()>) -> ExitCode {
    match outcome(done, lost().take()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            aside(format_args!("{program}: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A reader who has gone, such as `head`, has what he wanted.
fn outcome(done: Result<()>, lost: Option<io::Error>) -> Result<()> {
    match lost {
        None => done,
        Some(error) if error.kind() == Io::BrokenPipe => match done {
            Err(error) if error.errno() == Some(libc::EPIPE) => Ok(()),
            done => done,
        },
        Some(error) => done.and(Err(failed(&error))),
    }
}

fn failed(error: &io::Error) -> Error {
    let error = match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(error.kind(), error.to_string()),
    };
    Error::from_io(error, "write", "standard output")
        .with_advice("make room, or send the output elsewhere")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vfio_remap::ErrorKind;

    use super::*;

    fn full() -> io::Error {
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        write(&mut full, format_args!("text")).unwrap_err()
    }

    fn closed() -> io::Error {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        write(&mut writer, format_args!("text")).unwrap_err()
    }

    #[test]
    fn a_full_output_is_an_error_and_a_closed_one_is_none() {
        let other = || Err(Error::new(ErrorKind::TimedOut, "wait for", "a link"));
        assert!(outcome(Ok(()), None).is_ok());
        assert!(outcome(Ok(()), Some(closed())).is_ok());
        // What a loop ends with that only prints.
        assert!(outcome(Err(failed(&closed())), Some(closed())).is_ok());
        let error = outcome(Ok(()), Some(full())).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOSPC));
        assert!(error.to_string().contains("standard output"), "{error}");
        // The program's own error comes first.
        for lost in [None, Some(full()), Some(closed())] {
            assert_eq!(outcome(other(), lost).unwrap_err().kind(), ErrorKind::TimedOut);
        }
    }
}
