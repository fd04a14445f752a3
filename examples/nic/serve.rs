//! `nic serve`: the files of a directory by HTTP.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use sha2::{Digest, Sha256};
use vfio_remap::{Error, ErrorKind, Result};

use crate::card::{Card, settings};
use crate::fetch::{Fetched, hex};
use crate::files::{self, Files};
use crate::options::{Common, Serve};
use crate::peer::Peer;
use crate::progress::Progress;
use crate::request;
use crate::server::{Served, Server};
use crate::stack::Stack;
use crate::stop::Stop;
use crate::url::Url;

/// How many files the station at the other end of an emulated card's wire gets.
const MOST_FILES: usize = 100;
/// How long the last client has to take what was said to it, and how often the table is shown.
const LAST: Duration = Duration::from_secs(5);
const SHOW: Duration = Duration::from_millis(200);

/// What was served.
#[derive(Default)]
struct Totals {
    requests: u64,
    bytes: u64,
    /// Requests that were answered by an error, or not to the end.
    failed: u64,
}

pub fn run(common: &Common, serve: &Serve, stop: &Stop) -> Result<()> {
    let files = Files::open(&serve.directory)?;
    let progress = Progress::table(common);
    let start = Instant::now();
    let (base, totals) = Card::open(common, settings(common))?.run(|card| {
        let peer = card.connect(common, stop)?;
        let mut stack = Stack::new(&card.nic, stop)?;
        stack.configure(common)?;
        let mut server = Server::new(&mut stack, serve.port, files);
        let base = base(&stack, serve.port)?;
        if !common.json {
            say!("{} is served at http://{}/", serve.directory.display(), base.authority());
        }
        let mut client = peer.map(|peer| Client::new(peer, &serve.directory, &base)).transpose()?;
        let totals = answer(&mut stack, &mut server, &mut client, serve, &progress)?;
        stack.close()?;
        Ok((base, totals))
    })?;
    progress.done();
    let Totals { requests, bytes, failed } = totals;
    let seconds = start.elapsed().as_secs_f64();
    if common.json {
        let url = format!("http://{}/", base.authority());
        say!(
            "{}",
            json!({"url": url, "requests": requests, "bytes": bytes, "failed": failed,
                "seconds": seconds})
        );
    } else {
        say!("{requests} requests, {bytes} bytes, {failed} failed, in {seconds:.1} s");
    }
    Ok(())
}

/// Where the server is.
fn base(stack: &Stack, port: u16) -> Result<Url> {
    let address = stack.network.address.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "serve", "files").with_reason("the card has no address")
    })?;
    Ok(Url { host: address.address().to_string(), port, path: "/".to_owned() })
}

/// Answers requests until enough were answered, or a signal comes.
fn answer(
    stack: &mut Stack,
    server: &mut Server<Files>,
    client: &mut Option<Client>,
    serve: &Serve,
    progress: &Progress,
) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut shown = Instant::now();
    let is_enough = |totals: &Totals| serve.requests.is_some_and(|most| totals.requests >= most);
    stack.run(None, |stack| {
        for served in server.poll(&mut stack.sockets)? {
            totals.count(&served);
            let Served { client, path, status, bytes, .. } = served;
            progress.line(&format!("{client} {status} {path} {bytes}"))?;
        }
        if shown.elapsed() >= SHOW {
            shown = Instant::now();
            let Totals { requests, bytes, failed } = totals;
            progress.show(format!("{requests} requests, {bytes} bytes, {failed} failed"));
        }
        let is_over = match client {
            Some(client) => client.is_done()?,
            None => false,
        };
        Ok((is_over || is_enough(&totals) || stack.stop.is_set()).then_some(()))
    })?;
    // What was said last arrives; a signal does not wait for it.
    if !stack.stop.is_set() {
        stack.run(Some(LAST), |stack| {
            server.poll(&mut stack.sockets)?;
            Ok((server.is_idle(&stack.sockets) || stack.stop.is_set()).then_some(()))
        })?;
    }
    Ok(totals)
}

impl Totals {
    fn count(&mut self, served: &Served) {
        self.requests += 1;
        self.bytes += served.bytes;
        self.failed += u64::from(served.status != request::OK.0 || !served.complete);
    }
}

/// The station at the other end of an emulated card's wire, which gets each file once.
struct Client {
    peer: Peer,
    /// Those that have not come, the next one last.
    wanted: Vec<PathBuf>,
}

impl Client {
    fn new(peer: Peer, directory: &Path, base: &Url) -> Result<Self> {
        let mut wanted = Vec::new();
        for below in files::list(directory, MOST_FILES)? {
            let names: Option<Vec<&str>> = below.iter().map(|name| name.to_str()).collect();
            // A name that is no text has no URL here.
            let Some(names) = names else { continue };
            peer.want(Url { path: request::encode(names), ..base.clone() });
            wanted.push(directory.join(below));
        }
        wanted.reverse();
        Ok(Self { peer, wanted })
    }

    /// Whether all files have come.
    ///
    /// # Errors
    /// Why one has not, or is another one.
    fn is_done(&mut self) -> Result<bool> {
        while let Some(fetched) = self.peer.fetched() {
            let Some(path) = self.wanted.pop() else { break };
            check(&path, &fetched?)?;
        }
        if !self.wanted.is_empty() && self.peer.is_over() {
            return Err(Error::new(ErrorKind::Gone, "serve", "a station")
                .with_reason("the one at the other end of the wire has ended"));
        }
        Ok(self.wanted.is_empty())
    }
}

fn check(path: &Path, fetched: &Fetched) -> Result<()> {
    let failed = |error| Error::from_io(error, "read", path.display());
    let mut digest = Sha256::new();
    std::io::copy(&mut File::open(path).map_err(failed)?, &mut digest).map_err(failed)?;
    let expected = hex(&digest.finalize());
    if fetched.sha256 == expected {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Malformed, "serve", path.display())
        .with_reason(format!("its checksum is {expected}, and {} arrived", fetched.sha256)))
}
