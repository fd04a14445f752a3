//! `cargo lab hazard`: shows the hazards of kernels.

use anyhow::{Result, bail};

use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::guest::Payload;
use crate::kernels::Kernel;
use crate::libtest::Counts;
use crate::machine::Variant;
use crate::payload;
use crate::ui;

/// One reproducer of `tests/hazards`.
pub struct Hazard {
    /// The test's name.
    pub name: &'static str,
    /// The kernels of the lab that have it.
    pub kernels: &'static [&'static str],
    /// A short description, for `--help` and the list.
    pub about: &'static str,
}

const ALL: &[&str] = &["5.10", "6.1", "6.12", "newest", "patched"];

pub const HAZARDS: [Hazard; 8] = [
    Hazard {
        name: "fixed_refusal_destroys_destination",
        kernels: &["5.10", "6.1", "6.12"],
        about: "a refused mremap(MREMAP_FIXED) leaves a hole at its destination",
    },
    Hazard {
        name: "refused_mmap_destroys_destination",
        kernels: ALL,
        about: "an mmap(MAP_FIXED) that the driver refuses leaves a hole too",
    },
    Hazard {
        name: "moved_bar_escapes_revocation",
        kernels: &["5.10", "6.1"],
        about: "a moved BAR is still reachable with memory decoding off, and the move warns",
    },
    Hazard {
        name: "covering_the_head_warns",
        kernels: &["5.10", "6.1"],
        about: "covering the first page of a touched BAR corrupts the memory-type records",
    },
    Hazard {
        name: "gib_entry_corruption",
        kernels: &["6.12", "newest"],
        about: "moving a page-table entry of 1 GiB leaves the device reachable at the old address",
    },
    Hazard {
        name: "gib_entry_split_oops",
        kernels: &["6.12", "newest"],
        about: "unmapping one page of such an entry kills the process or the kernel",
    },
    Hazard {
        name: "move_against_revocation_oops",
        kernels: &["first-patch"],
        about: "the first version of a patch: moving such an entry while it is revoked",
    },
    Hazard {
        name: "accepted_source_is_dead",
        kernels: &["6.1", "6.12", "newest", "patched"],
        about: "MREMAP_DONTUNMAP is accepted for a mapping that no fault fills again",
    },
];

/// Looks a hazard up by its name on the command line.
pub fn by_name(name: &str) -> Result<&'static Hazard, String> {
    HAZARDS.iter().find(|hazard| hazard.name == name).ok_or_else(|| {
        let names: Vec<_> = HAZARDS.iter().map(|hazard| hazard.name).collect();
        format!("the hazards are {}", names.join(", "))
    })
}

/// A list of all hazards.
pub fn list() -> String {
    HAZARDS
        .iter()
        .map(|Hazard { name, kernels, about }| {
            format!("{name:<36}{about}\n{:<36}on {}\n", "", kernels.join(", "))
        })
        .collect()
}

/// Boots the kernel, runs the reproducer, and prints what the kernel logged. Returns
/// whether the hazard was observed.
pub fn show(lab: &Lab, store: &Store, hazard: &Hazard, kernel: &'static Kernel) -> Result<bool> {
    let program = payload::hazards()?;
    let Some(image) = kernel.image(store)? else {
        bail!("the mirror does not have kernel {} any more", kernel.name);
    };
    let arguments = [hazard.name, "--nocapture", "--test-threads=1"].map(str::to_owned);
    let payload = Payload { program: &program, arguments: &arguments, files: &[] };
    let label = format!("{}-{}", kernel.name, hazard.name);
    let outcome = lab.boot(&image, Variant::Usual, &payload, &label)?;
    match outcome.log.offences()[..] {
        [] => println!("the kernel logged no warning"),
        ref offences => println!("the kernel logged:\n{}", offences.join("\n")),
    }
    println!("its complete log is {}", outcome.log_path.display());
    let shown = match &outcome.ending {
        Ending::Exited(_) => Counts::find(&outcome.output)
            .is_some_and(|counts| (counts.passed, counts.failed) == (1, 0)),
        ending => bail!("{ending}\nthe kernel's last messages:\n{}", outcome.log.tail(25)),
    };
    let verb = if shown { "Shown" } else { "Not shown" };
    ui::status(verb, &format!("{} on linux {}", hazard.name, image.version));
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels;

    #[test]
    fn hazards_name_kernels_of_the_lab() {
        for hazard in &HAZARDS {
            assert!(by_name(hazard.name).is_ok());
            assert!(!hazard.kernels.is_empty());
            for name in hazard.kernels {
                assert!(kernels::by_name(name).is_ok(), "{}: {name}", hazard.name);
            }
        }
    }

    #[test]
    fn no_name_is_part_of_another() {
        // libtest would run both.
        for one in &HAZARDS {
            assert_eq!(HAZARDS.iter().filter(|other| other.name.contains(one.name)).count(), 1);
        }
    }
}
