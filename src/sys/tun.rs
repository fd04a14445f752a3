//! TUN and TAP devices (Linux, Documentation/networking/tuntap.rst).

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// `ioctl(tun, TUNSETIFF, {name, IFF_TAP | IFF_NO_PI})`: attaches an open `/dev/net/tun` to the TAP interface
/// `name`, which is created if there is none. EINVAL if the name is empty, has more than 15 bytes, or contains `%` or
/// `/`; EBUSY if another file is attached to it, EPERM without CAP_NET_ADMIN unless it belongs to the user.
pub(crate) fn attach_tap(tun: impl AsFd, name: &str) -> Result<(), Errno> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short,
        },
    };
    // The last byte stays 0. An empty name, or one with `%`, would let the kernel choose one (dev_alloc_name).
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '%', '/']) {
        return Err(Errno::EINVAL);
    }
    for (byte, value) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *byte = value as libc::c_char;
    }
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open, and the request a whole `ifreq` that is ours, whose name ends with 0. The
    // kernel reads and writes nothing else (drivers/net/tun.c, __tun_chr_ioctl).
    let done = unsafe { libc::ioctl(tun, libc::TUNSETIFF as _, &mut request) };
    Errno::result(done).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_name_that_no_interface_has_is_refused() {
        // The name is looked at first: the file is not asked.
        let file = File::open("/dev/null").unwrap();
        for name in ["", "sixteen-letters-", "a\0b", "tap%d", "a/b"] {
            assert_eq!(attach_tap(&file, name), Err(Errno::EINVAL), "{name:?}");
        }
        assert_eq!(attach_tap(&file, "tap0"), Err(Errno::ENOTTY));
    }
}
