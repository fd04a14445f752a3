//! A device that is passed through to a guest: what every virtual machine monitor needs, without a hypervisor.
//!
//! A [`GuestDevice`] is what a guest sees of a [`Device`](crate::Device): a virtual configuration space, BARs that the
//! guest places in [`Apertures`], MSI-X, MSI and INTx. The monitor forwards the guest's accesses to configuration space,
//! and those to memory and ports that the hypervisor traps. What the hypervisor has to do then is returned as a list of
//! [`Action`]s. This module calls no hypervisor, so that any can be used.
//!
//! When the guest moves a BAR, the windows over it are relocated to the same place in this process. A memory slot owns
//! its span ([`Slot`]), so a window cannot be moved under a hypervisor. A span that has no slot, for example because the
//! hypervisor has no more of them, is trapped: slow, but correct.
//!
//! ```
//! # use std::sync::Arc;
//! # use vfio_remap::{Device, emulated::{Edu, Emulated}};
//! use vfio_remap::passthrough::{Action, Apertures, GuestDevice};
//!
//! # let device = Device::new(Arc::new(Emulated::new(Edu::new())?));
//! // The guest may place BARs at 3 GiB, and above 4 GiB.
//! let apertures = Apertures::new(&[0xc000_0000..0xf000_0000, 1 << 32..1 << 36], 0x1000..0x1_0000)?;
//! let mut guest = GuestDevice::<u32>::new(device, &apertures)?;
//! let mut slots = 0..;
//! let mut perform = |guest: &mut GuestDevice<u32>, actions: Vec<Action>| -> vfio_remap::Result<()> {
//!     for action in actions {
//!         match action {
//!             Action::RemoveSlot(span) => guest.remove_slot(span, |_slot| vfio_remap::Result::Ok(()))?,
//!             Action::Relocate(span) => {
//!                 if let Some(report) = guest.relocate(span)? {
//!                     println!("{span}: {report}");
//!                 }
//!             }
//!             Action::AddSlot(span) => guest.add_slot(span, |memory| {
//!                 println!("{:#x} of the guest is at {:#x}", memory.guest, memory.host);
//!                 slots.next().ok_or(vfio_remap::Error::from_errno(28, "add", "a slot"))
//!             })?,
//!             Action::Reset => println!("{}", guest.reset()?),
//!             other => println!("{other:?}"),
//!         }
//!     }
//!     Ok(())
//! };
//! let actions = guest.start();
//! perform(&mut guest, actions)?;
//!
//! // The guest finds the size of BAR 0, gives it an address, and enables memory decoding.
//! assert!(guest.write_config(0x10, &[0xff; 4]).is_empty());
//! let mut size = [0; 4];
//! guest.read_config(0x10, &mut size);
//! assert_eq!(u32::from_le_bytes(size), !0xf_ffff);
//! assert!(guest.write_config(0x10, &0xc010_0000u32.to_le_bytes()).is_empty());
//! let actions = guest.write_config(4, &[2, 0]);
//! perform(&mut guest, actions)?;
//!
//! let mut identification = [0; 4];
//! assert!(guest.read_memory(0xc010_0000, &mut identification));
//! assert_eq!(identification, [0xed, 0, 0, 1]);
//!
//! let actions = guest.release();
//! perform(&mut guest, actions)?;
//! guest.close()?;
//! # Ok::<(), vfio_remap::Error>(())
//! ```

mod aperture;
mod bars;
mod capabilities;
mod config;
mod device;
mod interrupts;
mod msix;
mod span;
mod warnings;

pub use aperture::Apertures;
pub use device::{Action, GuestDevice};
pub use interrupts::Message;
pub use span::{Slot, SlotMemory, Span, SpanId};
