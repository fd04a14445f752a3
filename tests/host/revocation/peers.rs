//! Peer-to-peer mappings of windows, while their device is away and while they are revoked.

#![expect(unsafe_code, reason = "a model reads the pages that it is given")]

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_remap::device::{DmaMapping, IovaPlacement, Revoked};
use vfio_remap::space::{Access, DmaMemory};
use vfio_remap::transport::{DeviceInfo, DmaLimits, RegionFile, RegionInfo, Transport};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Window};

use super::truncatable::Truncatable;

type Hook = Box<dyn FnOnce() + Send>;

/// What happens to a target and its peer, in order.
#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    /// What happened since the last time.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Runs once, in a call that a test waits for.
#[derive(Default)]
struct Once(Mutex<Option<Hook>>);

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Once")
    }
}

impl Once {
    fn set(&self, hook: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(hook));
    }

    fn run(&self) {
        let hook = self.0.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
    }
}

/// What begins a function level reset when it is written to configuration space.
const FUNCTION_RESET: (u64, [u8; 2]) = (0x48, [0, 0x80]);

/// A PCI device whose windows are mapped for the DMA of [`Peer`].
#[derive(Debug)]
struct Target {
    memory: Truncatable,
    config: Mutex<[u8; 256]>,
    /// Whether it refuses writes to configuration space.
    refuses: Mutex<bool>,
    log: Log,
    /// During a hot reset.
    during: Once,
}

impl Target {
    fn new(log: &Log) -> Arc<Self> {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
        // It has the PCI Express capability.
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40] = 0x10;
        let (memory, config) = (Truncatable::new(), Mutex::new(config));
        let log = log.clone();
        Arc::new(Self { memory, config, refuses: Mutex::default(), log, during: Once::default() })
    }
}

impl Transport for Target {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("target", 8);
        (info.pci, info.resettable) = (true, true);
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        if index == 7 { Ok(RegionInfo::trapped(256)) } else { self.memory.region(index) }
    }

    fn read_at(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        data.copy_from_slice(&self.config.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_at(&self, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        if *self.refuses.lock().unwrap() {
            return Err(Error::new(ErrorKind::Refused, "write", "it"));
        }
        if offset == FUNCTION_RESET.0 && data == FUNCTION_RESET.1 {
            return self.reset();
        }
        self.config.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn backing(&self, index: u32) -> Result<RegionFile> {
        self.memory.backing(index)
    }

    fn reset(&self) -> Result<()> {
        self.log.add("reset");
        Ok(())
    }

    fn hot_reset(&self, _: &[&dyn Transport]) -> Result<()> {
        self.during.run();
        self.log.add("hot reset");
        Ok(())
    }

    fn enter_low_power(&self, _: Option<BorrowedFd<'_>>) -> Result<()> {
        self.log.add("sleep");
        Ok(())
    }

    fn exit_low_power(&self) -> Result<()> {
        self.log.add("wake");
        Ok(())
    }
}

/// A device that reaches the windows of others.
#[derive(Debug)]
struct Peer {
    log: Log,
    before_map: Once,
    unmapping: Once,
    /// How many times it refuses to unmap.
    keeps: Mutex<usize>,
}

impl Peer {
    fn new(log: &Log) -> Arc<Self> {
        let log = log.clone();
        let (before_map, unmapping) = (Once::default(), Once::default());
        Arc::new(Self { log, before_map, unmapping, keeps: Mutex::default() })
    }
}

impl Transport for Peer {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("peer", 0)
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        Err(Error::new(ErrorKind::NotFound, "find", format!("region {index}")))
    }

    fn read_at(&self, region: u32, _: u64, _: &mut [u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn write_at(&self, region: u32, _: u64, _: &[u8]) -> Result<()> {
        self.region(region).map(drop)
    }

    fn dma_limits(&self) -> Result<DmaLimits> {
        Ok(DmaLimits::new(vec![0x1000..=0xf_ffff], 4096))
    }

    /// The pages that are there are the ones that it reaches from now on.
    fn dma_map(&self, iova: u64, memory: &DmaMemory, _: Access) -> Result<()> {
        self.before_map.run();
        // SAFETY: the window is mapped while its memory is, and is read as one aligned word.
        let shown =
            unsafe { std::ptr::with_exposed_provenance::<u32>(memory.address()).read_volatile() };
        self.log.add(format!("map {shown:#x} at {iova:#x}"));
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, _: u64) -> Result<()> {
        self.unmapping.run();
        let mut keeps = self.keeps.lock().unwrap();
        if *keeps > 0 {
            *keeps -= 1;
            self.log.add(KEPT);
            return Err(Error::new(ErrorKind::Refused, "unmap", "it"));
        }
        self.log.add(format!("unmap {iova:#x}"));
        Ok(())
    }
}

/// A target, one of its windows, and a device that reaches it.
struct Pair {
    log: Log,
    target: Device,
    target_transport: Arc<Target>,
    window: Window,
    peer: Device,
    peer_transport: Arc<Peer>,
}

const IOVA: u64 = 0x4000;
const MAPPED: &str = "map 0xda7a at 0x4000";
const UNMAPPED: &str = "unmap 0x4000";
const KEPT: &str = "keep";

impl Pair {
    fn new() -> Self {
        let log = Log::default();
        let (target_transport, peer_transport) = (Target::new(&log), Peer::new(&log));
        let target = Device::new(target_transport.clone());
        let window = target.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        window.register::<u32>(0).unwrap().write(0xda7a);
        let peer = Device::new(peer_transport.clone());
        Self { log, target, target_transport, window, peer, peer_transport }
    }

    fn map(&self) -> Result<DmaMapping> {
        let placement = IovaPlacement::At(vfio_remap::device::Iova(IOVA));
        self.peer.dma().unwrap().map(self.window.dma_memory(), placement, Access::ReadWrite)
    }
}

#[test]
fn peers_are_unmapped_while_their_target_is_away() {
    let pair = Pair::new();
    let mapping = pair.map().unwrap();
    assert_eq!(pair.log.take(), [MAPPED]);
    let outage = pair.target.reset().unwrap();
    assert!(outage.is_over() && outage.remapped == 1, "{outage}");
    assert_eq!(pair.log.take(), [UNMAPPED, "reset", MAPPED]);
    let asleep = pair.target.low_power().unwrap();
    assert_eq!(pair.log.take(), [UNMAPPED, "sleep"]);
    assert_eq!(pair.map().unwrap_err().kind(), ErrorKind::Revoked);
    assert!(pair.target.reset().unwrap().is_over());
    assert_eq!(pair.log.take(), ["reset"], "it sleeps");
    drop(asleep);
    assert_eq!(pair.log.take(), ["wake", MAPPED]);
    let asleep = pair.target.low_power().unwrap();
    drop(mapping);
    drop(asleep);
    assert_eq!(pair.log.take(), [UNMAPPED, "sleep", "wake"], "it is mapped no more");
    drop(pair.map().unwrap());
    assert_eq!(pair.log.take(), [MAPPED, UNMAPPED]);
}

#[test]
fn peers_of_a_revoked_window_wait_until_it_is_restored() {
    type Restore = fn(&Pair);
    let ways: [Restore; 3] = [
        |pair| assert!(pair.window.restore().is_ok()),
        |pair| drop(pair.target.bar(0).unwrap().restore().into_result().unwrap()),
        |pair| drop(pair.target.restore().into_result().unwrap()),
    ];
    for restore in ways {
        let pair = Pair::new();
        let mapping = pair.map().unwrap();
        pair.window.revoke().unwrap();
        assert_eq!(pair.log.take(), [MAPPED], "it still reaches the device");
        let outage = pair.target.reset().unwrap();
        assert_eq!(pair.log.take(), [UNMAPPED, "reset"]);
        assert!(outage.remapped == 0 && !outage.is_over(), "{outage}");
        let lost: Vec<_> = outage.lost.iter().map(Error::kind).collect();
        assert_eq!(lost, [ErrorKind::Revoked]);
        restore(&pair);
        assert_eq!(pair.log.take(), [MAPPED]);
        restore(&pair);
        assert_eq!(pair.log.take(), [""; 0]);
        drop(mapping);
        assert_eq!(pair.log.take(), [UNMAPPED]);
    }
}

#[test]
fn a_window_revoked_while_it_is_mapped_for_dma_is_unmapped() {
    let pair = Pair::new();
    let revoke = |pair: &Pair| {
        let window = pair.window.clone();
        pair.peer_transport.before_map.set(move || assert!(window.revoke().is_ok()));
    };
    revoke(&pair);
    assert_eq!(pair.map().unwrap_err().kind(), ErrorKind::Revoked);
    const OTHER: &str = "map 0xffffffff at 0x4000";
    assert_eq!(pair.log.take(), [OTHER, UNMAPPED]);
    pair.window.restore().unwrap();
    // Its address is free again.
    let mapping = pair.map().unwrap();
    assert_eq!(pair.log.take(), [MAPPED]);
    // And when it is mapped again.
    revoke(&pair);
    let outage = pair.target.reset().unwrap();
    assert_eq!(outage.lost[0].kind(), ErrorKind::Revoked, "{outage}");
    assert_eq!(pair.log.take(), [UNMAPPED, "reset", OTHER, UNMAPPED]);
    pair.window.restore().unwrap();
    assert_eq!(pair.log.take(), [MAPPED]);
    drop(mapping);
    assert_eq!(pair.log.take(), [UNMAPPED]);
}

/// Gives the other thread time to do what it must not do yet.
const WHILE: Duration = Duration::from_millis(200);

#[test]
fn a_reset_waits_for_a_peer_that_is_being_unmapped() {
    let pair = Pair::new();
    let mapping = pair.map().unwrap();
    let (send, done) = channel();
    let target = pair.target.clone();
    pair.peer_transport.unmapping.set(move || {
        let (sent, reset) = channel();
        let thread = std::thread::spawn(move || {
            let outage = target.reset();
            let _ = sent.send(());
            outage
        });
        let _ = reset.recv_timeout(WHILE);
        send.send(thread).unwrap();
    });
    drop(mapping);
    assert!(done.recv().unwrap().join().unwrap().unwrap().is_over());
    assert_eq!(pair.log.take(), [MAPPED, UNMAPPED, "reset"]);
}

#[test]
fn a_reset_waits_for_a_hot_reset_of_the_same_device() {
    let (one, other) = (Pair::new(), Pair::new());
    let (send, done) = channel();
    let (target, log) = (other.target.clone(), one.log.clone());
    let window = other.window.clone();
    one.target_transport.during.set(move || {
        let (sent, reset) = channel();
        let thread = std::thread::spawn(move || {
            let outage = target.reset();
            log.add("reset");
            let _ = sent.send(());
            outage
        });
        let _ = reset.recv_timeout(WHILE);
        assert_eq!(window.revoked(), Some(Revoked::Reset), "a reset is going on");
        send.send(thread).unwrap();
    });
    // Each counts once, however often it is named.
    let outage = one.target.hot_reset(&[&other.target, &one.target, &other.target]).unwrap();
    assert!(outage.is_over() && outage.restored.changed() == 2, "{outage}");
    assert!(done.recv().unwrap().join().unwrap().unwrap().is_over());
    assert_eq!(one.log.take(), ["hot reset", "reset"]);
    assert!(!one.window.is_revoked() && !other.window.is_revoked());
}

#[test]
fn decoding_that_was_off_stays_off_when_a_call_fails() {
    let pair = Pair::new();
    let config = pair.target.config().unwrap();
    let refuses = |refuses| *pair.target_transport.refuses.lock().unwrap() = refuses;
    refuses(true);
    config.set_memory_decoding(false).unwrap_err();
    assert!(!pair.window.is_revoked(), "it is as before");
    refuses(false);
    config.set_memory_decoding(false).unwrap();
    refuses(true);
    config.set_memory_decoding(false).unwrap_err();
    assert_eq!(pair.window.revoked(), Some(Revoked::DecodingOff));
    refuses(false);
    config.set_memory_decoding(true).unwrap();
    assert!(!pair.window.is_revoked());
}

#[test]
fn peers_are_unmapped_while_a_write_resets_their_target() {
    let pair = Pair::new();
    let mapping = pair.map().unwrap();
    let (at, reset) = FUNCTION_RESET;
    pair.target.config().unwrap().write(at, &reset).unwrap();
    assert_eq!(pair.log.take(), [MAPPED, UNMAPPED, "reset", MAPPED]);
    drop(mapping);
}

/// iommufd has an empty mapping by then.
#[test]
fn a_peer_that_could_not_be_unmapped_is_mapped_again() {
    let pair = Pair::new();
    let mapping = pair.map().unwrap();
    let keeps = |times| *pair.peer_transport.keeps.lock().unwrap() = times;
    keeps(1);
    let outage = pair.target.reset().unwrap();
    assert_eq!(pair.log.take(), [MAPPED, KEPT, "reset", UNMAPPED, MAPPED]);
    assert_eq!((outage.remapped, outage.lost.len()), (1, 1), "{outage}");
    type Retry = fn(&Pair);
    let ways: [(Retry, &[&str]); 2] = [
        (|pair| drop(pair.target.restore().into_result().unwrap()), &[UNMAPPED, MAPPED]),
        (|pair| drop(pair.target.reset().unwrap()), &[UNMAPPED, "reset", MAPPED]),
    ];
    for (retry, expected) in ways {
        keeps(2);
        let outage = pair.target.reset().unwrap();
        assert_eq!(pair.log.take(), [KEPT, "reset", KEPT]);
        assert_eq!((outage.remapped, outage.lost.len()), (0, 2), "{outage}");
        retry(&pair);
        assert_eq!(pair.log.take(), expected);
    }
    keeps(2);
    assert!(!pair.target.reset().unwrap().is_over());
    pair.log.take();
    drop(mapping);
    assert_eq!(pair.log.take(), [UNMAPPED]);
}
