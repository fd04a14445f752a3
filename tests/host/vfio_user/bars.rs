//! Servers whose BARs have no address yet, and do not answer before they have one.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, ErrorKind};

use crate::support::peer::{Device as Served, Peer, READ, WRITE, WRITE_MULTI, version};

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

fn connect(stream: UnixStream) -> Device {
    Device::new(Arc::new(VfioUser::from_stream(stream, AMPLE).unwrap()))
}

/// As QEMU's server: a BAR answers if it has an address and the command register lets it.
fn without_addresses(version: Vec<u8>) -> (Peer, UnixStream) {
    let mut served = Served { version, ..Served::default() };
    // A BAR of 64 bits, one of 32 that has an address, and one of I/O ports.
    served.regions[..4].copy_from_slice(&[0x4000, 0, 0x1_0000, 0x40]);
    served.config[0x10] = 0xc;
    served.config[0x18..0x1c].copy_from_slice(&0x8000_0000u32.to_le_bytes());
    served.config[0x1c] = 1;
    Peer::start(served, |served, asked, answer| {
        if !matches!(asked.command, READ | WRITE) || asked.config().is_some() {
            return;
        }
        let region = asked.word(8);
        let register = served.config_u32(0x10 + 4 * u64::from(region));
        let address = match region {
            0 => u64::from(register & !0xf) | u64::from(served.config_u32(0x14)) << 32,
            3 => (register & !3).into(),
            _ => (register & !0xf).into(),
        };
        let decoding = if region == 3 { 1 } else { 2 };
        if address == 0 || served.config_u16(4) & decoding == 0 {
            answer.error = Some(libc::EINVAL);
        }
    })
}

#[test]
fn bars_without_an_address_are_given_one_with_memory_decoding() {
    for multiple in [false, true] {
        let json = format!(r#"{{"capabilities":{{"write_multiple":{multiple}}}}}"#);
        let (peer, stream) = without_addresses(version(0, 1, &json));
        let device = connect(stream);
        let refused = |bar: u32| {
            let register = device.bar(bar).unwrap().trapped_register::<u32>(0).unwrap();
            register.read().err().and_then(|error| error.errno()) == Some(libc::EINVAL)
        };
        assert_eq!([0, 2, 3].map(refused), [true, true, true]);
        let config = device.config().unwrap();
        peer.asked();
        config.set_memory_decoding(true).unwrap();
        assert_eq!([0, 2, 3].map(refused), [false, false, true]);
        assert!(!config.io_decoding().unwrap());
        config.set_io_decoding(true).unwrap();
        assert_eq!([0, 2, 3].map(refused), [false, false, false]);
        assert!(config.io_decoding().unwrap() && config.memory_decoding().unwrap());
        let served = peer.device();
        let registers = [0x10, 0x14, 0x18, 0x1c].map(|at| served.config_u32(at));
        assert_eq!(registers, [0xc, 1, 0x8000_0000, 0x1001], "aligned, apart, the types kept");
        drop(served);
        let writes = |command| peer.asked().iter().filter(|asked| asked.command == command).count();
        let count = writes(if multiple { WRITE_MULTI } else { WRITE });
        // The addresses, and the command register twice.
        assert_eq!(count, if multiple { 1 } else { 5 });
        drop(device);
    }
}

#[test]
fn a_server_that_makes_fewer_writes_than_it_was_sent_is_named() {
    let json = r#"{"capabilities":{"write_multiple":true}}"#;
    let mut served = Served { version: version(0, 1, json), ..Served::default() };
    served.regions[1] = 0x1000;
    let (_peer, stream) = Peer::start(served, |_, asked, answer| {
        if asked.command == WRITE_MULTI {
            answer.body = 1u64.to_ne_bytes().to_vec();
        }
    });
    let error = connect(stream).config().unwrap().set_memory_decoding(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    assert!(error.to_string().contains("1 of 2 writes"), "{error}");
}
