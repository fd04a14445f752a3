//! The namespaces of a controller.

use vfio_remap::{Error, ErrorKind, Result};

use super::super::admin::PAGE;
use super::super::identify::{self, Namespace};
use super::super::status::Status;
use super::{ALL, Controller};

/// Data structures of Identify (NVMe Base 1.4, figure 244).
const NAMESPACE: u32 = 0x00;
const LIST: u32 = 0x02;
/// The first version of NVMe Base with lists of namespaces: major and minor number.
const HAS_LISTS: (u16, u8) = (1, 1);
/// Most namespaces in a list.
const MOST: usize = 1 << 16;
/// The highest namespace ID that is tried without a list.
const TRIED: u32 = 1024;

impl Controller {
    /// The IDs of the usable namespaces.
    ///
    /// If the controller has no valid list, each ID up to 1024 is tried. Such a controller implements an early
    /// version (NVMe Base 1.0), rejects the command, or returns an invalid list.
    ///
    /// # Errors
    /// The controller's error; `Unsupported` for more than 65536 namespaces.
    pub fn namespaces(&self) -> Result<Vec<u32>> {
        match self.listed()? {
            Some(ids) => Ok(ids),
            None => self.tried(),
        }
    }

    /// A namespace.
    ///
    /// # Errors
    /// `NotFound` with the existing IDs, if there is no such namespace; `Malformed` if its data is invalid;
    /// `Unsupported` if it has metadata or blocks larger than a transfer.
    pub fn namespace(&self, id: u32) -> Result<Namespace> {
        let page = self.identify_namespace(id)?;
        let object = || format!("namespace {id} of {}", self.name());
        let Some(page) = page else {
            let there = self.namespaces()?;
            let reason = match there.contains(&id) {
                true => "the controller lists it, but it has no blocks".to_owned(),
                false => format!("there are {there:?}"),
            };
            return Err(Error::new(ErrorKind::NotFound, "find", object()).with_reason(reason));
        };
        Namespace::parse(&page, id, self.name(), self.identity.max_transfer)
    }

    /// The data of a namespace. `None` if the ID does not exist or is not attached.
    fn identify_namespace(&self, id: u32) -> Result<Option<[u8; PAGE]>> {
        if !(1..=self.identity.max_namespace_id).contains(&id) || id == ALL {
            return Ok(None);
        }
        match self.admin(|admin| admin.identify(NAMESPACE, id))? {
            Ok(page) => Ok(identify::is_there(&page).then_some(page)),
            Err(Status::INVALID_NAMESPACE) => Ok(None),
            Err(status) => {
                Err(status.error("identify", format!("namespace {id} of {}", self.name())))
            }
        }
    }

    /// The namespaces that the controller lists; `None` if it has no valid list.
    fn listed(&self) -> Result<Option<Vec<u32>>> {
        let version = self.hardware.registers.version()?;
        if (version.major(), version.minor()) < HAS_LISTS {
            return Ok(None);
        }
        let mut ids = Vec::new();
        loop {
            let after = ids.last().copied().unwrap_or(0);
            let page = match self.admin(|admin| admin.identify(LIST, after))? {
                Ok(page) => page,
                Err(Status::INVALID_OPCODE | Status::INVALID_FIELD | Status::INVALID_NAMESPACE) => {
                    return Ok(None);
                }
                Err(status) => return Err(status.error("list the namespaces of", self.name())),
            };
            let Some(more) = identify::list(&page, after, self.identity.max_namespace_id) else {
                return Ok(None);
            };
            ids.extend(&more);
            if ids.len() > MOST {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "list the namespaces of",
                    self.name(),
                )
                .with_reason(format!("it has more than {MOST} namespaces")));
            }
            if more.len() < PAGE / 4 {
                // A controller that does not support lists may transfer nothing.
                return Ok(Some(ids).filter(|ids| !ids.is_empty()));
            }
        }
    }

    /// The namespaces that exist, among the IDs that are tried.
    fn tried(&self) -> Result<Vec<u32>> {
        let most = self.identity.max_namespace_id;
        if most > TRIED {
            log::warn!(
                "nvme: {} may have {most} namespaces; the first {TRIED} are tried",
                self.name()
            );
        }
        let there = |id| Ok(self.identify_namespace(id)?.map(|_| id));
        (1..=most.min(TRIED)).filter_map(|id| there(id).transpose()).collect()
    }
}
