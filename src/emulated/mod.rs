//! Emulated devices: a [`Model`] in this process, used as a [`Transport`](crate::Transport) ([`Emulated`]), or
//! served to other processes by the vfio-user protocol ([`Server`]).
//!
//! A model's DMA to memory of this process is a copy by the kernel, by `process_vm_readv(2)` and `process_vm_writev(2)`.
//! A kernel without them (`CONFIG_CROSS_MEMORY_ATTACH`) fails that DMA with ENOSYS.

mod bus;
mod device;
mod edu;
pub mod igb;
mod irq;
mod memory;
mod model;
mod model_cell;
pub mod nvme;
mod pci;
mod plan;
mod server;
mod signal;
mod user;

pub use bus::Bus;
pub use device::Emulated;
pub use edu::Edu;
pub use igb::Igb;
pub use memory::Memory;
pub use model::{Activity, Model, Shape};
pub use nvme::Nvme;
pub use pci::PciConfig;
pub use plan::FaultPlan;
pub use server::{ClientLimits, Server};
