//! A device as a guest sees it, with a hypervisor that is a list.

mod bars;
mod capabilities;
mod card;
mod hostile;
mod interrupts;
mod models;
mod monitor;

/// A slot owns its span: what would move or unmap a window under a hypervisor does not compile.
#[test]
fn a_span_with_a_slot_cannot_be_relocated() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/passthrough/*.rs");
}
