//! A TAP interface as the wire of an emulated card.

use vfio_remap::emulated::igb::Packets;
use vfio_remap::{Error, ErrorKind, Result};

/// As [`Packets::tap`], with advice for who has no leave to use it.
pub fn open(name: &str) -> Result<Packets> {
    Packets::tap(name).map_err(advise)
}

fn advise(error: Error) -> Error {
    match error.kind() {
        ErrorKind::PermissionDenied => error.with_advice(
            "run it as root, or make the interface yours before, and /dev/net/tun one that you may \
             open: ip tuntap add dev NAME mode tap user USER",
        ),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_no_leave_is_told_so() {
        let advised = |errno| {
            let error = Error::from_errno(errno, "open", "/dev/net/tun");
            advise(error.with_advice("load the driver: modprobe tun")).to_string()
        };
        for errno in [libc::EACCES, libc::EPERM] {
            let said = advised(errno);
            assert!(said.contains("ip tuntap add") && !said.contains("modprobe"), "{said}");
        }
        assert!(advised(libc::ENOENT).contains("modprobe"));
    }
}
