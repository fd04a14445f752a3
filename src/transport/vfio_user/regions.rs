//! Regions as a server describes them, and the files that it sends for them.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::connection::{Connection, Request};
use super::protocol::channel::discard;
use super::protocol::wire::{self, command};
use crate::error::Result;
use crate::space::BackingKind;
use crate::sys::{self, file};
use crate::transport::{RegionFile, RegionInfo};

/// The longest description of a region that is accepted: some 65,000 sparse areas.
const MAX_ANSWER: u32 = 1 << 20;

/// How often a server may ask for more room. An honest one does so once.
const MAX_ROUNDS: u32 = 4;

pub(super) struct Region {
    pub(super) info: RegionInfo,
    /// The file of its mappable parts; `None` if it has none.
    pub(super) file: Option<RegionFile>,
}

/// `None` if the index is vacant. Servers say so by EINVAL or a size of zero.
pub(super) fn read_region(
    connection: &Connection,
    index: u32,
    name: &str,
) -> Result<Option<Region>> {
    // Room for some areas: one exchange is enough for most regions.
    let mut argsz = 256;
    let mut rounds = 0..MAX_ROUNDS;
    let (body, mut fds) = loop {
        let ask = wire::RegionInfo { argsz, index, ..Default::default() };
        let request = Request {
            command: command::DEVICE_GET_REGION_INFO,
            body: [&ask.encode(), &[]],
            reply: wire::RegionInfo::SIZE,
            ..Request::default()
        };
        let reply = match connection.exchange(request, "query", name) {
            Ok(reply) => reply,
            Err(error) if error.errno() == Some(Errno::EINVAL as i32) => return Ok(None),
            Err(error) => return Err(error),
        };
        let answer = wire::RegionInfo::decode(&reply.body).unwrap_or_default().0;
        let malformed = |reason| Err(connection.malformed(reason, "query", name));
        let whole = answer.argsz as usize <= reply.body.len() || answer.size == 0;
        if answer.index == index && whole {
            break (reply.body, reply.fds);
        }
        if answer.index != index {
            return malformed(format!("the server answered for region {}", answer.index));
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
    let (mut info, start) = match RegionInfo::from_vfio(&body) {
        Ok((info, start)) if info.size > 0 => (info, start),
        other => return other.map(|_| None),
    };
    let file = if info.mappable { choose(&mut info, fds.take(), start, name) } else { None };
    info.mappable = file.is_some();
    Ok(Some(Region { info, file }))
}

/// The region's file: one for all of it, or one for each area. `None` if nothing of the region can be mapped.
/// Messages reach such a region, and areas that are left out. The log says why.
fn choose(info: &mut RegionInfo, fds: Vec<OwnedFd>, start: u64, name: &str) -> Option<RegionFile> {
    let count = fds.len();
    let areas = info.areas.as_ref().map_or(1, Vec::len);
    if count > 1 && count != areas {
        discard(fds);
        log::info!("{name} is not mapped: the server sent {count} files for {areas} areas");
        return None;
    }
    let mut refused = Vec::new();
    let files: Vec<_> =
        fds.into_iter().map(|fd| file_of(fd, start).map_err(|fd| refused.push(fd)).ok()).collect();
    if !refused.is_empty() {
        log::info!("{name}: {} of {count} files cannot be mapped safely", refused.len());
        discard(refused);
    }
    let first = files.iter().flatten().next()?.clone();
    let identity = |file: &RegionFile| file::identity(file.fd()).ok();
    let wanted = identity(&first);
    let len = file::regular_size(first.fd()).ok().flatten().unwrap_or(0);
    // An access past the end of a file raises SIGBUS. Areas that leave the region are kept: the layout of the
    // region reports them.
    let fits = |area: &Range<u64>| {
        area.end > info.size || start.checked_add(area.end).is_some_and(|end| end <= len)
    };
    let Some(areas) = &mut info.areas else {
        let whole = fits(&(0..info.size));
        if !whole {
            log::info!("{name} is not mapped: {:#x} bytes, and its file has {len:#x}", info.size);
        }
        return whole.then_some(first);
    };
    let before = areas.len();
    let mut file = files.iter().cycle();
    areas.retain(|area| {
        let file = file.next().and_then(Option::as_ref);
        file.is_some_and(|file| identity(file) == wanted) && fits(area)
    });
    if areas.len() < before {
        log::info!("{} of {before} areas of {name} are not mapped", before - areas.len());
    }
    if areas.is_empty() { None } else { Some(first) }
}

/// A file that a region can be mapped from: shared memory, or a regular file on a local disk. Any other file is
/// given back, as is one in which the region does not begin with a page.
fn file_of(fd: OwnedFd, start: u64) -> std::result::Result<RegionFile, OwnedFd> {
    let memory = file::is_tmpfs(&fd);
    if !start.is_multiple_of(sys::page_size() as u64) || !(memory || file::is_on_local_disk(&fd)) {
        return Err(fd);
    }
    // The descriptor can do no more here than in the server. Only shared memory is known to refault after
    // MREMAP_DONTUNMAP.
    let kind = if memory { BackingKind::SharedMemory } else { BackingKind::Other };
    Ok(RegionFile { fd: Arc::new(fd), start, kind })
}
