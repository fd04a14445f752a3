//! Buffers of other controllers: those in the same address space, and those that are not.

use vfio_remap::ErrorKind;
use vfio_remap::emulated::nvme::Namespace as Storage;
use vfio_remap::emulated::{Emulated, Nvme};

use super::commands::{SETTINGS, controller, model, pattern, read, write};

#[test]
fn a_buffer_that_the_controller_does_not_reach_is_refused() {
    let (model, _) = model();
    let one = controller(&model, SETTINGS);
    let (mut queue, namespace) = (one.queue().unwrap(), one.namespace(1).unwrap());
    let storage = Storage::memory(1 << 20, 512).unwrap();
    let apart = controller(&Emulated::new(Nvme::new(vec![storage])).unwrap(), SETTINGS);
    let storage = Storage::memory(1 << 20, 512).unwrap();
    let beside = controller(&model.beside(Nvme::new(vec![storage])).unwrap(), SETTINGS);

    let foreign = apart.buffer(4096).unwrap();
    foreign.write(0, &pattern(4096, 3));
    let refused = queue.read(&namespace, 0, foreign, 1).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Unsupported, "{refused}");
    assert!(refused.to_string().contains("Controller::buffer"), "{refused}");
    let refused = queue.write(&namespace, 0, refused.buffer.unwrap(), 1).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Unsupported, "{refused}");
    let refused = queue.deallocate(&namespace, 0, 1, refused.buffer.unwrap(), 1).unwrap_err();
    assert_eq!(refused.error.kind(), ErrorKind::Unsupported, "{refused}");
    let mut found = vec![0; 4096];
    refused.buffer.unwrap().read(0, &mut found);
    assert_eq!((found == pattern(4096, 3), queue.outstanding()), (true, 0));

    // That of a controller in the same address space is as good as one's own.
    let shared = beside.buffer(4096).unwrap();
    shared.write(0, &pattern(4096, 5));
    let shared = write(&mut queue, &namespace, 0, shared);
    shared.write(0, &[0; 4096]);
    read(&mut queue, &namespace, 0, shared).read(0, &mut found);
    assert_eq!(found, pattern(4096, 5));
}
