//! Tests that need a process of their own.

use std::process::Command;

/// In the process of a test that is alone: its name.
const ALONE: &str = "VFIO_REMAP_TEST_ALONE";

/// Runs the body of a test in a process of its own: this program once more, with that one test.
pub fn alone<F: FnOnce()>(body: F) {
    let name = test_of::<F>();
    if std::env::var(ALONE).is_ok_and(|alone| alone == name) {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ALONE, name);
    let output = command.output().unwrap();
    let [said, cried] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    // A name that no test has is nothing to run, and ends well, too.
    assert!(output.status.success() && said.contains("1 passed"), "{name}:\n{said}{cried}");
}

/// The name of the test that has the closure `F` in its body.
fn test_of<F>() -> &'static str {
    let path = std::any::type_name::<F>();
    let name = path.split_once("::").and_then(|(_, name)| name.strip_suffix("::{{closure}}"));
    name.unwrap_or_else(|| panic!("{path} is not of a test"))
}
