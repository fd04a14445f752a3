//! A processor of the guest: its state at the start, and the thread that runs it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs,
    kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::{GDT, PAGE_TABLES, ZERO_PAGE};
use crate::machine::{ADVICE, Machine};
use crate::platform::{Platform, RESET};

/// Bits of control registers, EFER and RFLAGS (AMD64 Architecture Programmer's Manual, volume 2, §3.1).
const CR0_PROTECTION_AND_PAGING: u64 = 1 << 0 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const RFLAGS_ALWAYS: u64 = 1 << 1;
const RFLAGS_INTERRUPTS: u64 = 1 << 9;
/// The register for the type of memory that no other register describes: enabled, write-back.
const MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// What KVM does not list among the features of leaf 1 that it offers: that it is there, with its clock, and a timer
/// that needs no calibration.
const HYPERVISOR_AND_DEADLINE_TIMER: u32 = 1 << 31 | 1 << 24;
/// `KVM_FEATURE_PV_EOI` (`asm/kvm_para.h`): the guest ends an interrupt without an exit. It is not offered, because QEMU
/// may deliver an interrupt twice until the next exit: see docs/vmm.md.
const PV_EOI: u32 = 1 << 6;
/// How long a processor pauses before it repeats an access to a device that does not respond.
const PAUSE: Duration = Duration::from_millis(1);

/// Such an access is reported once.
static FAULT: Once = Once::new();

/// A running processor.
pub struct Processor {
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Set if nothing could wake it when it was interrupted.
    asleep: AtomicBool,
}

impl Processor {
    /// Makes processor `number` of `count`, and starts it. Without an entry it waits until another wakes it.
    pub fn start(
        machine: &Machine,
        platform: &Arc<Platform>,
        (number, count): (u8, u8),
        entry: Option<u64>,
    ) -> Result<Self> {
        let name = format!("processor {number}");
        let mut cpu = machine.processor(number).with_context(|| format!("cannot make {name}"))?;
        prepare(machine, &cpu, (number, count), entry)
            .with_context(|| format!("cannot set up {name}"))?;
        let shared = Arc::new(Shared::default());
        let (ours, platform) = (shared.clone(), platform.clone());
        let thread = thread::Builder::new().name(name).spawn(move || {
            if let Some(end) = run(&mut cpu, &platform, &ours).transpose() {
                platform.end(end);
            }
        })?;
        Ok(Self { thread, shared })
    }

    /// Whether nothing could wake it when it was last [interrupted](Self::interrupt): it had halted with interrupts
    /// disabled, was never started, or has ended.
    pub fn was_asleep(&self) -> bool {
        self.shared.asleep.swap(false, Ordering::Relaxed) || self.thread.is_finished()
    }

    /// Makes it leave the guest for a moment.
    pub fn interrupt(&self) {
        // It fails only for a thread that has ended.
        let _ = self.thread.kill(SIGRTMIN());
    }

    /// Stops it, and waits until it has left the guest.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A signal that comes just before the processor enters the guest has no effect, so it is repeated.
        while !self.thread.is_finished() {
            self.interrupt();
            thread::sleep(PAUSE);
        }
        let _ = self.thread.join();
    }
}

/// Makes the signal that interrupts processors do nothing else. Call it before any is started.
pub fn handle_interruptions() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).context("cannot handle a signal")
}

/// Runs it until it is stopped, or ends the guest: then it returns the reason.
fn run(cpu: &mut VcpuFd, platform: &Platform, shared: &Shared) -> Result<Option<&'static str>> {
    let mut failed = false;
    while !shared.stop.load(Ordering::Relaxed) {
        let failed_before = std::mem::take(&mut failed);
        match cpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => platform.read_port(port, data),
            Ok(VcpuExit::IoOut(port, data)) => platform.write_port(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => platform.pci().read_memory(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => platform.pci().write_memory(address, data),
            Ok(VcpuExit::Shutdown) => return Ok(Some(RESET)),
            // The same as EFAULT: a kernel may say more.
            Ok(VcpuExit::MemoryFault { .. }) => repeat(),
            // Nothing has happened if KVM takes an access that it emulates for one in the delivery of an event: it
            // does since Linux 6.14, if the processor leaves the type of an earlier event in EXITINTINFO, as QEMU's.
            Ok(VcpuExit::InternalError) if !failed_before => failed = true,
            Ok(other) => bail!("the guest does not run: {other:?}; {ADVICE}"),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    shared.asleep.store(is_asleep(cpu), Ordering::Relaxed)
                }
                libc::EFAULT => repeat(),
                _ => bail!("the guest does not run: {error}; {ADVICE}"),
            },
        }
    }
    Ok(None)
}

/// Pauses, because a window does not reach its device: something else has disabled the device's memory decoding, or
/// the device is being removed. The guest repeats its access until the device responds again, or is taken away.
fn repeat() {
    FAULT.call_once(|| eprintln!("vmm: a device does not respond; accesses are repeated"));
    thread::sleep(PAUSE);
}

/// Whether nothing can wake it but a reset or an NMI, which nobody sends.
fn is_asleep(cpu: &VcpuFd) -> bool {
    match cpu.get_mp_state().map(|state| state.mp_state) {
        Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => true,
        Ok(KVM_MP_STATE_HALTED) => {
            cpu.get_regs().is_ok_and(|registers| registers.rflags & RFLAGS_INTERRUPTS == 0)
        }
        _ => false,
    }
}

fn prepare(
    machine: &Machine,
    cpu: &VcpuFd,
    (number, count): (u8, u8),
    entry: Option<u64>,
) -> Result<()> {
    let mut cpuid = machine.cpuid.clone();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => {
                // The number of this processor, and how many there are.
                leaf.ebx = leaf.ebx & 0xffff | u32::from(count) << 16 | u32::from(number) << 24;
                leaf.ecx |= HYPERVISOR_AND_DEADLINE_TIMER;
            }
            0x4000_0001 => leaf.eax &= !PV_EOI,
            0xb | 0x1f => leaf.edx = number.into(),
            0x8000_001e => leaf.eax = number.into(),
            _ => {}
        }
    }
    cpu.set_cpuid2(&cpuid)?;
    let (index, data) = MTRR_DEFAULT;
    let entries = [kvm_msr_entry { index, data, ..Default::default() }];
    cpu.set_msrs(&Msrs::from_entries(&entries)?)?;
    let Some(rip) = entry else { return Ok(()) };
    let segment = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    let data = segment(0x18, 3);
    let mut system = cpu.get_sregs()?;
    system.cs = kvm_segment { l: 1, db: 0, ..segment(0x10, 0xb) };
    (system.ds, system.es, system.ss) = (data, data, data);
    // A task state segment that is in use.
    system.tr = kvm_segment { s: 0, g: 0, db: 0, limit: 0x67, ..segment(0, 0xb) };
    (system.gdt.base, system.gdt.limit) = (GDT, 0x1f);
    (system.cr0, system.cr3) = (CR0_PROTECTION_AND_PAGING, PAGE_TABLES);
    (system.cr4, system.efer) = (CR4_PAE, EFER_LONG_MODE);
    cpu.set_sregs(&system)?;
    let (rsi, rflags) = (ZERO_PAGE, RFLAGS_ALWAYS);
    Ok(cpu.set_regs(&kvm_regs { rip, rsi, rflags, ..Default::default() })?)
}
