//! Writes to configuration space that take the device away, and bring it back.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use vfio_remap::device::Revoked;
use vfio_remap::transport::{DeviceInfo, RegionFile, RegionInfo, Transport, region_index};
use vfio_remap::{Device, Error, ErrorKind, Placement, Result, Window};

use super::truncatable::{PAGE, SIZE, Truncatable, aliases};
use crate::support::alone::alone;

const COMMAND: u64 = 4;
const MEMORY: u8 = 2;
const BUS_MASTER: u8 = 4;
/// The control and status register of power management.
const POWER: u64 = 0x54;
const D3_HOT: u8 = 3;
/// The registers that begin a function level reset, and the bits that do: of PCI Express, and of advanced features.
const DEVICE_CONTROL: u64 = 0x68;
const EXPRESS_RESET: u16 = 1 << 15;
const ADVANCED_CONTROL: u64 = 0xa4;
const ADVANCED_RESET: u8 = 1;

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
    /// It works, and nothing can be read.
    Unreadable,
    /// It works, and low power ends in the state in which it began.
    KeepsState,
}

impl Configured {
    fn is_watched_revoked(&self) -> bool {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched.as_ref().is_some_and(Window::is_revoked)
    }

    fn behaviour(&self) -> Behaviour {
        *self.behaviour.lock().unwrap()
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
        if self.behaviour() == Behaviour::Unreadable {
            return Err(Error::new(ErrorKind::Refused, "read", "it"));
        }
        data.copy_from_slice(&self.config.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn write_at(&self, _: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.was_revoked.lock().unwrap().push(self.is_watched_revoked());
        match self.behaviour() {
            Behaviour::Fails => Err(Error::new(ErrorKind::Refused, "write", "it")),
            Behaviour::Ignored => Ok(()),
            _ => {
                let mut config = self.config.lock().unwrap();
                config[offset as usize..][..data.len()].copy_from_slice(data);
                let resets = [
                    (DEVICE_CONTROL as usize + 1, (EXPRESS_RESET >> 8) as u8),
                    (ADVANCED_CONTROL as usize, ADVANCED_RESET),
                ];
                for (at, bit) in resets {
                    if config[at] & bit != 0 {
                        config[at] &= !bit;
                        config[POWER as usize] = 0;
                    }
                }
                Ok(())
            }
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

    /// Whoever waits for a wake-up has it at once.
    fn enter_low_power(&self, wakeup: Option<BorrowedFd<'_>>) -> Result<()> {
        if let Some(wakeup) = wakeup {
            self.exit_low_power()?;
            nix::unistd::write(wakeup, &1u64.to_ne_bytes()).unwrap();
        }
        Ok(())
    }

    /// To D0, as vfio-pci does before it suspends a device.
    fn exit_low_power(&self) -> Result<()> {
        if self.behaviour() != Behaviour::KeepsState {
            self.config.lock().unwrap()[POWER as usize] = 0;
        }
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
        Self::with_bars_of(SIZE)
    }

    fn with_bars_of(size: usize) -> Self {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
        config[COMMAND as usize] = MEMORY;
        // A list of capabilities: a vendor's, power management, PCI Express, advanced features.
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x43].copy_from_slice(&[9, 0x50, 16]);
        config[0x50..0x52].copy_from_slice(&[1, 0x60]);
        config[0x60..0x62].copy_from_slice(&[0x10, 0xa0]);
        config[0xa0..0xa3].copy_from_slice(&[0x13, 0, 6]);
        let transport = Arc::new(Configured {
            memory: Truncatable::of_size(size),
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
    let command = region.trapped_register::<u16>(COMMAND).unwrap();
    let ways: [Write<'_>; 6] = [
        &|low| config.write_u8(COMMAND, low),
        &|low| config.write_u16(COMMAND, low.into()),
        &|low| config.write_u32(COMMAND, u32::from_le_bytes(of(low))),
        &|low| config.write(0, &whole(low)),
        &|low| region.write_at(COMMAND, &of(low)),
        &|low| command.write(low.into()),
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

#[test]
fn a_write_that_resets_the_function_is_an_outage() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    type Write<'a> = &'a dyn Fn() -> Result<()>;
    let ways: [Write<'_>; 4] = [
        &|| config.write_u16(DEVICE_CONTROL, EXPRESS_RESET | 0x10),
        &|| config.write_u8(DEVICE_CONTROL + 1, (EXPRESS_RESET >> 8) as u8),
        &|| config.write_u32(DEVICE_CONTROL, EXPRESS_RESET.into()),
        &|| config.write_u8(ADVANCED_CONTROL, ADVANCED_RESET),
    ];
    for reset in ways {
        reset().unwrap();
        assert_eq!(scene.at_writes(), [true]);
        scene.are_revoked(None);
        // It ends in D0.
        config.write_u8(POWER, D3_HOT).unwrap();
        scene.are_revoked(Some(Revoked::LowPower));
        reset().unwrap();
        scene.are_revoked(None);
        // What else revokes the windows stays.
        config.write_u8(COMMAND, 0).unwrap();
        reset().unwrap();
        scene.are_revoked(Some(Revoked::DecodingOff));
        config.write_u8(COMMAND, MEMORY).unwrap();
        for behaviour in [Behaviour::Fails, Behaviour::Ignored] {
            scene.behaves(behaviour);
            assert_eq!(reset().is_err(), behaviour == Behaviour::Fails);
            scene.are_revoked(None);
        }
        scene.behaves(Behaviour::Works);
        scene.at_writes();
    }
    // The other bits reset nothing.
    config.write_u16(DEVICE_CONTROL, !EXPRESS_RESET).unwrap();
    config.write_u8(ADVANCED_CONTROL, !ADVANCED_RESET).unwrap();
    config.write_u8(ADVANCED_CONTROL + 1, 0xff).unwrap();
    assert_eq!(scene.at_writes(), [false; 3]);
}

#[test]
fn a_device_that_low_power_has_woken_has_its_windows() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    let sleep = || {
        config.write_u8(POWER, D3_HOT).unwrap();
        scene.device.low_power().unwrap()
    };
    drop(sleep());
    scene.are_revoked(None);
    sleep().wake().unwrap();
    scene.are_revoked(None);
    config.write_u8(POWER, D3_HOT).unwrap();
    let asleep = scene.device.low_power_until_woken().unwrap();
    scene.are_revoked(Some(Revoked::LowPower));
    asleep.woken(Duration::from_secs(60)).unwrap();
    scene.are_revoked(None);
    drop(asleep);
    // One that is not awake has none.
    scene.behaves(Behaviour::KeepsState);
    drop(sleep());
    scene.are_revoked(Some(Revoked::LowPower));
    config.write_u8(POWER, 0).unwrap();
    scene.are_revoked(None);
}

/// Runs `f` while this process may have no more data than it has, and a megabyte.
fn without_memory<T>(f: impl FnOnce() -> T) -> T {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let data: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_DATA).unwrap();
    setrlimit(Resource::RLIMIT_DATA, (data << 10) + (1 << 20), hard).unwrap();
    let result = f();
    setrlimit(Resource::RLIMIT_DATA, soft, hard).unwrap();
    result
}

#[test]
fn nothing_is_written_if_a_window_cannot_be_revoked() {
    alone(|| {
        let scene = Scene::with_bars_of(4 << 20);
        let config = scene.device.config().unwrap();
        let small = scene.device.bar(0).unwrap().map(..PAGE as u64, Placement::Anywhere).unwrap();
        type Write<'a> = &'a dyn Fn() -> Result<()>;
        let ways: [Write<'_>; 5] = [
            &|| config.write_u8(COMMAND, 0),
            &|| config.write_u8(POWER, D3_HOT),
            &|| config.write_u16(DEVICE_CONTROL, EXPRESS_RESET),
            &|| config.set_memory_decoding(false),
            &|| scene.device.region(region_index::CONFIG).unwrap().write_at(COMMAND, &[0]),
        ];
        for write in ways {
            let error = without_memory(write).unwrap_err();
            assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
            assert_eq!(scene.at_writes(), [false; 0]);
            scene.are_revoked(None);
            assert!(!small.is_revoked());
        }
        // New windows are not revoked either.
        let late = scene.device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        assert!(!late.is_revoked());
        config.write_u8(COMMAND, 0).unwrap();
        scene.are_revoked(Some(Revoked::DecodingOff));
    });
}

#[test]
fn a_sealed_window_prevents_no_write() {
    alone(|| {
        let scene = Scene::new();
        let config = scene.device.config().unwrap();
        let window = scene.device.bar(0).unwrap().map(.., Placement::Anywhere).unwrap();
        if let Err(failed) = window.seal() {
            // A kernel without mseal.
            assert_eq!(failed.kind(), ErrorKind::Unsupported, "{failed}");
            return;
        }
        config.write_u8(COMMAND, 0).unwrap();
        scene.are_revoked(Some(Revoked::DecodingOff));
        config.set_memory_decoding(true).unwrap();
        config.write_u16(DEVICE_CONTROL, EXPRESS_RESET).unwrap();
        scene.are_revoked(None);
    });
}

#[test]
fn a_write_says_that_a_window_could_not_be_restored() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    let file = scene.transport.memory.file(0);
    let asleep = || scene.device.low_power().unwrap();
    type Ends<'a> = &'a dyn Fn() -> Result<()>;
    let ways: [(Ends<'_>, Ends<'_>); 4] = [
        (&|| config.write_u8(COMMAND, 0), &|| config.write_u8(COMMAND, MEMORY)),
        (&|| config.set_memory_decoding(false), &|| config.set_memory_decoding(true)),
        (&|| config.write_u8(POWER, D3_HOT), &|| config.write_u8(POWER, 0)),
        (&|| Ok(()), &|| asleep().wake()),
    ];
    for (begin, end) in ways {
        begin().unwrap();
        file.set_len(0).unwrap();
        let error = end().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
        assert!(config.memory_decoding().unwrap(), "it is written");
        assert!(scene.windows.iter().all(Window::is_revoked));
        file.set_len(SIZE as u64).unwrap();
        scene.device.restore().into_result().unwrap();
        assert!(!scene.windows.iter().any(Window::is_revoked));
    }
}

#[test]
fn a_write_whose_effect_cannot_be_read_restores_nothing() {
    let scene = Scene::new();
    let config = scene.device.config().unwrap();
    // It has found the registers.
    config.write_u8(POWER, 0).unwrap();
    for (at, off, on) in [(COMMAND, 0, MEMORY), (POWER, D3_HOT, 0)] {
        scene.behaves(Behaviour::Unreadable);
        config.write_u8(at, off).unwrap();
        assert!(scene.windows.iter().all(Window::is_revoked));
        let error = config.write_u8(at, on).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(scene.windows.iter().all(Window::is_revoked));
        scene.behaves(Behaviour::Works);
        config.write_u8(at, on).unwrap();
        scene.are_revoked(None);
    }
}
