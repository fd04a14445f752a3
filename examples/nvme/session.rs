//! The controller of a command.

use std::sync::Arc;
use std::time::Duration;

use vfio_remap::Result;

use crate::common::{self, Opened, Process};
use crate::options::Common;
use vfio_remap_nvme::{Controller, Namespace, Settings};

/// A controller, one of its namespaces, and the process that emulates it, if there is one.
pub struct Session {
    pub controller: Arc<Controller>,
    pub namespace: Namespace,
    _process: Option<Process>,
}

impl Session {
    /// Opens the controller and the namespace that the user has named.
    pub fn open(common: &Common, settings: Settings) -> Result<Self> {
        let (controller, process) = open_controller(common, settings)?;
        let namespace = controller.namespace(common.namespace.unwrap_or(1))?;
        Ok(Self { controller, namespace, _process: process })
    }

    /// Shuts the controller down.
    pub fn close(self) -> Result<()> {
        Ok(self.controller.close()?)
    }
}

/// Opens the controller that the user has named.
pub fn open_controller(
    common: &Common,
    settings: Settings,
) -> Result<(Arc<Controller>, Option<Process>)> {
    let Opened { device, process } = common::open(&common.device)?;
    let timeout = Duration::from_secs(common.timeout);
    Ok((Controller::new(device, settings.with_timeout(timeout))?, process))
}

#[cfg(test)]
impl Session {
    /// A session with a model in this process.
    pub fn with(model: vfio_remap::emulated::Nvme) -> Self {
        let model = vfio_remap::emulated::Emulated::new(model).unwrap();
        let device = vfio_remap::Device::new(Arc::new(model));
        let controller = Controller::new(device, Settings::default()).unwrap();
        let namespace = controller.namespace(1).unwrap();
        Self { controller, namespace, _process: None }
    }
}
