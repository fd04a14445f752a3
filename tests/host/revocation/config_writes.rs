//! Writes to configuration space that take the device away, and bring it back.

use std::sync::{Arc, Mutex, PoisonError};

use vfio_remap::device::Revoked;
use vfio_remap::transport::{DeviceInfo, RegionFile, RegionInfo, Transport, region_index};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Window};

use super::truncatable::{Truncatable, aliases};

const COMMAND: u64 = 4;
const MEMORY: u8 = 2;
const BUS_MASTER: u8 = 4;
/// The control and status register of power management.
const POWER: u64 = 0x54;
const D3_HOT: u8 = 3;

/// A PCI device that notes whether a window was revoked when configuration space was written.
#[derive(Debug)]
struct Configured {
    memory: Truncatable,
    config: Mutex<[u8; 256]>,
    behaviour: Mutex<Behaviour>,
    watched: Mutex<Option<Window>>,
    /// For each write, whether the watched window was revoked.
    was_revoked: Mutex<Vec<bool>>,
}

/// What a write to configuration space does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Behaviour {
    Works,
    Fails,
    Ignored,
}

impl Configured {
    fn is_watched_revoked(&self) -> bool {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.as_ref().is_some_and(Window::is_revoked)
    }
}

impl Transport for Configured {
    fn info(&self) -> DeviceInfo {
        let mut info = DeviceInfo::new("configured", 8);
        (info.pci, info.resettable) = (true, true);
        info
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        match index {
            region_index::CONFIG => Ok(RegionInfo::trapped(256)),
            _ => self.memory.region(index),
        }
    }

    fn read_at(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        data.copy_from_slice(&self.config.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_at(&self, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.was_revoked.lock().unwrap().push(self.is_watched_revoked());
        match *self.behaviour.lock().unwrap() {
            Behaviour::Works => {
                let mut config = self.config.lock().unwrap();
                config[offset as usize..][..data.len()].copy_from_slice(data);
                Ok(())
            }
            Behaviour::Fails => Err(Error::new(ErrorKind::Refused, "write", "it")),
            Behaviour::Ignored => Ok(()),
        }
    }

    fn backing(&self, index: u32) -> Result<RegionFile> {
        self.memory.backing(index)
    }

    /// To D0.
    fn reset(&self) -> Result<()> {
        self.config.lock().unwrap()[POWER as usize] = 0;
        Ok(())
    }
}

/// A device that decodes memory and is awake, and aliases over its BAR.
struct Scene {
    transport: Arc<Configured>,
    device: Device,
    windows: [Window; 3],
}

impl Scene {
    fn new() -> Self {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
        config[COMMAND as usize] = MEMORY;
        // A list of two capabilities: a vendor's, then power management.
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x43].copy_from_slice(&[9, 0x50, 16]);
        config[0x50..0x52].copy_from_slice(&[1, 0]);
        let transport = Arc::new(Configured {
            memory: Truncatable::new(),
            config: Mutex::new(config),
            behaviour: Mutex::new(Behaviour::Works),
            watched: Mutex::default(),
            was_revoked: Mutex::default(),
        });
        let device = Device::new(transport.clone());
        let windows = aliases(&device, 0);
        windows[0].register::<u32>(8).unwrap().write(6);
        *transport.watched.lock().unwrap() = Some(windows[1].clone());
        Self { transport, device, windows }
    }

    fn behaves(&self, behaviour: Behaviour) {
        *self.transport.behaviour.lock().unwrap() = behaviour;
    }

    /// Whether the window was revoked at each write since the last call.
    fn at_writes(&self) -> Vec<bool> {
        std::mem::take(&mut *self.transport.was_revoked.lock().unwrap())
    }

    #[track_caller]
    fn are_revoked(&self, why: Option<Revoked>) {
        let value = if why.is_some() { u32::MAX } else { 6 };
        for window in &self.windows {
            assert_eq!(window.revoked(), why);
            assert_eq!(window.register::<u32>(8).unwrap().read(), value);
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // The window holds the device, which holds the transport.
        *self.transport.watched.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[test]
fn a_write_that_ends_decoding_revokes_before_it_is_made() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    let of = |low: u8| [low, 0, 0x10, 0];
    let whole = |low: u8| {
        let mut bytes = *scene.transport.config.lock().unwrap();
        bytes[COMMAND as usize] = low;
        bytes
    };
    let region = scene.device.region(region_index::CONFIG).unwrap();
    type Write<'a> = &'a dyn Fn(u8) -> Result<()>;
    let ways: [Write<'_>; 5] = [
        &|low| config.write_u8(COMMAND, low),
        &|low| config.write_u16(COMMAND, low.into()),
        &|low| config.write_u32(COMMAND, u32::from_le_bytes(of(low))),
        &|low| config.write(0, &whole(low)),
        &|low| region.write_at(COMMAND, &of(low)),
    ];
    for write in ways {
        write(BUS_MASTER).unwrap();
        assert_eq!(scene.at_writes(), [true]);
        scene.are_revoked(Some(Revoked::DecodingOff));
        let error = scene.windows[0].restore().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Revoked, "{error}");
        // It stays so, and new windows are, too.
        write(0).unwrap();
        let late = scene.device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        assert_eq!(late.revoked(), Some(Revoked::DecodingOff));
        write(MEMORY).unwrap();
        assert_eq!(scene.at_writes(), [true, true], "restored before it decodes");
        scene.are_revoked(None);
        assert!(!late.is_revoked());
    }
}

#[test]
fn a_write_that_leaves_d0_revokes_before_it_is_made() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    for state in 1..=D3_HOT {
        config.write_u16(POWER, state.into()).unwrap();
        assert_eq!(scene.at_writes(), [true]);
        scene.are_revoked(Some(Revoked::LowPower));
        config.write_u8(POWER, 0).unwrap();
        assert_eq!(scene.at_writes(), [true]);
        scene.are_revoked(None);
    }
    // A reset ends it, too.
    config.write_u32(POWER, D3_HOT.into()).unwrap();
    scene.are_revoked(Some(Revoked::LowPower));
    let outage = scene.device.reset().unwrap();
    assert!(outage.is_over() && outage.restored.changed() == 3, "{outage}");
    scene.are_revoked(None);
    // Both must end.
    config.write_u8(POWER, D3_HOT).unwrap();
    config.write_u8(COMMAND, 0).unwrap();
    config.write_u8(POWER, 0).unwrap();
    scene.are_revoked(Some(Revoked::DecodingOff));
    config.set_memory_decoding(true).unwrap();
    scene.are_revoked(None);
}

#[test]
fn a_write_that_changes_nothing_leaves_the_windows() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    for behaviour in [Behaviour::Fails, Behaviour::Ignored] {
        for at in [COMMAND, POWER] {
            let value = if at == COMMAND { 0 } else { D3_HOT };
            scene.behaves(behaviour);
            assert_eq!(config.write_u8(at, value).is_err(), behaviour == Behaviour::Fails);
            assert_eq!(scene.at_writes(), [true], "it might have worked");
            scene.are_revoked(None);
            // What is away stays away.
            scene.behaves(Behaviour::Works);
            config.write_u8(at, value).unwrap();
            scene.behaves(behaviour);
            let _ = config.write_u8(at, MEMORY & !value);
            assert!(scene.windows.iter().all(Window::is_revoked), "{behaviour:?}");
            scene.behaves(Behaviour::Works);
            config.write_u8(at, if at == COMMAND { MEMORY } else { 0 }).unwrap();
            scene.are_revoked(None);
            scene.at_writes();
        }
    }
    // Neither writes to other registers, nor a command that leaves decoding as it is.
    for at in [0x3c, 0x46, POWER - 2, POWER + 1] {
        config.write_u8(at, 0).unwrap();
    }
    config.write_u8(COMMAND, MEMORY | BUS_MASTER).unwrap();
    config.set_bus_mastering(false).unwrap();
    assert_eq!(scene.at_writes(), [false; 6]);
    scene.are_revoked(None);
    // Decoding that was off, as that of a device behind a server may be, is no outage.
    scene.transport.config.lock().unwrap()[COMMAND as usize] = 0;
    config.write_u8(COMMAND, BUS_MASTER).unwrap();
    config.set_bus_mastering(false).unwrap();
    scene.are_revoked(None);
}
