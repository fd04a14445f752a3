//! The guests' machine: its devices, their addresses, and the QEMU command line.

use anyhow::{Result, bail};

use crate::block_stats;
use crate::cards;
use crate::heartbeat;

/// A PCI device of the machine.
pub struct Device {
    /// Its name in tests and `@NAME` arguments.
    pub name: &'static str,
    /// Its PCI address in the guest.
    pub address: &'static str,
    /// The driver that `guest/init` binds it to. For drivers that are built in,
    /// `guest/init` checks that the kernel has bound it.
    pub driver: &'static str,
    /// Its purpose, for `--help`.
    pub about: &'static str,
    /// QEMU's `-device`, without bus and address.
    pub qemu: &'static str,
}

pub const VFIO: &str = "vfio-pci";
/// Built into Debian's kernels, which bind its devices at boot.
const SERIAL: &str = "serial";

/// Each is alone in its IOMMU group, except for crowded and neighbour, and for the twins.
pub const DEVICES: [Device; 19] = [
    Device {
        name: "nvme",
        address: "0000:00:03.0",
        driver: VFIO,
        about: "NVMe controller whose blocks read zeros",
        qemu: "nvme,drive=null,serial=lab",
    },
    Device {
        name: "e1000e",
        address: "0000:00:04.0",
        driver: VFIO,
        about: "network card, 82574L",
        qemu: "e1000e,netdev=net-e1000e,romfile=",
    },
    Device {
        name: "igb",
        address: "0000:00:05.0",
        driver: VFIO,
        about: "network card, 82576",
        qemu: "igb,netdev=net-igb,romfile=",
    },
    Device {
        name: "edu",
        address: "0000:00:06.0",
        driver: VFIO,
        about: "QEMU's educational device: DMA, INTx and MSI",
        // Without an IOMMU it uses physical addresses, which have more than 28 bits.
        qemu: "edu,dma_mask=0xffffffffff",
    },
    Device {
        name: "testdev",
        address: "0000:00:07.0",
        driver: VFIO,
        about: "QEMU's pci-testdev: an I/O port BAR, and 16 MiB of prefetchable memory",
        qemu: "pci-testdev,membar=16M",
    },
    Device {
        name: "ivshmem64m",
        address: "0000:00:08.0",
        driver: VFIO,
        about: "a BAR of 64 MiB that is plain memory",
        qemu: "ivshmem-plain,memdev=memory-64m",
    },
    Device {
        name: "ivshmem4g",
        address: "0000:00:09.0",
        driver: VFIO,
        about: "a BAR of 4 GiB that is plain memory",
        qemu: "ivshmem-plain,memdev=memory-4g",
    },
    Device {
        name: "crowded",
        address: "0000:00:0a.0",
        driver: VFIO,
        about: "shares its IOMMU group with neighbour",
        qemu: "pci-testdev,multifunction=on",
    },
    Device {
        name: "neighbour",
        address: "0000:00:0a.1",
        driver: SERIAL,
        about: "makes crowded's group not viable: it is bound to a kernel driver",
        qemu: "pci-serial,chardev=nowhere-neighbour",
    },
    Device {
        name: "spare",
        address: "0000:00:0b.0",
        driver: SERIAL,
        about: "a serial port bound to a kernel driver, for tests of binding",
        qemu: "pci-serial,chardev=nowhere-spare",
    },
    Device {
        name: "nvme4k",
        address: "0000:00:0f.0",
        driver: VFIO,
        about: "NVMe controller with blocks of 4096 bytes that discards all data immediately",
        qemu: "nvme,drive=null-4k,serial=lab-4k,logical_block_size=4096,physical_block_size=4096",
    },
    Device {
        name: "disk",
        address: "0000:00:10.0",
        driver: VFIO,
        about: "NVMe controller with two namespaces that store data: blocks of 512 and of 4096 bytes",
        qemu: "nvme,serial=lab-disk",
    },
    Device {
        name: "xhci",
        address: "0000:00:11.0",
        driver: VFIO,
        about: "USB host controller with 16 MSI vectors and no MSI-X",
        qemu: "nec-usb-xhci,msix=off",
    },
    Device {
        name: "hot",
        address: "0000:01:00.0",
        driver: VFIO,
        about: "an e1000e behind a root port with native PCIe hotplug, to unplug",
        qemu: "e1000e,netdev=net-hot,romfile=",
    },
    Device {
        name: "twin0",
        address: "0000:02:00.0",
        driver: VFIO,
        about: "an e1000e, the first of two functions behind a root port: a bus to reset",
        qemu: "e1000e,netdev=net-twin0,romfile=,multifunction=on",
    },
    Device {
        name: "twin1",
        address: "0000:02:00.1",
        driver: VFIO,
        about: "an e1000e, the second function behind that root port",
        qemu: "e1000e,netdev=net-twin1,romfile=",
    },
    Device {
        name: "errant",
        address: "0000:03:00.0",
        driver: VFIO,
        about: "a virtio device behind a root port, which can report errors on request (AER)",
        qemu: "virtio-rng-pci,aer=on",
    },
    Device {
        name: "port0",
        address: "0000:04:00.0",
        driver: VFIO,
        about: "network card, 82576, behind a root port, joined to port1 by a hub",
        qemu: "igb,netdev=net-port0,romfile=",
    },
    Device {
        name: "port1",
        address: "0000:05:00.0",
        driver: VFIO,
        about: "network card, 82576, behind a root port, joined to port0 by a hub",
        qemu: "igb,netdev=net-port1,romfile=",
    },
];

/// A root port on the root bus.
pub struct RootPort {
    pub id: &'static str,
    /// Its slot on the root bus, and options.
    pub qemu: &'static str,
}

/// The root ports, in the order in which the firmware numbers their buses: bus 1 has
/// `hot`, bus 2 the twins, bus 3 `errant`, buses 4 and 5 `port0` and `port1`.
const ROOT_PORTS: [RootPort; 5] = [
    RootPort { id: "root-port", qemu: "addr=0c.0" },
    RootPort { id: "twin-port", qemu: "addr=0d.0,hotplug=off" },
    RootPort { id: "errant-port", qemu: "addr=0e.0,hotplug=off" },
    RootPort { id: "port0-port", qemu: "addr=12.0,hotplug=off" },
    RootPort { id: "port1-port", qemu: "addr=13.0,hotplug=off" },
];

/// The namespaces of `disk`: the file, and the size of a block.
const NAMESPACES: [(&str, u32); 2] = [("disk-512", 512), ("disk-4096", 4096)];

/// The files that a machine needs in the directory of its boot, and their sizes. At first
/// they contain zeros.
pub fn disk_files() -> impl Iterator<Item = (&'static str, u64)> {
    NAMESPACES.iter().map(|(file, _)| (*file, 64 << 20))
}

/// The user network of the cards that the Ethernet driver's tests use. Beside the gateway
/// it has a station at 10.0.2.100, each of whose ports is a program of the host:
/// - 7 echoes;
/// - 80 answers HTTP with 8 MiB: the numbers from 1,000,000 on, a line each;
/// - 81 reads the number of a port of the host, gets `/` from it by HTTP, and answers with the
///   SHA-256 of what it got: for servers in the guest that are reached through a forwarded port;
/// - 82 reads a line, and answers with the file in QEMU's working directory that has the
///   network's name and `.pcap`.
///
/// Each reads all that it is sent: a program that ends with something unread resets the
/// connection, and the end of its answer is lost. In these options two commas are one comma.
macro_rules! user_network {
    ($id:literal) => {
        concat!(
            "user,id=",
            $id,
            ",guestfwd=tcp:10.0.2.100:7-cmd:/bin/cat,guestfwd=tcp:10.0.2.100:80-cmd:/bin/sh -c ",
            r#""sed -u '/^.$/q' >/dev/null; "#,
            r"printf 'HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\nConnection: close\r\n\r\n'; ",
            r#"seq 1000000 2048575""#,
            ",guestfwd=tcp:10.0.2.100:81-cmd:/bin/bash -c ",
            r#""read -r port; exec 3<>/dev/tcp/127.0.0.1/$port; "#,
            r"printf 'GET / HTTP/1.0\r\n\r\n' >&3; ",
            r#"sed '1,,/^.$/d' <&3 | sha256sum""#,
            r#",guestfwd=tcp:10.0.2.100:82-cmd:/bin/sh -c "read -r line; cat "#,
            $id,
            r#".pcap""#
        )
    };
}

/// The user network of the emulated card of `cargo lab vfio-user`: a command line's `-netdev`
/// with the name `user`. It sends nothing by itself.
pub const SILENT_USER_NETWORK: &str = concat!(user_network!("user"), ",ipv6=off");

/// The back ends of the devices.
const BACKENDS: [(&str, &str); 13] = [
    ("-blockdev", "driver=null-co,node-name=null,size=1073741824,read-zeroes=on"),
    ("-blockdev", "driver=null-co,node-name=null-4k,size=1073741824"),
    ("-netdev", user_network!("net-e1000e")),
    ("-netdev", user_network!("net-igb")),
    ("-netdev", "user,id=net-hot"),
    ("-netdev", "user,id=net-twin0"),
    ("-netdev", "user,id=net-twin1"),
    ("-netdev", "hubport,id=net-port0,hubid=1"),
    ("-netdev", "hubport,id=net-port1,hubid=1"),
    ("-object", "memory-backend-memfd,id=memory-64m,size=64M,share=on"),
    ("-object", "memory-backend-memfd,id=memory-4g,size=4G,share=on"),
    ("-chardev", "null,id=nowhere-neighbour"),
    ("-chardev", "null,id=nowhere-spare"),
];

/// Connects the guest's third serial port to QEMU's monitor (QMP), so that the guest can,
/// for example, unplug a device.
///
/// A serial port and a monitor cannot share a character device, so QEMU listens
/// on a socket in its working directory and connects to that itself. The interrupt is not
/// the third port's usual one, which the console uses.
const CONTROL: [(&str, &str); 4] = [
    ("-chardev", "socket,id=monitor,path=monitor,server=on,wait=off"),
    ("-mon", "chardev=monitor,mode=control"),
    ("-chardev", "socket,id=to-monitor,path=monitor"),
    ("-device", "isa-serial,chardev=to-monitor,index=2,iobase=0x3e8,irq=5"),
];

/// Connects the guest's fourth serial port, for the heartbeat, to a file in QEMU's working
/// directory. The interrupt is not its usual one, which the second port uses.
fn heartbeat() -> [(&'static str, String); 2] {
    [
        ("-chardev", format!("file,id=heartbeat,path={}", heartbeat::FILE)),
        ("-device", "isa-serial,chardev=heartbeat,index=3,iobase=0x2e8,irq=7".to_owned()),
    ]
}

/// Machines that differ in one feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// With an IOMMU, and hotplug by the guest's pciehp, as on real hardware: a device
    /// is removed some seconds after the request.
    Usual,
    WithoutIommu,
    /// With an IOMMU, and hotplug by ACPI, as in most virtual machines: a device is
    /// removed immediately.
    AcpiHotplug,
    /// With an IOMMU, and an NVDIMM that is bound to no driver.
    Nvdimm,
    /// With an IOMMU that translates for all devices (iommu=nopt). The other variants
    /// translate only for VFIO's devices; those of kernel drivers bypass the IOMMU
    /// (iommu=pt).
    Translating,
    /// With an IOMMU that does not remap interrupts: a device can use only one MSI
    /// vector.
    WithoutIntremap,
    /// As [`Translating`](Self::Translating), with the cards of [`cards`] instead of the
    /// usual devices.
    Cards,
}

impl Variant {
    pub fn has_iommu(self) -> bool {
        self != Self::WithoutIommu
    }

    /// A description that follows the kernel's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Usual => "",
            Self::WithoutIommu => " without an IOMMU",
            Self::AcpiHotplug => " with hotplug by ACPI",
            Self::Nvdimm => " with an NVDIMM",
            Self::Translating => " with iommu=nopt",
            Self::WithoutIntremap => " without interrupt remapping",
            Self::Cards => " with network cards",
        }
    }

    fn devices(self) -> &'static [Device] {
        if self == Self::Cards { &cards::DEVICES } else { &DEVICES }
    }

    fn root_ports(self) -> &'static [RootPort] {
        if self == Self::Cards { &cards::ROOT_PORTS } else { &ROOT_PORTS }
    }
}

/// QEMU's arguments for the machine, without kernel, initramfs and the first
/// two serial ports. Its [`disk_files`] are in the working directory.
///
/// It always uses TCG: even if /dev/kvm can be opened, it may not run a stock kernel.
pub fn qemu_arguments(variant: Variant) -> Vec<String> {
    let (board, memory) = match variant {
        Variant::Nvdimm => ("q35,kernel-irqchip=split,nvdimm=on", "2G,slots=1,maxmem=8G"),
        _ => ("q35,kernel-irqchip=split", "2G"),
    };
    let mut arguments: Vec<String> = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-M",
        board,
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        memory,
    ]
    .map(str::to_owned)
    .into();
    let mut add =
        |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
    let by_acpi = if variant == Variant::AcpiHotplug { "on" } else { "off" };
    add("-global", &format!("ICH9-LPC.acpi-pci-hotplug-with-bridge-support={by_acpi}"));
    if variant.has_iommu() {
        // QEMU requires it before the devices.
        let intremap = if variant == Variant::WithoutIntremap { "off" } else { "on" };
        add("-device", &format!("intel-iommu,intremap={intremap},caching-mode=on,device-iotlb=on"));
    }
    // It names the threads: `turns` tells them apart.
    add("-name", "lab,debug-threads=on");
    if variant == Variant::Cards {
        for backend in cards::BACKENDS {
            add("-netdev", backend);
        }
    } else {
        for (option, value) in BACKENDS {
            add(option, value);
        }
    }
    if variant == Variant::Nvdimm {
        // The first GiB holds the kernel's metadata; the others can be mapped by 1 GiB entries.
        add("-object", "memory-backend-memfd,id=memory-nvdimm,size=3G,share=on");
        add("-device", "nvdimm,memdev=memory-nvdimm");
    }
    for (number, RootPort { id, qemu }) in (1..).zip(variant.root_ports()) {
        let names = format!("id={id},chassis={number},slot={number}");
        add("-device", &format!("pcie-root-port,{names},bus=pcie.0,{qemu}"));
    }
    for device in variant.devices() {
        add("-device", &device.qemu_device(variant.root_ports()));
    }
    let namespaces = if variant == Variant::Cards { &[][..] } else { &NAMESPACES };
    for (number, (file, block)) in (1..).zip(namespaces) {
        add("-blockdev", &format!("driver=file,discard=unmap,node-name={file},filename={file}"));
        let blocks = format!("logical_block_size={block},physical_block_size={block}");
        add("-device", &format!("nvme-ns,bus=disk,drive={file},nsid={number},{blocks}"));
    }
    for (option, value) in CONTROL {
        add(option, value);
    }
    // A monitor for the lab itself: `block_stats`.
    add("-qmp", &format!("unix:{},server=on,wait=off", block_stats::SOCKET));
    for (option, value) in heartbeat() {
        add(option, &value);
    }
    arguments
}

/// The kernel's command line. The log must be complete: it ignores the log level, its
/// buffer is large, and init's messages have no rate limit. There are more serial ports
/// than kernels support by default. The boot's test of the timer is disabled: it counts
/// interrupts in real time, and panics if the host is too busy to emulate enough of them.
pub fn kernel_command_line(variant: Variant) -> String {
    let iommu = match variant {
        Variant::WithoutIommu => "",
        Variant::Usual | Variant::AcpiHotplug | Variant::WithoutIntremap | Variant::Nvdimm => {
            "intel_iommu=on iommu=pt "
        }
        Variant::Translating | Variant::Cards => "intel_iommu=on iommu=nopt ",
    };
    format!(
        "console=ttyS0 {iommu}panic=-1 no_timer_check ignore_loglevel log_buf_len=4M \
         printk.devkmsg=on 8250.nr_uarts=8"
    )
}

/// `LAB_DEVICES`: each device's name and address.
pub fn addresses(variant: Variant) -> String {
    let entries: Vec<_> = variant
        .devices()
        .iter()
        .map(|device| format!("{}={}", device.name, device.address))
        .collect();
    entries.join(" ")
}

/// `LAB_DRIVERS`: each device's address and driver.
pub fn drivers(variant: Variant) -> String {
    let entries: Vec<_> = variant
        .devices()
        .iter()
        .map(|device| format!("{}={}", device.address, device.driver))
        .collect();
    entries.join(" ")
}

/// Replaces each `@NAME` in an argument by the device's address.
pub fn with_addresses(argument: &str) -> Result<String> {
    let mut parts = argument.split('@');
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end =
            part.find(|character: char| !character.is_ascii_alphanumeric()).unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        let Some(device) = DEVICES.iter().find(|device| device.name == name) else {
            let names: Vec<_> = DEVICES.iter().map(|device| device.name).collect();
            bail!("there is no device @{name}; the devices are {}", names.join(", "));
        };
        result.push_str(device.address);
        result.push_str(rest);
    }
    Ok(result)
}

impl Device {
    fn qemu_device(&self, root_ports: &[RootPort]) -> String {
        let bus: usize = self.address["0000:".len()..][..2].parse().expect("there are few buses");
        let bus = if bus == 0 { "pcie.0" } else { root_ports[bus - 1].id };
        let slot = &self.address["0000:00:".len()..];
        format!("{},id={},bus={bus},addr={slot}", self.qemu, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_arguments_become_addresses() {
        assert_eq!(with_addresses("@nvme").unwrap(), "0000:00:03.0");
        assert_eq!(with_addresses("--device=@hot,x").unwrap(), "--device=0000:01:00.0,x");
        assert_eq!(with_addresses("@edu+@igb").unwrap(), "0000:00:06.0+0000:00:05.0");
        assert_eq!(with_addresses("plain").unwrap(), "plain");
    }

    #[test]
    fn the_error_for_an_unknown_device_names_the_known_ones() {
        let error = with_addresses("@nvem").unwrap_err().to_string();
        assert!(error.contains("@nvem") && error.contains("nvme, e1000e"), "{error}");
    }

    #[test]
    fn the_address_determines_bus_and_slot() {
        let hot = DEVICES.iter().find(|device| device.name == "hot").unwrap();
        assert_eq!(
            hot.qemu_device(&ROOT_PORTS),
            "e1000e,netdev=net-hot,romfile=,id=hot,bus=root-port,addr=00.0"
        );
        let twin = DEVICES.iter().find(|device| device.name == "twin1").unwrap();
        assert!(twin.qemu_device(&ROOT_PORTS).ends_with(",bus=twin-port,addr=00.1"));
        let neighbour = DEVICES.iter().find(|device| device.name == "neighbour").unwrap();
        assert!(neighbour.qemu_device(&ROOT_PORTS).ends_with(",bus=pcie.0,addr=0a.1"));
    }
}
