//! `nic get`: a file by HTTP.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};
use vfio_remap::{Error, ErrorKind, Result};

use crate::card::{Card, has_wire, settings};
use crate::fetch::{Fetch, Fetched, hex};
use crate::options::{Common, Get};
use crate::pattern::{self, HOST, Pattern};
use crate::progress::Progress;
use crate::stack::Stack;
use crate::stop::Stop;
use crate::url::Url;

/// What is got if nothing is said.
const SIZE: &str = "16MiB";

pub fn run(common: &Common, get: &Get, stop: &Stop) -> Result<()> {
    let emulated = has_wire(common, &common.device);
    let (url, expected) = match &get.url {
        Some(url) => (url.clone(), get.sha256.clone()),
        None if emulated => {
            let expected = get.sha256.clone().unwrap_or_else(|| checksum_of_pattern(SIZE));
            (format!("http://{HOST}/{SIZE}"), Some(expected))
        }
        None => {
            return Err(Error::new(ErrorKind::InvalidInput, "get", "a file")
                .with_reason("there is no server of its own at the other end of this card's wire")
                .with_advice("pass a URL such as http://10.0.2.2:8000/file"));
        }
    };
    let url = Url::parse(&url)?;
    let mut output = get.output.as_deref().map(Output::create).transpose()?;
    let fetched = Card::open(common, settings(common))?.run(|card| {
        let _peer = card.connect(common, stop)?;
        let mut stack = Stack::new(&card.nic, stop)?;
        stack.configure(common)?;
        let fetched = fetch(common, &mut stack, &url, &mut output)?;
        stack.close()?;
        Ok(fetched)
    })?;
    if let Some(output) = output {
        output.finish()?;
    }
    report(common, &url, &fetched);
    match expected {
        Some(expected) if !expected.eq_ignore_ascii_case(&fetched.sha256) => {
            Err(Error::new(ErrorKind::Malformed, "use", format!("what came from {}", url.host))
                .with_reason(format!("its checksum is {}, not {expected}", fetched.sha256))
                .with_advice("get it again; if that does not help, the server has another file"))
        }
        _ => Ok(()),
    }
}

fn fetch(
    common: &Common,
    stack: &mut Stack,
    url: &Url,
    output: &mut Option<Output<'_>>,
) -> Result<Fetched> {
    let limit = Duration::from_secs(common.timeout);
    let server = stack.resolve(&url.host)?;
    let mut fetch = Fetch::new(stack, url.clone(), server, limit)?;
    let progress = Progress::bytes(common);
    let mut bytes = 0;
    let fetched = stack.run(None, |stack| {
        let fetched = fetch.poll(stack, &mut |part| {
            bytes += part.len() as u64;
            output.as_mut().map_or(Ok(()), |output| output.write(part))
        })?;
        if let Some(length) = fetch.head().and_then(|head| head.length) {
            progress.set_length(length);
        }
        progress.set(bytes);
        Ok(fetched)
    });
    progress.done();
    fetch.close(stack);
    // Without a limit, the stack runs until there is a result.
    fetched?.ok_or_else(|| Error::new(ErrorKind::TimedOut, "get", &url.path))
}

fn report(common: &Common, url: &Url, fetched: &Fetched) {
    let Fetched { head, bytes, sha256, elapsed } = fetched;
    let seconds = elapsed.as_secs_f64();
    if common.json {
        let url = format!("http://{}{}", url.authority(), url.path);
        say!(
            "{}",
            json!({"url": url, "status": head.status, "bytes": bytes, "seconds": seconds, "sha256": sha256})
        );
    } else {
        let rate = *bytes as f64 / 1e6 / seconds;
        say!("{bytes} bytes in {seconds:.3} s, {rate:.1} MB/s, SHA-256 {sha256}");
    }
}

/// The checksum of what a name such as `16MiB` says.
fn checksum_of_pattern(name: &str) -> String {
    let mut digest = Sha256::new();
    // Memory is written, and a pattern is read: neither fails.
    let _ = std::io::copy(&mut Pattern::new(pattern::size(name).unwrap_or(0)), &mut digest);
    hex(&digest.finalize())
}

/// The file that the content is written to.
struct Output<'p> {
    path: &'p Path,
    file: File,
}

impl<'p> Output<'p> {
    fn create(path: &'p Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| {
            Error::from_io(error, "create", path.display()).with_advice("name another file")
        })?;
        Ok(Self { path, file })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.failed(error))
    }

    fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::from_io(error, "write", self.path.display())
            .with_advice("make room, or name another file")
    }
}
