//! A wire to other programs or to the kernel's network: a file descriptor that carries packets.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send, sockopt};
use nix::unistd::{read, write};

use super::wire::{MAX_FRAME, Wire};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::tun::attach_tap;

const TUN: &str = "/dev/net/tun";

/// How many packets of a wrong size are skipped at once.
const SKIPPED: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A socket with end of file.
    Connected,
    Datagrams,
    /// A character device.
    Device,
}

/// A wire to a file descriptor that carries packets. Each packet is a frame.
///
/// The descriptor is one of:
/// - a connected `SOCK_SEQPACKET` socket; the link is down once the peer has closed its end;
/// - a connected datagram socket, such as the other end of QEMU's `-netdev dgram`;
/// - an open TAP or macvtap device that passes frames without a header (`IFF_NO_PI`, no `IFF_VNET_HDR`).
///
/// If there is no room for a frame, it is lost. A frame for the card waits for up to about a millisecond.
///
/// ```
/// use std::os::unix::net::UnixDatagram;
/// use vfio_remap::emulated::igb::{Igb, Packets};
///
/// let (ours, theirs) = UnixDatagram::pair()?;
/// let card = Igb::new([2, 0, 0, 0, 0, 1]).with_wire(Packets::new(ours)?);
/// # drop((card, theirs));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Packets {
    fd: OwnedFd,
    kind: Kind,
    up: bool,
    buffer: Box<[u8]>,
}

impl Packets {
    /// A wire to `fd`. Sets `O_NONBLOCK`, which holds for all descriptors of the same open file.
    ///
    /// # Errors
    /// `Unsupported` if it does not keep packet boundaries (a stream, a file, a pipe); other errors of the
    /// kernel.
    pub fn new(fd: impl Into<OwnedFd>) -> Result<Self> {
        let fd = fd.into();
        let failed = |errno| Error::os(errno, "use", "a descriptor as a wire");
        let kind = kind(&fd)?;
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
        // One byte more than the longest frame, so that longer packets are detected.
        Ok(Self { fd, kind, up: true, buffer: vec![0; MAX_FRAME + 1].into() })
    }

    /// A wire to the TAP interface `name` of this machine, which is created if there is none, and is removed with
    /// this wire then. Frames reach the kernel's network once the interface is up (`ip link set NAME up`) and has
    /// an address.
    ///
    /// # Errors
    /// `NotFound` without `/dev/net/tun`; `InvalidInput` if `name` is none of an interface; `InUse` if another
    /// program uses the interface; `PermissionDenied` without CAP_NET_ADMIN, unless the interface exists and
    /// belongs to the user (`ip tuntap add dev NAME mode tap user USER`).
    pub fn tap(name: &str) -> Result<Self> {
        let object = || format!("the TAP interface {name:?}");
        let tun = File::options().read(true).write(true).open(TUN).map_err(|error| {
            let failed = Error::io(&error, "open", TUN);
            match error.kind() {
                std::io::ErrorKind::PermissionDenied => failed.with_advice("run as root"),
                _ => failed.with_advice("load the driver: modprobe tun"),
            }
        })?;
        attach_tap(&tun, name).map_err(|errno| {
            let error = Error::os(errno, "use", object());
            match errno {
                Errno::EINVAL => error
                    .into_kind(ErrorKind::InvalidInput)
                    .with_reason("that is no name, or no TAP interface for one program at a time")
                    .with_advice("choose another name, of 1 to 15 bytes without % and /"),
                Errno::EBUSY => error
                    .with_reason("another program, or another interface, has it")
                    .with_advice("end that program, or choose another name"),
                Errno::EPERM => error.with_advice(format!(
                    "as root, run: ip tuntap add dev {name} mode tap user USER"
                )),
                _ => error,
            }
        })?;
        Self::new(tun)
    }

    /// Handles an error, which means that the link is down unless it is temporary.
    fn check(&mut self, errno: Errno) {
        match errno {
            // There is no packet, or no room for one.
            Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS | Errno::EMSGSIZE => {}
            // No socket has the address now.
            Errno::ECONNREFUSED if self.kind == Kind::Datagrams => {}
            // The interface is down.
            Errno::EIO | Errno::EINVAL if self.kind == Kind::Device => {}
            _ => {
                if std::mem::take(&mut self.up) {
                    log::debug!("igb: the wire is down: {errno}");
                }
            }
        }
    }
}

fn kind(fd: &OwnedFd) -> Result<Kind> {
    use std::os::unix::fs::FileTypeExt;
    let unsupported = |reason: &'static str| {
        Err(Error::new(ErrorKind::Unsupported, "use", "a descriptor as a wire")
            .with_reason(reason)
            .with_advice("pass a SOCK_SEQPACKET socket, a datagram socket, or a TAP device"))
    };
    match getsockopt(fd, sockopt::SockType) {
        Ok(SockType::SeqPacket) => return Ok(Kind::Connected),
        Ok(SockType::Datagram) => return Ok(Kind::Datagrams),
        Ok(_) => return unsupported("the socket does not keep packet boundaries"),
        Err(Errno::ENOTSOCK) => {}
        Err(errno) => return Err(Error::os(errno, "use", "a descriptor as a wire")),
    }
    let failed = |error| Error::io(&error, "use", "a descriptor as a wire");
    let file = File::from(fd.try_clone().map_err(failed)?);
    if file.metadata().map_err(failed)?.file_type().is_char_device() {
        Ok(Kind::Device)
    } else {
        unsupported("it is neither a socket nor a character device")
    }
}

impl Wire for Packets {
    fn send(&mut self, frame: &[u8]) {
        let sent = match self.kind {
            Kind::Device => write(&self.fd, frame),
            _ => {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                send(self.fd.as_raw_fd(), frame, flags)
            }
        };
        if let Err(errno) = sent {
            self.check(errno);
        }
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        for _ in 0..SKIPPED {
            let received = match self.kind {
                Kind::Device => read(&self.fd, &mut self.buffer),
                _ => recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT),
            };
            match received {
                Ok(0) if self.kind != Kind::Datagrams => {
                    self.check(Errno::EPIPE);
                    return false;
                }
                Ok(len) if (1..=MAX_FRAME).contains(&len) => {
                    frame.clear();
                    frame.extend_from_slice(&self.buffer[..len]);
                    return true;
                }
                Ok(_) => {}
                Err(errno) => {
                    self.check(errno);
                    return false;
                }
            }
        }
        false
    }

    fn is_up(&self) -> bool {
        self.up
    }
}
