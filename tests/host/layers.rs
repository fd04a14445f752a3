//! The layers of the crate import downwards only: sys ← space ← transport ← device ← passthrough ← emulated.

use std::fs;
use std::path::{Path, PathBuf};

/// From the lowest up. `error` is for all of them.
const LAYERS: [&str; 6] = ["sys", "space", "transport", "device", "passthrough", "emulated"];

/// What lib.rs exports again, by where it is from.
const EXPORTS: [(&str, &str); 16] = [
    ("Access", "space"),
    ("Failed", "space"),
    ("Placement", "space"),
    ("Relocation", "space"),
    ("Report", "space"),
    ("Reservation", "space"),
    ("Strategy", "space"),
    ("PciAddress", "transport"),
    ("Transport", "transport"),
    ("Region", "device"),
    ("Device", "device"),
    ("IoRegister", "device"),
    ("Register", "device"),
    ("RegisterArray", "device"),
    ("Window", "device"),
    ("Emulated", "emulated"),
];

fn rank(layer: &str) -> Option<usize> {
    LAYERS.iter().position(|name| *name == layer)
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect()
}

/// The code without comments and unit tests.
fn code(source: &str) -> String {
    let end = source.find("\nmod tests {").unwrap_or(source.len());
    let lines = source[..end].lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// What follows each `crate::`: one name, or those in braces.
fn imported(code: &str) -> Vec<&str> {
    let word =
        |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    code.match_indices("crate::")
        // What a macro names where it is used.
        .filter(|(at, _)| !code[..*at].ends_with('$'))
        .flat_map(|(at, found)| {
            let rest = &code[at + found.len()..];
            let names = match rest.strip_prefix('{') {
                Some(group) => group.split('}').next().unwrap_or(group),
                None => &rest[..word(rest)],
            };
            names.split(',').map(move |name| &name.trim()[..word(name.trim())])
        })
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn imports_run_downwards() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (height, layer) in LAYERS.iter().enumerate() {
        for path in sources(&src.join(layer)) {
            let source = fs::read_to_string(&path).unwrap();
            for name in imported(&code(&source)) {
                let export = EXPORTS.iter().find(|(export, _)| *export == name);
                let from = export.map_or(name, |(_, layer)| layer);
                let at = path.strip_prefix(&src).unwrap().display();
                match rank(from) {
                    Some(other) => {
                        assert!(
                            other <= height,
                            "{at} is in {layer} and imports {name} from {from}"
                        );
                        seen += 1;
                    }
                    None => assert!(
                        ["error", "Error", "ErrorKind", "Result"].contains(&name),
                        "{at} imports {name}: of which layer is that?"
                    ),
                }
            }
        }
    }
    assert!(seen > 100, "{seen} imports were seen");
}

#[test]
fn an_import_upwards_is_seen() {
    let upwards = "use crate::{Error, device::Window};\nfn f() { crate::emulated::Edu::new(); }";
    assert_eq!(imported(&code(upwards)), ["Error", "device", "emulated"]);
    assert!(
        imported(&code("    // crate::device\n#[cfg(test)]\nmod tests { crate::device }"))
            .is_empty()
    );
}
