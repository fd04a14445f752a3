//! What needs a kernel with VFIO.

#[test]
fn the_lab_names_its_devices() {
    let devices = std::env::var("LAB_DEVICES").expect("run by `cargo lab test`");
    for name in ["nvme=", "e1000e=", "edu=", "ivshmem64m=", "ivshmem4g="] {
        assert!(devices.contains(name), "{name} is missing from {devices}");
    }
}
