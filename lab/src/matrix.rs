//! `cargo lab matrix`: the strategy of each verb on each kernel, as a page of
//! the documentation.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, bail, ensure};

use crate::boot::{Ending, Lab};
use crate::cache::Store;
use crate::guest::Payload;
use crate::kernels::KERNELS;
use crate::machine::Variant;
use crate::payload;
use crate::ui;

const PAGE: &str = "docs/kernel-matrix.md";

const HEAD: &str = "\
# The strategy of each verb on each kernel

Written by `cargo lab matrix`. It boots each kernel of the lab in QEMU (TCG), and duplicates and
relocates windows whose pages have all been touched. The machine is emulated: compare the figures
with each other, and not with those of real machines.

- **strategy**: the strategy that worked; **before it**: the strategies that did not, and why.
- **faults**: page faults of touching the new side (a word in each page; above 64 MiB a word in each
  2 MiB), + those of touching the source, if it is still mapped.
- **verb**: the median time of the verb; **ready**: that of the verb and of touching all that is
  mapped after it. The factors compare with `MapAgain` alone, which is run alternately.
- **cheapest**: the strategy that `Placement::cheapest` chose, and its factor for **ready**.
";

const TABLE: &str = "\
| backing | verb | strategy | before it | faults | verb | ready | cheapest |
|---|---|---|---|---|---|---|---|
";

/// Boots every kernel and writes the page.
pub fn write(lab: &Lab, store: &Store) -> Result<()> {
    let program = payload::hazards()?;
    let arguments =
        ["--ignored", "--exact", "matrix::matrix_rows", "--nocapture"].map(str::to_owned);
    let mut page = HEAD.to_owned();
    for kernel in &KERNELS {
        let Some(image) = kernel.image(store)? else {
            bail!("the mirror does not have kernel {} any more", kernel.name);
        };
        let payload = Payload { program: &program, arguments: &arguments, files: &[] };
        let outcome =
            lab.boot(&image, Variant::Usual, &payload, &format!("{}-matrix", kernel.name))?;
        let complaints = outcome.complaints();
        ensure!(
            matches!(outcome.ending, Ending::Exited(0)) && complaints.is_empty(),
            "{}: {}\n{complaints}",
            kernel.name,
            outcome.ending
        );
        write!(page, "\n## {} (linux {})\n\n{TABLE}", kernel.name, image.version)?;
        for line in outcome.output.lines().filter_map(|line| line.strip_prefix("row\t")) {
            page += &row(line).with_context(|| format!("malformed row: {line}"))?;
        }
    }
    let path = payload::workspace().join(PAGE);
    fs::create_dir_all(path.parent().context("a page is in a directory")?)?;
    fs::write(&path, page)?;
    ui::status("Wrote", PAGE);
    Ok(())
}

/// A row of the table from what `tests/hazards/matrix.rs` prints.
fn row(line: &str) -> Option<String> {
    let fields: Vec<_> = line.split('\t').collect();
    let [
        backing,
        verb,
        strategy,
        refusals,
        new,
        source,
        us,
        factor,
        ready_us,
        ready_factor,
        cheapest,
        cheapest_factor,
    ] = fields[..]
    else {
        return None;
    };
    let faults = match verb {
        "duplicate" => format!("{new} + {source}"),
        _ => new.to_owned(),
    };
    let refusals = if refusals.is_empty() { "–" } else { refusals };
    Some(format!(
        "| {backing} | {verb} | {strategy} | {refusals} | {faults} | {us} µs (×{factor}) \
         | {ready_us} µs (×{ready_factor}) | {cheapest} (×{cheapest_factor}) |\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_parsed_and_other_lines_are_not() {
        let line = "edu BAR0\tduplicate\tMapAgain\tDontUnmap: EINVAL\t1\t0\t9.5\t1.01\t12.0\t1.00\
                    \tMapAgain\t0.99";
        assert_eq!(
            row(line).unwrap(),
            "| edu BAR0 | duplicate | MapAgain | DontUnmap: EINVAL | 1 + 0 | 9.5 µs (×1.01) \
             | 12.0 µs (×1.00) | MapAgain (×0.99) |\n"
        );
        assert_eq!(row("edu BAR0\tduplicate"), None);
    }
}
