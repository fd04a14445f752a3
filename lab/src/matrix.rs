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

- **default**: the strategy that the default order chooses; **before it**: the strategies that did not
  work, and why; **faults**: page faults of touching the new side after it (a word in each page; above
  64 MiB a word in each 2 MiB), + those of touching the source, if it is still mapped.
- **DontUnmap**, **OldLenZero**, **MapAgain**: what each costs, in µs: the median time of the verb / that of
  the verb and of touching all that is mapped after it (*ready*). They are run in turns. \"–\": refused, by
  the kernel or because of a hazard, or not a way to do this.
- **cheapest**: the strategy that `Placement::cheapest` chooses for this verb, and the factor of its *ready*
  to that of the default.
- **without OldLenZero**: the strategy that the default order would choose if there were no `OldLenZero`, which
  is also how the crate knows that a kernel moves entries of 1 GiB; and the factor of the *ready* of the
  default to that one's. \"=\": it is the same.
";

const TABLE: &str = "\
| backing | verb | default | before it | faults | DontUnmap | OldLenZero | MapAgain | cheapest | without OldLenZero |
|---|---|---|---|---|---|---|---|---|---|
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
    let [backing, verb, default, refusals, new, source, costs @ .., cheapest, c, without, w] =
        &fields[..]
    else {
        return None;
    };
    let costs: [&str; 3] = costs.try_into().ok()?;
    let [refusals, costs @ ..] = [*refusals, costs[0], costs[1], costs[2]]
        .map(|field| if field.is_empty() { "–" } else { field });
    let faults = match *verb {
        "duplicate" => format!("{new} + {source}"),
        _ => (*new).to_owned(),
    };
    let chosen = |strategy: &str, factor: &str| match strategy == *default {
        true => "=".to_owned(),
        false => format!("{strategy} (×{factor})"),
    };
    let (cheapest, without) = (chosen(cheapest, c), chosen(without, w));
    let costs = costs.join(" | ");
    Some(format!(
        "| {backing} | {verb} | {default} | {refusals} | {faults} | {costs} | {cheapest} | {without} |\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_parsed_and_other_lines_are_not() {
        let line = "edu BAR0\tduplicate\tMapAgain\tDontUnmap: EINVAL, OldLenZero: EFAULT\t1\t0\t\t\
                    \t9.5 / 12.0\tMapAgain\t1.00\tMapAgain\t1.00";
        assert_eq!(
            row(line).unwrap(),
            "| edu BAR0 | duplicate | MapAgain | DontUnmap: EINVAL, OldLenZero: EFAULT | 1 + 0 | – | – \
             | 9.5 / 12.0 | = | = |\n"
        );
        let line = "memfd\trelocate\tDontUnmap\t\t3\t0\t1.0 / 2.0\t\t9.5 / 12.0\tDontUnmap\t1.00\
                    \tMapAgain\t0.17";
        assert_eq!(
            row(line).unwrap(),
            "| memfd | relocate | DontUnmap | – | 3 | 1.0 / 2.0 | – | 9.5 / 12.0 | = | MapAgain (×0.17) |\n"
        );
        assert_eq!(row("edu BAR0\tduplicate"), None);
    }
}
