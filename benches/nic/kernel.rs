//! The kernel's drivers: its generator of packets, and a packet socket.

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, MultiHeaders, SockFlag, SockType, bind, sendmmsg, socket,
};
use nix::unistd::Pid;
use vfio_remap::transport::PciDevice;

use super::frame::{self, BURST};
use super::guest::{Result, output, sysfs_of};
use super::worker::{PROCESSOR, work_during};
use super::{Contender, Count, wait_until};

const PKTGEN: &str = "/proc/net/pktgen";

/// A card that its driver has.
#[derive(Clone)]
pub struct Interface {
    name: String,
}

impl Interface {
    /// Binds a card to a driver, and waits for its link.
    pub fn new(driver: &str, card: &PciDevice) -> Result<Self> {
        let sysfs = sysfs_of(card);
        fs::write(sysfs.join("driver_override"), driver)?;
        fs::write("/sys/bus/pci/drivers_probe", card.address().to_string())?;
        let mut interfaces = fs::read_dir(sysfs.join("net"))?;
        let entry =
            interfaces.next().ok_or_else(|| format!("{driver} does not take its card"))??;
        let name = entry.file_name().to_string_lossy().into_owned();
        output(Command::new("ip").args(["link", "set", &name, "up"]))?;
        let interface = Self { name };
        wait_until("the kernel's card has a link", || {
            // It cannot be read before the interface is up.
            Ok(fs::read_to_string(interface.path("carrier")).is_ok_and(|carrier| carrier == "1\n"))
        })?;
        Ok(interface)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/sys/class/net").join(&self.name).join(name)
    }

    fn sent(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.path("statistics/tx_packets"))?.trim().parse()?)
    }

    fn address(&self) -> Result<LinkAddr> {
        let mine = getifaddrs()?.filter(|found| found.interface_name == self.name);
        let mut links = mine.filter_map(|found| found.address?.as_link_addr().copied());
        Ok(links.next().ok_or_else(|| format!("{} has no address", self.name))?)
    }
}

/// The module pktgen (Linux, `Documentation/networking/pktgen.rst`).
pub struct Pktgen {
    interface: Interface,
}

impl Pktgen {
    pub fn new(interface: Interface) -> Result<Self> {
        let thread = format!("{PKTGEN}/kpktgend_{PROCESSOR}");
        fs::write(&thread, "rem_device_all")?;
        fs::write(&thread, format!("add_device {}", interface.name))?;
        let size = format!("pkt_size {}", frame::LEN);
        let settings =
            ["count 0", "delay 0", "burst 1", "dst 198.18.0.2", "dst_mac 02:00:00:00:00:00"];
        for setting in settings.into_iter().chain([&*size]) {
            fs::write(format!("{PKTGEN}/{}", interface.name), setting)?;
        }
        Ok(Self { interface })
    }
}

impl Contender for Pktgen {
    fn name(&self) -> &'static str {
        "pktgen"
    }

    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        // A write that starts it returns when it has stopped.
        let start = Command::new("sh")
            .args(["-c", &format!("echo start >{PKTGEN}/pgctrl")])
            .stderr(Stdio::null())
            .spawn()?;
        let _running = Running(start);
        measure(&mut || self.interface.sent())
    }
}

/// The process that has started pktgen, which a signal stops.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT);
        let _ = self.0.wait();
    }
}

/// A packet socket, by many messages in a call (packet(7), sendmmsg(2)).
pub struct PacketSocket {
    interface: Interface,
    socket: OwnedFd,
    frame: [u8; frame::LEN],
}

impl PacketSocket {
    pub fn new(interface: Interface) -> Result<Self> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        let address = interface.address()?;
        bind(socket.as_raw_fd(), &address)?;
        let mut bytes = [0; frame::LEN];
        bytes[..frame::HEADERS]
            .copy_from_slice(&frame::headers(address.addr().unwrap_or_default()));
        Ok(Self { interface, socket, frame: bytes })
    }
}

impl Contender for PacketSocket {
    fn name(&self) -> &'static str {
        "packet"
    }

    fn run(&mut self, measure: &mut dyn FnMut(Count) -> Result<()>) -> Result<()> {
        let Self { interface, socket, frame } = self;
        let prepare = || {
            let slices = [[IoSlice::new(frame)]; BURST];
            let nowhere = [None::<LinkAddr>; BURST];
            let mut headers = MultiHeaders::preallocate(BURST, None);
            move || {
                let fd = socket.as_raw_fd();
                match sendmmsg(fd, &mut headers, &slices, nowhere, [], MsgFlags::empty()) {
                    // The queue of the interface is full.
                    Ok(_) | Err(Errno::ENOBUFS | Errno::EAGAIN) => Ok(()),
                    Err(error) => Err(std::io::Error::from(error).into()),
                }
            }
        };
        work_during(prepare, || measure(&mut || interface.sent()))
    }
}
