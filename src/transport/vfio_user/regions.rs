//! What a server says of a region, and the files that it sends with that.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::connection::{Connection, Request};
use super::protocol::channel::discard;
use super::protocol::wire::{self, command};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file;
use crate::transport::{RegionFile, RegionInfo};

/// The longest answer about a region that is asked for: some 65,000 sparse areas.
const MAX_ANSWER: u32 = 1 << 20;

/// How often a server may ask for more room: it knows at the first time how much it needs.
const MAX_ROUNDS: u32 = 4;

pub(super) struct Region {
    pub(super) info: RegionInfo,
    /// Where its mappable parts are; `None` where it has none.
    pub(super) file: Option<RegionFile>,
}

/// `None` where the index is vacant, which servers tell by EINVAL or a size of zero.
pub(super) fn read_region(
    connection: &Connection,
    index: u32,
    name: &str,
) -> Result<Option<Region>> {
    // Room for some areas, so that most regions are asked for once.
    let mut argsz = 256;
    let mut rounds = 0..MAX_ROUNDS;
    let (body, fds) = loop {
        let ask = wire::RegionInfo { argsz, index, ..Default::default() };
        let request = Request {
            command: command::DEVICE_GET_REGION_INFO,
            body: [&ask.encode(), &[]],
            fds: &[],
            reply: wire::RegionInfo::SIZE,
        };
        let reply = match connection.exchange(request, "query", name) {
            Ok(reply) => reply,
            Err(error) if error.errno() == Some(Errno::EINVAL as i32) => return Ok(None),
            Err(error) => return Err(error),
        };
        let answer = wire::RegionInfo::decode(&reply.body).unwrap_or_default().0;
        let malformed = |reason| Err(connection.malformed(reason, "query", name));
        if answer.index != index {
            return malformed(format!("the server answered for region {}", answer.index));
        }
        if answer.argsz as usize <= reply.body.len() || answer.size == 0 {
            break (reply.body, reply.fds);
        }
        rounds.next();
        if answer.argsz <= argsz || answer.argsz > MAX_ANSWER || rounds.is_empty() {
            return malformed(format!(
                "the server claims {} bytes of information, {argsz} were asked for",
                answer.argsz
            ));
        }
        argsz = answer.argsz;
    };
    let (mut info, start) = RegionInfo::from_vfio(&body)?;
    if info.size == 0 {
        return Ok(None);
    }
    if fds.iter().any(|fd| !file::is_tmpfs(fd)) {
        discard(fds);
        return Err(Error::new(ErrorKind::Malformed, "map", name)
            .with_reason("the server sent a file that is not shared memory"));
    }
    let file = if info.mappable { choose(&mut info, fds, name)? } else { None };
    info.mappable = file.is_some();
    let file = file.map(|file| {
        check_length(&info, &file, start, name)?;
        RegionFile::memory(Arc::new(file), start).map_err(|_| {
            Error::new(ErrorKind::Malformed, "map", name)
                .with_reason("the server sent a file that is not shared memory")
        })
    });
    Ok(Some(Region { info, file: file.transpose()? }))
}

/// The region's file: one for all of it, or one for each area. Areas of another file than the first's
/// are left out, so that they are reached by messages; the other descriptors are closed.
fn choose(info: &mut RegionInfo, fds: Vec<OwnedFd>, name: &str) -> Result<Option<OwnedFd>> {
    let count = fds.len();
    let mut fds = fds.into_iter();
    let Some(first) = fds.next() else { return Ok(None) };
    if count == 1 {
        return Ok(Some(first));
    }
    let areas = info.areas.as_mut().filter(|areas| areas.len() == count).ok_or_else(|| {
        Error::new(ErrorKind::Malformed, "map", name).with_reason(format!(
            "the server sent {count} files, and one for each area is expected"
        ))
    })?;
    let identity = |fd: &OwnedFd| file::identity(fd).map_err(|errno| Error::os(errno, "map", name));
    let wanted = identity(&first)?;
    let mut same = vec![true];
    for fd in fds {
        same.push(identity(&fd)? == wanted);
    }
    let mut same = same.into_iter();
    areas.retain(|_| same.next() == Some(true));
    Ok(Some(first))
}

/// A mapping past a file's end would raise SIGBUS when it is touched.
fn check_length(info: &RegionInfo, file: &OwnedFd, start: u64, name: &str) -> Result<()> {
    let len = file::regular_size(file).map_err(|errno| Error::os(errno, "map", name))?;
    let Some(len) = len else { return Ok(()) };
    let whole = [0..info.size];
    for area in info.areas.as_deref().unwrap_or(&whole) {
        if start.checked_add(area.end).is_none_or(|end| end > len) {
            return Err(Error::new(ErrorKind::Malformed, "map", name).with_reason(format!(
                "the area {:#x}..{:#x} is said to begin at {start:#x} of a file of {len:#x} bytes",
                area.start, area.end
            )));
        }
    }
    Ok(())
}
