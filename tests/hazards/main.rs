//! What kernels do wrong, shown by raw system calls: one test for each hazard, run by
//! `cargo lab hazard`. A test here passes if the hazard shows itself, and prints what it saw.
//!
//! Two modules are not about hazards: [`series`] is what the lab's kernel patches promise, and
//! [`matrix`] measures the rungs of the ladder for `cargo lab matrix`.

mod child;
mod destination;
mod device;
mod gib_entry;
mod klog;
mod matrix;
mod memtype;
#[path = "../host/common/probe.rs"]
mod probe;
mod race;
mod raw;
mod revocation;
mod series;
mod source;
