//! The virtual machine, as KVM has it: memory slots and interrupts.

#![expect(
    unsafe_code,
    reason = "KVM takes memory by address, and its crate takes only its own eventfds"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vfio_remap::passthrough::{Message, SlotMemory};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_val;

use crate::memory::GuestMemory;

/// Where Intel's processors need three pages and one page of the guest's addresses, which nothing else uses.
const TASK_STATE: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
/// The interrupts (GSIs) of the IOAPIC's pins. Those of messages follow.
const PINS: u32 = 24;
/// The request KVM_SET_TSC_KHZ of a machine (Linux, Documentation/virt/kvm/api.rst §4.55).
const SET_TSC_KHZ: u64 = 0xaea2;
/// The slot of the guest's memory. Those of devices follow.
const MEMORY_SLOT: u32 = 0;

/// What to do about a KVM that does not work.
pub const ADVICE: &str = "load kvm_intel or kvm_amd, inside a virtual machine with nested virtualization; \
                          `cargo lab vmm` does that in an emulated machine";

/// A virtual machine without its processors. Fields are dropped in order: the machine before the guest's memory.
pub struct Machine {
    vm: VmFd,
    pub cpuid: CpuId,
    /// The memory slots of devices.
    slots: Mutex<BTreeSet<u32>>,
    /// The message of each GSI past the pins.
    messages: Mutex<BTreeMap<u32, Message>>,
    pub memory: GuestMemory,
}

/// An eventfd that raises an interrupt of the guest.
pub struct Interrupt {
    eventfd: EventFd,
    pub gsi: u32,
}

impl Machine {
    /// Makes one with this memory.
    pub fn new(memory: GuestMemory) -> Result<Self> {
        let kvm = Kvm::new().with_context(|| format!("cannot open /dev/kvm; {ADVICE}"))?;
        for cap in [Cap::IrqfdResample, Cap::IrqRouting, Cap::Pit2, Cap::TscDeadlineTimer] {
            ensure!(kvm.check_extension(cap), "this KVM does not offer {cap:?}; {ADVICE}");
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let vm = kvm.create_vm().with_context(|| format!("cannot create a machine; {ADVICE}"))?;
        // Its processors get the host's rate of the TSC. By default it is the one at KVM's own start: if KVM is built
        // into the kernel, before that has refined its measurement. If the two differ by more than 250 ppm, and the
        // processor cannot scale, KVM creates a processor with the factor 0 (Linux 6.12, arch/x86/kvm/x86.c,
        // kvm_set_tsc_khz): for KVM the guest's TSC stands still, and timers do not fire. Since Linux 5.16.
        // SAFETY: the kernel takes 0, the host's rate, as a number and not as an address.
        let _ = unsafe { ioctl_with_val(&vm, SET_TSC_KHZ, 0) };
        vm.set_identity_map_address(IDENTITY_MAP)
            .and_then(|()| vm.set_tss_address(TASK_STATE))
            .and_then(|()| vm.create_irq_chip())
            .context("cannot create interrupt controllers")?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(timer).context("cannot create a timer")?;
        let (slots, messages) = Default::default();
        let machine = Self { vm, cpuid, slots, messages, memory };
        let region = kvm_userspace_memory_region {
            slot: MEMORY_SLOT,
            guest_phys_addr: 0,
            memory_size: machine.memory.last_addr().0 + 1,
            userspace_addr: machine.memory.get_host_address(GuestAddress(0))? as u64,
            flags: 0,
        };
        // SAFETY: the region is the guest's memory, which `vm-memory` has mapped as one range. This machine keeps
        // it mapped longer than `vm`, and whoever runs a processor holds this machine. Nothing makes references to it.
        unsafe { machine.vm.set_user_memory_region(region) }
            .context("cannot add a slot for the guest's memory")?;
        Ok(machine)
    }

    /// Makes a processor. Whoever runs it holds the machine.
    pub fn processor(&self, number: u8) -> Result<VcpuFd> {
        Ok(self.vm.create_vcpu(number.into())?)
    }

    /// Has the guest reach a part of a device's window. Returns the number of the slot.
    pub fn add_slot(&self, memory: &SlotMemory) -> Result<u32> {
        let mut slots = lock(&self.slots);
        let slot =
            (MEMORY_SLOT + 1..).find(|slot| !slots.contains(slot)).context("no slot left")?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: memory.guest,
            memory_size: memory.size as u64,
            userspace_addr: memory.host as u64,
            flags: if memory.read_only { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the region is the window of a span. `GuestDevice::add_slot` has called this, and keeps the window
        // at its address until `remove_slot` has succeeded, or for ever. There are no references to device memory.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("cannot add a memory slot at {:#x}", memory.guest))?;
        slots.insert(slot);
        Ok(slot)
    }

    /// Removes a slot. The guest does not reach its memory any more when this returns.
    pub fn remove_slot(&self, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region { slot, ..Default::default() };
        // SAFETY: a size of 0 removes the slot: KVM uses no memory for it any more.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("cannot remove memory slot {slot}"))?;
        lock(&self.slots).remove(&slot);
        Ok(())
    }

    /// Has an eventfd send a message.
    pub fn connect_message(&self, eventfd: BorrowedFd<'_>, message: Message) -> Result<Interrupt> {
        let gsi = {
            let mut messages = lock(&self.messages);
            let gsi = (PINS..).find(|gsi| !messages.contains_key(gsi)).context("no GSI left")?;
            messages.insert(gsi, message);
            gsi
        };
        let connected = self.route().and_then(|()| self.connect_pin(eventfd, None, gsi));
        if connected.is_err() {
            lock(&self.messages).remove(&gsi);
        }
        connected
    }

    /// Changes the message that an eventfd sends.
    pub fn change_message(&self, gsi: u32, message: Message) -> Result<()> {
        lock(&self.messages).insert(gsi, message);
        self.route()
    }

    /// Has an eventfd raise a GSI. With `resample`, it is a level, and KVM signals that eventfd when the guest has
    /// handled the interrupt.
    pub fn connect_pin(
        &self,
        eventfd: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
        gsi: u32,
    ) -> Result<Interrupt> {
        let interrupt = Interrupt { eventfd: own(eventfd)?, gsi };
        match resample {
            Some(resample) => {
                self.vm.register_irqfd_with_resample(&interrupt.eventfd, &own(resample)?, gsi)
            }
            None => self.vm.register_irqfd(&interrupt.eventfd, gsi),
        }
        .with_context(|| format!("cannot connect interrupt {gsi}"))?;
        Ok(interrupt)
    }

    /// Ends what [`connect_message`](Self::connect_message) or [`connect_pin`](Self::connect_pin) has begun, if anything.
    pub fn disconnect(&self, interrupt: Option<Interrupt>) -> Result<()> {
        let Some(Interrupt { eventfd, gsi }) = interrupt else { return Ok(()) };
        self.vm
            .unregister_irqfd(&eventfd, gsi)
            .with_context(|| format!("cannot disconnect interrupt {gsi}"))?;
        lock(&self.messages).remove(&gsi);
        Ok(())
    }

    /// Gives KVM all routes: those of the pins, and of messages.
    fn route(&self) -> Result<()> {
        let messages = lock(&self.messages);
        let gsis = (0..PINS).chain(messages.keys().copied());
        let routes: Vec<_> = gsis.map(|gsi| entry(gsi, messages.get(&gsi))).collect();
        let table = KvmIrqRouting::from_entries(&routes).ok().context("too many interrupts")?;
        self.vm.set_gsi_routing(&table).context("cannot route interrupts")
    }
}

/// Locks, even if a thread has panicked meanwhile.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The route of a GSI: to a message, or to the IOAPIC's pin of the same number.
fn entry(gsi: u32, message: Option<&Message>) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi };
    if let Some(Message { address, data }) = message {
        let (address_lo, address_hi) = (*address as u32, (address >> 32) as u32);
        entry.type_ = KVM_IRQ_ROUTING_MSI;
        entry.u.msi =
            kvm_irq_routing_msi { address_lo, address_hi, data: *data, ..Default::default() };
    }
    entry
}

/// The eventfd as the type that kvm-ioctls takes.
fn own(eventfd: BorrowedFd<'_>) -> Result<EventFd> {
    let own = eventfd.try_clone_to_owned().context("cannot duplicate an eventfd")?;
    // SAFETY: `own` is a descriptor of its own, and gives it up.
    Ok(unsafe { EventFd::from_raw_fd(own.into_raw_fd()) })
}
