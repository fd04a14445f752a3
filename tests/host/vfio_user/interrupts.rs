//! Interrupts of devices behind servers that do not raise them but by the rules of PCI.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vfio_remap::device::Interrupt;
use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, ErrorKind};

use crate::common::interrupts_in_turn;
use crate::support::peer::{
    Device as Served, MSI, MSIX, Peer, READ, SET_IRQS, WRITE, of_interrupts,
};
use crate::support::{peer, server};

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

const COMMAND: u64 = 4;
const INTERRUPT_DISABLE: u16 = 1 << 10;
const MASKABLE: u32 = 2;

fn connect(stream: UnixStream) -> Device {
    Device::new(Arc::new(VfioUser::from_stream(stream, AMPLE).unwrap()))
}

fn honest(served: Served) -> (Peer, Device) {
    let (peer, stream) = Peer::start(served, |_, _, _| {});
    let device = connect(stream);
    peer.asked();
    (peer, device)
}

#[test]
fn connecting_disables_what_an_earlier_client_left_enabled() {
    let mut served = Served::default();
    served.set_u16(COMMAND, 6);
    served.set_u16(MSIX + 2, 0x8007);
    served.set_u16(MSI + 2, 0x85);
    let (peer, device) = honest(served);
    let served = peer.device();
    let found = [COMMAND, MSI + 2, MSIX + 2].map(|at| served.config_u16(at));
    assert_eq!(found, [6 | INTERRUPT_DISABLE, 0x84, 7]);
    drop(served);
    drop(device);
}

#[test]
fn intx_is_enabled_while_its_vector_is_set_up() {
    let (peer, device) = honest(Served::default());
    let vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    assert_eq!(of_interrupts(&peer.asked()), ["connect 0 0+1", "0x4 = 0x0", "unmask 0 0+1"]);
    drop(vectors);
    assert_eq!(of_interrupts(&peer.asked()), ["0x4 = 0x400", "disconnect 0 0+0"]);
    drop(device);
}

#[test]
fn msix_is_enabled_and_unmasked_while_vectors_are_set_up() {
    let mut served = Served::default();
    // All vectors are masked, as the function says.
    served.set_u16(MSIX + 2, 0x4007);
    let (peer, device) = honest(served);
    let mut vectors = device.vectors(Interrupt::MsiX, 3).unwrap();
    assert_eq!(of_interrupts(&peer.asked()), ["connect 2 0+3", "0x72 = 0x8007", "unmask 2 0+3"]);
    vectors.grow(5).unwrap();
    assert_eq!(of_interrupts(&peer.asked()), ["connect 2 3+2", "unmask 2 3+2"]);
    vectors.set_enabled(1, false).unwrap();
    assert_eq!(of_interrupts(&peer.asked()), ["connect 2 1+1"]);
    drop(vectors);
    let undone = ["0x72 = 0x7", "mask 2 0+1", "mask 2 2+3", "disconnect 2 0+0"];
    assert_eq!(of_interrupts(&peer.asked()), undone);
    assert_eq!(peer.device().config_u16(COMMAND), INTERRUPT_DISABLE, "INTx stays disabled");
    drop(device);
}

/// A hole is not set up. If there is nothing else, nobody has connected the interrupt.
#[test]
fn an_interrupt_of_holes_is_disabled() {
    let kinds = [
        (Interrupt::Intx, ["0x4 = 0x400", "connect 0 0+1"], "0x4 = 0x0"),
        (Interrupt::Msi, ["0x52 = 0x84", "connect 1 0+1"], "0x52 = 0x85"),
        (Interrupt::MsiX, ["0x72 = 0x7", "connect 2 0+1"], "0x72 = 0x8007"),
    ];
    for (kind, disabled, enabled) in kinds {
        let (peer, device) = honest(Served::default());
        let mut vectors = device.vectors(kind, 1).unwrap();
        peer.asked();
        vectors.set_enabled(0, false).unwrap();
        assert_eq!(of_interrupts(&peer.asked()), disabled);
        vectors.set_enabled(0, true).unwrap();
        assert_eq!(of_interrupts(&peer.asked())[1], enabled);
    }
}

#[test]
fn msi_is_enabled_for_as_many_vectors_as_are_set_up() {
    let (peer, device) = honest(Served::default());
    // Four of them are offered: a power of two is enabled.
    for (count, control) in [(1, 0x85), (2, 0x95), (3, 0xa5), (4, 0xa5)] {
        let vectors = device.vectors(Interrupt::Msi, count).unwrap();
        assert_eq!(peer.device().config_u16(MSI + 2), control, "{count}");
        drop(vectors);
        assert_eq!(peer.device().config_u16(MSI + 2) & 1, 0, "{count}");
    }
    drop(device);
}

#[test]
fn an_unmask_may_be_rejected_by_a_server_that_does_not_offer_it() {
    for (flags, error) in [(1, None), (1 | MASKABLE, Some(libc::EINVAL))] {
        let mut served = Served::default();
        served.irqs[2].1 = flags;
        let (peer, stream) = Peer::start(served, |_, asked, answer| {
            if asked.command == SET_IRQS && asked.word(4) & 0x18 != 0 {
                answer.error = Some(libc::EINVAL);
            }
        });
        let device = connect(stream);
        let vectors = device.vectors(Interrupt::MsiX, 8);
        assert_eq!(vectors.as_ref().err().and_then(|error| error.errno()), error, "{vectors:?}");
        drop(vectors);
        assert_eq!(peer.device().config_u16(MSIX + 2), 7, "it is not enabled any more");
        drop(device);
    }
}

#[test]
fn a_server_without_such_registers_is_used_without_them() {
    let (_peer, stream) = Peer::start(Served::default(), |_, asked, answer| {
        if asked.command == WRITE && asked.config().is_some() {
            answer.error = Some(libc::EPERM);
        }
        if asked.command == READ && asked.config().is_some() {
            answer.body[16..].fill(0);
        }
    });
    let device = connect(stream);
    let vectors = device.vectors(Interrupt::MsiX, 8).unwrap();
    drop(vectors);
    device.close().unwrap();
}

/// The list of capabilities leads back to its first.
#[test]
fn capabilities_without_an_end_do_not_hold_up_a_client() {
    let mut served = Served::default();
    served.config[MSIX as usize + 1] = MSI as u8;
    let (peer, device) = honest(served);
    drop(device.vectors(Interrupt::MsiX, 1).unwrap());
    assert_eq!(of_interrupts(&peer.asked())[1], "0x72 = 0x8007");
    drop(device);
}

#[test]
fn a_reset_leaves_interrupts_as_they_were() {
    let (peer, stream) = Peer::start(Served::default(), |served, asked, _| {
        if asked.command == peer::RESET {
            *served = Served::default();
        }
    });
    let device = connect(stream);
    assert!(device.reset().unwrap().is_over());
    assert_eq!(peer.device().config_u16(COMMAND), INTERRUPT_DISABLE);
    let vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
    peer.asked();
    assert!(device.reset().unwrap().is_over());
    let restored = ["0x4 = 0x400", "0x72 = 0x8007", "unmask 2 0+2"];
    assert_eq!(of_interrupts(&peer.asked()), restored);
    drop(vectors);
    drop(device);
}

#[test]
fn a_server_that_takes_no_descriptors_is_sent_none() {
    let version = peer::version(0, 1, r#"{"capabilities":{"max_msg_fds":0}}"#);
    let (peer, device) = honest(Served { version, ..Served::default() });
    let error = device.vectors(Interrupt::MsiX, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("max_msg_fds is 0"), "{error}");
    assert!(peer.asked().iter().all(|asked| asked.fds == 0));
    drop(device);
}

#[test]
fn a_server_is_sent_as_many_descriptors_as_it_takes() {
    let version = peer::version(0, 1, r#"{"capabilities":{"max_msg_fds":3}}"#);
    let (peer, device) = honest(Served { version, ..Served::default() });
    let vectors = device.vectors(Interrupt::MsiX, 8).unwrap();
    let counts = |asked: Vec<peer::Asked>| -> Vec<usize> {
        asked.iter().map(|asked| asked.fds).filter(|&count| count > 0).collect()
    };
    assert_eq!(counts(peer.asked()), [3, 3, 2]);
    drop((vectors, device));
}

#[test]
fn a_device_in_this_process_keeps_what_it_has() {
    let transport = Arc::new(Emulated::new(Edu::new()).unwrap());
    let device = Device::new(transport.clone());
    let command = || {
        let mut command = [0; 2];
        transport.read_at(7, COMMAND, &mut command).unwrap();
        u16::from_le_bytes(command)
    };
    assert_eq!(command(), 0);
    drop(device.vectors(Interrupt::Intx, 1).unwrap());
    drop(device.vectors(Interrupt::Msi, 1).unwrap());
    assert_eq!(command(), 0);
}

#[test]
fn edu_interrupts_by_intx_before_and_after_msi() {
    server::with_edu(|client| {
        let device = Device::new(Arc::new(client));
        interrupts_in_turn::intx_works_before_and_after_msi(&device);
        device.close().unwrap();
    });
}
