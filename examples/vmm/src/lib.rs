//! A small virtual machine monitor for Linux guests on x86-64, with KVM. PCI devices are passed through to the guest,
//! which drives them and moves their BARs; the windows follow inside reserved address space.
//!
//! `docs/vmm.md` says how to use it, what it shows, and what it leaves out.
//!
//! The module `machine` has KVM's slots and interrupts, `processor` the threads. `memory`, `boot` and `mp_table` are
//! what a kernel finds at its start; `platform` and `pci` what it reaches by exits. `device` does for a passed-through
//! device what `vfio_remap::passthrough` says. `monitor` is the whole, from start to end.

// Nothing of it works on another machine.
#![cfg(target_arch = "x86_64")]
#![deny(unsafe_code, clippy::undocumented_unsafe_blocks)]

mod boot;
mod device;
mod machine;
mod memory;
pub mod monitor;
mod mp_table;
pub mod options;
mod pci;
mod platform;
mod processor;
