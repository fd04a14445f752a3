//! `cargo lab vmm`: guests inside a lab guest, whose devices the example `vmm` passes through.
//!
//! The lab guest runs `lab/guest/vmm-host`, and each guest in it `lab/guest/vmm-guest`. The kernel of these is always
//! [`INNER`], with its own drivers.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};

use crate::boot::{Lab, Show};
use crate::cache::Store;
use crate::cpio::Archive;
use crate::kernels::{self, Image, Kernel, NEWEST, PATCHED};
use crate::machine::Variant;
use crate::modules;
use crate::payload;
use crate::report::{self, Proof, Row};
use crate::side_by_side::{self, Job, Plan};
use crate::ui;

/// The first process of a guest in a guest, and what runs those.
const INIT: &str = include_str!("../guest/vmm-guest");
const HOST: &str = include_str!("../guest/vmm-host");

/// The kernel of the guests in the guest.
const INNER: &str = "6.12";
/// The kernels that they run on.
const OUTER: [&str; 3] = ["6.12", NEWEST, PATCHED];
/// Those of them in `cargo lab test`.
const BRIEF: [&str; 2] = ["6.12", PATCHED];

/// How much is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// What is part of `cargo lab test`.
    Brief,
    Long,
}

/// Whether the test on this kernel is part of `cargo lab test`.
pub fn is_brief(kernel: &Kernel) -> bool {
    BRIEF.contains(&kernel.name)
}

/// The programs and files of all boots.
pub struct Nested {
    program: PathBuf,
    files: Vec<(String, PathBuf)>,
}

impl Nested {
    /// Builds the programs, and in `directory` the initramfs of the guests in the guest. `None`, with a warning, if
    /// the mirror does not have their kernel any more.
    pub fn build(lab: &Lab, store: &Store, directory: &Path) -> Result<Option<Self>> {
        let inner = kernels::by_name(INNER).map_err(Error::msg)?;
        let Some(image) = inner.image(store)? else {
            ui::warning(&format!(
                "skipped: vmm, since the mirror does not have kernel {INNER} any more"
            ));
            return Ok(None);
        };
        let initramfs = directory.join("initramfs");
        let tool = payload::vmm("vmm-guest")?;
        fs::write(&initramfs, archive(&image, &lab.busybox, &tool)?)?;
        let program = directory.join("vmm-host");
        fs::write(&program, HOST)?;
        let files = [
            ("lab/vmm", payload::vmm("vmm")?),
            ("lab/serve", payload::tested_example("serve")?),
            ("lab/vmm-guest/vmlinux", image.vmlinux()),
            ("lab/vmm-guest/initramfs", initramfs),
            ("lab/vmm-guest/tool", tool),
        ];
        let files = files.map(|(path, file)| (path.to_owned(), file)).into();
        Ok(Some(Self { program, files }))
    }

    /// The boot of a kernel that runs the guests.
    pub fn job(&self, kernel: &Kernel, extent: Extent) -> Job {
        let long = (extent == Extent::Long).then(|| "long".to_owned());
        Job {
            label: format!("{}-vmm", kernel.name),
            variant: Variant::Usual,
            program: self.program.clone(),
            arguments: long.into_iter().collect(),
            files: self.files.clone(),
            modules: Some(&modules::HYPERVISOR),
            proof: Proof::Status,
        }
    }
}

/// Runs all of an extent on the named kernels, or on all. Returns whether all passed that the mirror still has.
pub fn run(lab: &Lab, store: &Store, named: &[&'static Kernel], extent: Extent) -> Result<bool> {
    let directory = tempfile::tempdir()?;
    let Some(nested) = Nested::build(lab, store, directory.path())? else { return Ok(true) };
    let kernels = match named {
        [] => OUTER.map(|name| kernels::by_name(name).map_err(Error::msg)).into_iter().collect(),
        named => Ok(named.to_vec()),
    };
    let kernels: Vec<_> = kernels?;
    let show = if kernels.len() > 1 { Show::AtTheEnd } else { Show::AtOnce };
    let lab = Lab { show, ..lab.clone() };
    let plan = |kernel: &'static Kernel| Plan { kernel, jobs: vec![nested.job(kernel, extent)] };
    let plans = kernels.into_iter().map(plan).collect();
    let ((), rows) = side_by_side::run(&lab, store, plans, || ());
    println!("\n{}", report::table(&rows));
    Ok(rows.iter().any(Row::ran) && rows.iter().all(Row::passed))
}

/// The initramfs of the guests in the guest.
fn archive(image: &Image, busybox: &Path, program: &Path) -> Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(busybox)?);
    archive.file_in_directories("lab/bin/vmm-guest", &read(program)?);
    for (path, module) in image.module_files(&modules::DRIVERS)? {
        archive.file_in_directories(&path, &read(&module)?);
    }
    Ok(archive.finish())
}
