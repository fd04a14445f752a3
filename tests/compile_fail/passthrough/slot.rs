// A window that a hypervisor uses can neither be relocated, nor unmapped, nor taken out of its slot.

use vfio_remap::passthrough::{Apertures, Slot, Span};

fn relocate(slot: &mut Slot<u32>, apertures: &Apertures) {
    let _ = slot.relocate(apertures, Some(0xc000_0000));
}

fn relocate_while_it_exists(span: Span, apertures: &Apertures) {
    let mut span = span;
    let slot = span.into_slot(|_| Ok::<u32, ()>(0));
    let _ = span.relocate(apertures, None);
    drop(slot);
}

fn unmap(slot: Slot<u32>, apertures: &Apertures) {
    let _ = slot.unmap(apertures);
}

fn main() {
    let _ = (relocate, relocate_while_it_exists, unmap);
}
