//! The mutations: each removes a check, a protection or a clean-up that safety depends on.

use super::{Killer, Mutant};

use Killer::{Guest, Host};

pub static MUTANTS: &[Mutant] = &[
    // Bounds.
    Mutant {
        name: "registers-bound",
        file: "src/device/register.rs",
        before: "assert!(index < count,",
        after: "assert!(index < usize::MAX,",
        killer: Host("--test host -- guards::registers_past_the_last_are_not_reached"),
    },
    Mutant {
        name: "buffer-part-bound",
        file: "src/device/dma_buffer.rs",
        before: "    fn check(&self, offset: usize, len: usize) {
        let size = self.size;",
        after: "    fn check(&self, offset: usize, len: usize) {
        let size = self.allocation.size();",
        killer: Host("--test host -- dma::a_part_of_a_buffer_reaches_no_other"),
    },
    // Memory.
    Mutant {
        name: "buffer-seal-shrink",
        file: "src/device/dma_memory.rs",
        before: "sys::file::fix_size(&fd).map_err(failed)?;",
        after: "",
        killer: Host("--test host -- guards::memory_for_dma_keeps_its_size"),
    },
    Mutant {
        name: "buffer-not-zeroed",
        file: "src/device/dma_arena.rs",
        before: "        allocation.clear(used);",
        after: "        let _ = used;",
        killer: Host(
            "--test host -- dma_arena::a_buffer_that_was_dropped_is_given_out_again_as_zeros",
        ),
    },
    Mutant {
        name: "buffer-memory-reused",
        file: "src/device/dma_arena.rs",
        before: "self.size, None, self.clone())",
        after: "self.size, None, self.mapping.memory.clone())",
        killer: Host("--test host -- dma_arena::memory_that_another_device_reaches_is_not_reused"),
    },
    Mutant {
        name: "read-only-file-for-devices",
        file: "src/space/memory.rs",
        before: "&& !self.is_kept_by_kernel() && !file::is_writable(file)",
        after: "&& !self.is_kept_by_kernel() && !file::is_writable(file) && false",
        killer: Host(
            "--lib -- \
             space::memory::tests::a_file_is_written_by_a_device_only_if_the_process_may",
        ),
    },
    Mutant {
        name: "read-only-window-for-devices",
        file: "src/device/window.rs",
        before: "if !permits(self.mapping.access(), access) {",
        after: "if false && !permits(self.mapping.access(), access) {",
        killer: Host("--test host -- dma_bufs::a_window_that_is_only_read_has_no_dma_buf_to_write"),
    },
    Mutant {
        name: "buffer-descriptor-kept",
        file: "src/device/dma_arena.rs",
        before: "        if !by_file {",
        after: "        if false && !by_file {",
        killer: Host("--test host -- dma::files_that_a_transport_maps_are_there_and_not_kept"),
    },
    Mutant {
        name: "guest-descriptor-kept",
        file: "src/device/dma_guest.rs",
        before: "            if !self.limits().by_file {",
        after: "            if false && !self.limits().by_file {",
        killer: Host(
            "--test host -- \
             guest_memory::regions_that_were_mapped_by_their_file_keep_no_descriptor",
        ),
    },
    Mutant {
        name: "private-region-by-file",
        file: "src/device/dma_guest.rs",
        before: "let by_file = self.limits().by_file;",
        after: "let by_file = self.limits().by_file || self.limits().maps_files;",
        killer: Host(
            "--test host -- guest_memory::a_back_end_that_may_be_private_is_mapped_by_no_file",
        ),
    },
    Mutant {
        name: "file-as-dma-buf",
        file: "src/space/memory.rs",
        before: "if !file::is_dma_buf(dma_buf) ||",
        after: "if false && !file::is_dma_buf(dma_buf) ||",
        killer: Host(
            "--lib -- space::memory::tests::a_file_that_is_no_dma_buf_is_not_mapped_as_one",
        ),
    },
    Mutant {
        name: "emulated-memory-seal-shrink",
        file: "src/emulated/memory.rs",
        before: "file::fix_size(&file)?;",
        after: "",
        killer: Host("--test host -- emulated::the_file_of_a_models_memory_keeps_its_size"),
    },
    Mutant {
        name: "window-not-for-children",
        file: "src/sys/mm.rs",
        before: "libc::MADV_DONTFORK)",
        after: "libc::MADV_NORMAL)",
        killer: Host("--lib -- space::mapping::tests::a_child_has_a_hole_in_place_of_a_mapping"),
    },
    Mutant {
        name: "lost-sibling-lives",
        file: "src/space/revocation/guard.rs",
        before: "Err(Refused { left: Left::Unknown | Left::Hole, .. }) => process::abort(),
                    }",
        after: "Err(Refused { left: Left::Unknown | Left::Hole, .. }) => {}
                    }",
        killer: Host(
            "--lib -- space::revocation::tests::a_sibling_that_may_be_lost_ends_the_process",
        ),
    },
    Mutant {
        name: "own-verb-waited-for",
        file: "src/space/revocation/guard.rs",
        before: "State::RevokingByVerb if !absent::moves_pages() => {",
        after: "State::RevokingByVerb if false && !absent::moves_pages() => {",
        killer: Host(
            "--lib -- space::revocation::tests::a_fault_while_a_verb_revokes_a_window_is_contained",
        ),
    },
    Mutant {
        name: "sweep-not-followed",
        file: "src/space/strategies.rs",
        before: "control.follow_sweeps(swept);",
        after: "",
        killer: Host(
            "--lib -- \
             space::revocation::tests::a_window_that_a_verb_has_busy_is_revoked_with_the_others",
        ),
    },
    Mutant {
        name: "pages-inherited",
        file: "src/space/revocation.rs",
        before: "|pin| pin.state() == State::Revoked",
        after: "|_| false",
        killer: Host(
            "--lib -- space::revocation::tests::a_child_has_a_hole_in_place_of_a_revoked_window",
        ),
    },
    Mutant {
        name: "pages-taken-for-others",
        file: "src/space/cover.rs",
        before: "if shown.is_revoked {",
        after: "if false && shown.is_revoked {",
        killer: Host(
            "--lib -- space::revocation::tests::a_revoked_window_that_cannot_be_unmapped_is_kept",
        ),
    },
    Mutant {
        name: "busy-driver-interrupted",
        file: "src/transport/linux/binding.rs",
        before: "self.wait_while_nvme_is_busy(READY_WITHIN);",
        after: "",
        killer: Host("--lib -- transport::linux::binding::tests::a_busy_nvme_driver_is_waited_for"),
    },
    Mutant {
        name: "pages-duplicated",
        file: "src/space/strategies.rs",
        before: "*pages = revoked.get();",
        after: "*pages = false && revoked.get();",
        killer: Host(
            "--lib -- space::revocation::tests::the_pages_of_a_revoked_window_are_not_duplicated",
        ),
    },
    Mutant {
        name: "config-trapped-raw",
        file: "src/device/register.rs",
        before: "if self.device.is_config(self.region) {",
        after: "if false && self.device.is_config(self.region) {",
        killer: Host(
            "--test host -- \
             revocation::config_writes::a_write_that_ends_decoding_revokes_before_it_is_made",
        ),
    },
    Mutant {
        name: "other-checked-once",
        file: "src/space/backing.rs",
        before: "if self.has_accepted(access) && self.kind != BackingKind::Other {",
        after: "if self.has_accepted(access) {",
        killer: Host(
            "--lib -- space::strategies::tests::\
             a_fixed_mapping_of_an_unknown_backing_is_checked_first",
        ),
    },
    // A child of fork(2) leaves alone what its parent made.
    Mutant {
        name: "child-drops-mapping",
        file: "src/space/mapping.rs",
        before: "if self.size == 0 || self.is_inherited() {",
        after: "if self.size == 0 {",
        killer: Host("--lib -- space::mapping::tests::a_child_leaves_alone_what_it_did_not_map"),
    },
    Mutant {
        name: "child-drops-reservation",
        file: "src/space/reservation.rs",
        before: "impl Drop for Area {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for Area {
    fn drop(&mut self) {
        if false {",
        killer: Host(
            "--lib -- space::reservation::tests::a_child_keeps_the_reservations_of_its_parent",
        ),
    },
    Mutant {
        name: "child-drops-placed-mapping",
        file: "src/space/reservation.rs",
        before: "area.generation == fork::generation()
                && ",
        after: "",
        killer: Host(
            "--lib -- space::mapping::tests::\
             a_child_leaves_nothing_mapped_in_an_inherited_reservation",
        ),
    },
    Mutant {
        name: "child-frees-buffers",
        file: "src/device/dma_arena.rs",
        before: "        if self.mapping.mapping.is_inherited() {",
        after: "        if false {",
        killer: Host("--lib -- device::tests::a_child_takes_no_lock_of_its_parents_arenas"),
    },
    Mutant {
        name: "child-drops-dma-mapping",
        file: "src/device/dma.rs",
        before: "    fn drop(&mut self) {
        if self.is_inherited() {",
        after: "    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- guards::a_child_takes_nothing_back_from_a_device"),
    },
    Mutant {
        name: "child-drops-vectors",
        file: "src/device/vectors.rs",
        before: "impl Drop for Vectors {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for Vectors {
    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- guards::a_child_takes_nothing_back_from_a_device"),
    },
    Mutant {
        name: "child-drops-events",
        file: "src/device/events.rs",
        before: "impl Drop for Events {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for Events {
    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- guards::a_child_takes_nothing_back_from_a_device"),
    },
    Mutant {
        name: "child-drops-low-power",
        file: "src/device/power.rs",
        before: "    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- guards::a_child_takes_nothing_back_from_a_device"),
    },
    Mutant {
        name: "child-drops-vfio",
        file: "src/transport/linux/vfio.rs",
        before: "let forked = self.generation != fork::generation();",
        after: "let forked = false;",
        killer: Guest {
            kernel: "6.12",
            test: "dma::a_child_that_drops_a_transport_unmaps_nothing_of_its_parents",
        },
    },
    Mutant {
        name: "child-drops-binding",
        file: "src/transport/linux/binding.rs",
        before: "impl Drop for Binding {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for Binding {
    fn drop(&mut self) {
        if false {",
        killer: Host(
            "--lib -- transport::linux::binding::tests::a_child_leaves_the_binding_of_its_parent_alone",
        ),
    },
    Mutant {
        name: "child-drops-vfio-user",
        file: "src/transport/vfio_user/client.rs",
        before: "impl Drop for VfioUser {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for VfioUser {
    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- children::a_child_leaves_the_connection_to_a_server"),
    },
    Mutant {
        name: "child-drops-emulated",
        file: "src/emulated/device.rs",
        before: "if self.generation != fork::generation() {
            // The thread does not exist in a child of fork(2), and may have held any lock.",
        after: "if false {",
        killer: Host("--test host -- children::a_child_leaves_an_emulated_device"),
    },
    Mutant {
        name: "child-drops-server",
        file: "src/emulated/server/mod.rs",
        before: "impl Drop for Server {
    fn drop(&mut self) {
        if self.generation != fork::generation() {",
        after: "impl Drop for Server {
    fn drop(&mut self) {
        if false {",
        killer: Host("--test host -- children::a_child_leaves_the_socket_of_a_server"),
    },
    // What is taken back.
    Mutant {
        name: "vectors-stay-connected",
        file: "src/device/vectors.rs",
        before: "if let Err(error) = self.device.set_irqs(self.kind, 0, &[]) {
            log::warn!(\"interrupts stay",
        after: "if let Err(error) = Ok::<(), Error>(()) {
            log::warn!(\"interrupts stay",
        killer: Host("--lib -- device::tests::vectors_are_disconnected_when_they_are_dropped"),
    },
    Mutant {
        name: "vectors-half-connected",
        file: "src/device/vectors.rs",
        before: "            let _ = self.inner.set_irqs(kind, 0, &[]);
            self.inner.holders().try_remove(slot);",
        after: "            self.inner.holders().try_remove(slot);",
        killer: Host("--lib -- device::tests::vectors_that_fail_leave_nothing_connected"),
    },
    Mutant {
        name: "vectors-noted-after-failure",
        file: "src/device/vectors.rs",
        before: "            self.inner.holders().try_remove(slot);
            return Err(error);",
        after: "            let _ = slot;
            return Err(error);",
        killer: Host("--lib -- device::tests::vectors_that_fail_leave_nothing_connected"),
    },
    Mutant {
        name: "events-half-connected",
        file: "src/device/events.rs",
        before: "events.release = connect(&events.both, irq_index::REQ)?;",
        after: "events.release = match connect(&events.both, irq_index::REQ) {
            Ok(release) => release,
            Err(error) => {
                std::mem::forget(events);
                return Err(error);
            }
        };",
        killer: Host("--lib -- device::tests::events_that_fail_leave_nothing_connected"),
    },
    Mutant {
        name: "binding-half-made",
        file: "src/transport/linux/binding.rs",
        before: "device.set_override(value)?;",
        after: "let _ = value;",
        killer: Host(
            "--lib -- transport::linux::binding::tests::a_device_that_cannot_be_bound_keeps_its_driver",
        ),
    },
    Mutant {
        name: "low-power-noted-after-failure",
        file: "src/device/power.rs",
        before: "            self.inner.holders().try_remove(slot);
            return Err(error);",
        after: "            let _ = slot;
            return Err(error);",
        killer: Host("--lib -- device::tests::a_sleep_that_fails_leaves_nothing"),
    },
    // The Linux transport, on a real kernel.
    Mutant {
        name: "linux-mapping-limit",
        file: "src/transport/linux/vfio.rs",
        before: "if count >= self.max_mappings.load(Ordering::Relaxed)",
        after: "if false && count >= self.max_mappings.load(Ordering::Relaxed)",
        killer: Guest {
            kernel: "6.12",
            test: "dma::the_limit_on_dma_mappings_is_named_and_reached_again",
        },
    },
    Mutant {
        name: "linux-driver-restored",
        file: "src/transport/linux/binding.rs",
        before: "        if device.driver() != *driver {",
        after: "        if false && device.driver() != *driver {",
        killer: Guest {
            kernel: "6.12",
            test: "binding::a_bound_device_opens_and_gets_its_driver_back",
        },
    },
    Mutant {
        name: "linux-one-space",
        file: "src/transport/linux/group.rs",
        before: "    beside.map_or_else(AddressSpaceId::unique, Group::address_space)",
        after: "    beside.map_or_else(AddressSpaceId::unique, |_| AddressSpaceId::unique())",
        killer: Guest {
            kernel: "6.12",
            test: "address_spaces::thousands_of_pages_of_a_neighbour_are_no_obstacle",
        },
    },
    Mutant {
        name: "linux-positive-count",
        file: "src/transport/linux/irq.rs",
        before: "    if available == 0 {\n",
        after: "    if true || available == 0 {\n",
        killer: Host(
            "--lib -- transport::linux::irq::tests::\
             fewer_available_vectors_are_an_error_that_names_their_count",
        ),
    },
    Mutant {
        name: "linux-uncounted-unmap",
        file: "src/transport/linux/vfio.rs",
        before: "        self.accounting.remove(kept.as_ref().map_or(size, DmaMemory::lockable));\n",
        after: "        let _ = kept;\n",
        killer: Guest { kernel: "6.12", test: "dma::the_limit_on_locked_dma_memory_is_named" },
    },
    Mutant {
        name: "linux-group-shared",
        file: "src/transport/linux/group.rs",
        before: "            if wanted && group.iommu_mode() == mode {",
        after: "            if false && wanted && group.iommu_mode() == mode {",
        killer: Guest {
            kernel: "6.12",
            test: "binding::a_viable_group_opens_once_the_neighbour_is_bound",
        },
    },
    Mutant {
        name: "linux-memory-kept",
        file: "src/transport/linux/accounting.rs",
        before: "        let before = kept.insert(iova, memory.clone().without_file());\n        drop(kept);\n        drop(before);\n",
        after: "        drop(kept);\n",
        killer: Guest {
            kernel: "6.12",
            test: "dma::mapped_memory_of_others_is_kept_until_it_is_unmapped",
        },
    },
    Mutant {
        name: "linux-left-mapped",
        file: "src/transport/linux/vfio.rs",
        before: "            if let Err(error) = self.space.unmap(iova, memory.size() as u64, &self.info.name) {",
        after: "            if let Err(error) = Ok::<(), Error>(drop(iova)) {",
        killer: Guest {
            kernel: "6.12",
            test: "address_spaces::what_a_device_leaves_mapped_is_unmapped_as_it_leaves",
        },
    },
    Mutant {
        name: "linux-region-end",
        file: "src/transport/linux/vfio.rs",
        before: "            .filter(|_| inside)\n",
        after: "            .filter(|_| inside || true)\n",
        killer: Guest { kernel: "6.12", test: "bad_input::ranges_that_make_no_sense" },
    },
    Mutant {
        name: "linux-viable",
        file: "src/transport/linux/group.rs",
        before: "    if flags & VFIO_GROUP_FLAGS_VIABLE != 0 {",
        after: "    if true || flags & VFIO_GROUP_FLAGS_VIABLE != 0 {",
        killer: Guest {
            kernel: "6.12",
            test: "binding::a_viable_group_opens_once_the_neighbour_is_bound",
        },
    },
    // The Ethernet driver.
    Mutant {
        name: "frame-beyond-its-buffer",
        file: "drivers/ethernet/src/receive.rs",
        before: "received.is_whole() && len.wrapping_sub(1) < longest",
        after: "received.is_whole() && longest > 0",
        killer: Host(
            "--package vfio-remap-ethernet --test host -- hostile::lengths_that_a_device_claims_stay_within_the_buffer",
        ),
    },
    Mutant {
        name: "frame-of-another-address-space",
        file: "drivers/ethernet/src/transmit/write.rs",
        before: "self.0.space == space",
        after: "space == space",
        killer: Host(
            "--package vfio-remap-ethernet --test host -- sharing::a_card_refuses_buffers_that_it_does_not_reach",
        ),
    },
    Mutant {
        name: "memory-of-a-queue-not-kept",
        file: "drivers/ethernet/src/nic.rs",
        before: "state.kept.push((direction, queue, memory));",
        after: "drop(memory);",
        killer: Host(
            "--package vfio-remap-ethernet --test host -- memory_of_a_queue_that_cannot_be_stopped_is_kept",
        ),
    },
    Mutant {
        name: "hung-transmitter-not-noticed",
        file: "drivers/ethernet/src/transmit.rs",
        before: "watched.elapsed() >= WATCH",
        after: "watched.elapsed() >= WATCH * 1_000_000",
        killer: Host(
            "--package vfio-remap-ethernet --test host -- a_program_that_seldom_looks_notices_what_is_wrong",
        ),
    },
    Mutant {
        name: "reset-before-a-queue-not-noticed",
        file: "drivers/ethernet/src/nic/recovery.rs",
        before: "        if self.hardware.is_set_up()? {",
        after: "        if self.hardware.is_set_up().is_ok() {",
        killer: Host(
            "--package vfio-remap-ethernet --test host -- a_card_that_others_have_reset_is_set_up_for_a_new_queue",
        ),
    },
    Mutant {
        name: "queue-stays-armed-82574",
        file: "drivers/ethernet/src/interrupts.rs",
        before: "            Model::I82574 => port.write(Port::IMC, *cause),",
        after: "            Model::I82574 => Ok(()),",
        killer: Guest {
            kernel: "6.1",
            test: "ethernet::interrupts::each_queue_interrupts_by_its_own_vector_if_armed",
        },
    },
    Mutant {
        name: "queue-stays-armed-82576",
        file: "drivers/ethernet/src/interrupts.rs",
        before: "            Model::I82576 => port.write(Port::EIMC, *cause),",
        after: "            Model::I82576 => Ok(()),",
        killer: Guest {
            kernel: "6.1",
            test: "ethernet::interrupts::each_queue_interrupts_by_its_own_vector_if_armed",
        },
    },
];
