//! The list of bodies, as tests of an engine's crate.

/// Makes each body a test. `$engine` makes the engine; `$board` is an
/// `Option<&'static dyn BoardChips>`; `$deviations` is a `&[Deviation]`, empty unless the host's
/// processor itself is known to be wrong.
#[macro_export]
macro_rules! suite {
    ($engine:expr, $board:expr, $deviations:expr $(,)?) => {
        fn on_bench(name: &str, body: fn(&$crate::Bench<'_>)) {
            let engine = $engine;
            let bench = $crate::Bench {
                engine: &engine,
                board: $board,
            };
            $crate::run(name, body, &bench, $deviations);
        }

        $crate::tests_of! {
            apic {
                id_and_version_are_a_modern_apics
                the_base_register_is_as_after_reset
                the_timer_fires_once
                the_timer_fires_periodically
                the_current_count_goes_down
                a_masked_timer_is_silent
                the_timer_fires_at_a_deadline
                a_past_deadline_fires_at_once
                x2apic_mode_has_msrs
                the_timer_works_in_x2apic_mode
                the_registers_travel_in_the_state
            }
            code {
                a_change_ahead_is_seen_after_a_jump
                code_that_ran_can_be_changed_again_and_again
                a_change_through_an_alias_is_seen
                a_change_by_the_host_is_seen
                a_change_by_a_device_is_seen
                a_string_store_over_code_is_seen
                data_beside_code_can_be_written
                a_remapped_page_runs_its_new_code
                data_among_user_code_is_read_as_it_is
                a_table_in_a_page_of_user_code_is_read_as_it_is
            }
            control {
                privileged_instructions_are_gp_in_user_mode
                cr0_refuses_impossible_bits
                cr0_refuses_its_upper_half
                cr4_refuses_impossible_bits
                cr3_refuses_reserved_bits
                cr8_holds_four_bits
                cr8_reaches_the_state_and_comes_back
                unknown_control_registers_are_ud
                lmsw_changes_the_low_bits
                xsetbv_refuses_impossible_combinations
                iopl_lets_user_code_use_ports
                the_permission_map_opens_single_ports
                popf_in_user_mode_keeps_if_and_iopl
                the_guests_execution_breakpoints_fault
                the_guests_data_breakpoints_trap
                a_load_of_ss_delays_a_data_breakpoint
                general_detect_guards_the_debug_registers
            }
            cpuid {
                a_given_leaf_comes_back
                all_leaves_are_the_machines
                an_unlisted_leaf_is_zero
                subleaves_are_told_apart
                osxsave_follows_cr4
                user_code_may_ask
                the_paravirtual_leaves_are_there
            }
            debug {
                single_step_stops_after_every_instruction
                single_step_follows_branches
                single_step_leaves_no_trace_in_the_flags
                single_step_over_a_device_access
                a_breakpoint_stops_before_its_instruction
                a_breakpoint_in_a_loop_stops_each_turn
                four_breakpoints_work_at_once
                a_step_onto_a_breakpoint_says_so
                a_breakpoint_in_user_code_stops_there
                the_guests_own_int3_is_its_own
            }
            events {
                a_doorbell_rings_for_its_value
                a_doorbell_may_be_a_port
                an_event_becomes_an_interrupt
                a_bare_machine_refuses_interrupt_events
                the_dirty_log_names_written_pages_once
                pages_written_before_are_logged_again
            }
            exceptions {
                a_call_reads_its_target_before_it_pushes
                division_faults_are_de
                undefined_opcodes_are_ud
                int3_is_a_trap
                software_interrupts_check_the_gates_privilege
                gates_clear_or_keep_if
                vectors_past_the_idt_limit_are_gp
                absent_gates_are_np
                bad_gates_fault_with_what_is_bad
                the_frame_is_whole_and_aligned
                a_fault_in_user_mode_changes_stacks
                an_ist_gate_changes_the_stack_always
                a_fault_on_a_bad_stack_is_a_double_fault
                two_contributory_faults_are_a_double_fault
                alignment_checks_are_for_user_code
                task_switched_makes_vector_code_nm
                emulation_bit_makes_vector_code_fault
                x87_errors_come_at_the_next_x87_instruction
                x87_errors_come_at_wait
                sse_errors_are_xm
                the_trap_flag_traps_behind_each_instruction
                int1_is_db
                non_canonical_addresses_are_gp_or_ss
                jumps_to_non_canonical_addresses_are_gp
            }
            interrupts {
                a_message_is_delivered
                an_interrupt_waits_for_if
                sti_and_cli_let_nothing_in_between
                hlt_wakes_for_a_pending_interrupt
                hlt_wakes_for_an_interrupt_from_another_thread
                the_higher_vector_comes_first
                a_waiting_vector_is_one_interrupt
                cr8_holds_lower_vectors_off
                an_interrupt_in_service_holds_lower_ones_off
                a_disabled_apic_takes_no_messages
                a_processor_can_interrupt_itself
                an_nmi_ignores_if
                user_code_is_interrupted
                an_edge_is_one_interrupt
                a_masked_input_stays_silent
                a_level_interrupts_until_it_is_low
                the_pics_reach_the_processor
                the_interval_timer_interrupts
            }
            io {
                port_reads_have_each_width
                port_writes_have_each_width
                immediate_ports_reach_low_ports
                string_output_is_one_access_an_element
                string_input_stores_each_element
                unclaimed_accesses_float
                device_loads_have_each_width
                device_stores_have_each_width
                read_modify_write_reaches_the_device_twice
                comparisons_only_read_the_device
                vector_moves_reach_the_device_whole
                string_moves_reach_the_device
                a_moved_device_answers_at_its_new_place
            }
            lifecycle {
                hlt_exits_and_the_next_run_continues
                a_triple_fault_shuts_down
                a_fault_without_an_idt_shuts_down
                a_machine_runs_again_after_a_shutdown
                a_kick_before_the_run_ends_it_at_once
                a_kick_from_another_thread_ends_a_loop
                a_device_may_kick_from_within_the_run
                a_kick_at_a_read_leaves_it_complete
                a_wake_alone_does_not_end_the_run
                a_waker_outlives_its_vcpu
                vcpu_numbers_are_checked
            }
            memory {
                the_guest_reads_what_the_host_wrote
                the_host_reads_what_the_guest_wrote
                accesses_may_cross_pages
                ram_continues_above_the_hole
                string_instructions_move_and_compare
                locked_operations_work
            }
            modes {
                real_mode_addresses_by_segment_and_offset
                real_mode_interrupts_use_the_vector_table
                real_mode_calls_push_16_bits
                real_mode_checks_the_limit
                a_trampoline_reaches_long_mode
                two_level_paging_translates
                compatibility_mode_has_segment_bases
                compatibility_mode_has_segment_limits
                compatibility_mode_has_instructions_of_its_own
            }
            msrs {
                system_call_registers_hold_what_is_written
                base_registers_are_the_segments_bases
                non_canonical_values_are_gp
                unknown_registers_are_gp
                user_code_may_not_touch_them
                efer_guards_its_bits
                pat_takes_known_types_alone
                halves_are_32_bits
                memory_type_registers_answer
            }
            paging_bits {
                absent_pages_fault_with_the_access
                read_only_pages_stop_writes
                supervisor_pages_stop_user_code
                nx_stops_fetches_at_every_level
                rights_are_the_and_of_all_levels
                reserved_bits_fault
                nx_without_nxe_is_reserved
                reads_set_accessed_at_every_level
                writes_set_dirty_after_a_read_too
                cleared_bits_are_set_again_after_a_flush
                a_faulting_write_leaves_d_clear
                large_pages_have_their_own_bits
                gigabyte_pages_map_a_gigabyte
                a_fault_on_the_second_page_names_it
                a_string_move_faults_with_its_progress
                a_fetch_across_pages_faults_on_the_second
            }
            paging_modes {
                more_rights_need_no_flush
                invlpg_makes_a_new_mapping_seen
                invlpg_drops_a_whole_large_page
                cr3_flushes_and_global_pages_stay
                another_cr3_shows_other_pages
                tagged_address_spaces_keep_apart
                pcide_needs_tag_zero
                invpcid_makes_new_mappings_seen
                smep_stops_supervisor_fetches_of_user_pages
                smap_stops_supervisor_accesses_to_user_pages
            }
            registers {
                a_new_processor_is_in_reset_state
                general_registers_reach_the_guest_and_come_back
                flags_reach_the_guest_and_come_back
                rip_is_behind_the_hlt
                narrow_results_keep_or_clear_the_upper_bits
                segment_bases_reach_the_guest_and_come_back
                translate_walks_the_page_tables
            }
            segments {
                loading_a_segment_sets_accessed
                bad_selectors_fault_with_the_selector
                null_selectors_load_where_they_may
                cs_changes_by_far_return_alone
                a_far_return_enters_ring_3
                descriptor_tables_come_back
                non_canonical_table_bases_are_gp
                ltr_makes_the_task_segment_busy
                ltr_refuses_the_null_selector
                local_descriptors_are_found
                selectors_can_be_asked_about
                swapgs_exchanges_the_bases
                fsgsbase_instructions_follow_cr4
                fsgsbase_values_are_canonical
                umip_keeps_table_addresses_from_user_code
            }
            smp {
                init_and_sipi_start_a_processor
                each_processor_has_its_own_id
                locked_additions_add_up
                stores_are_seen_in_order
                fences_keep_stores_before_loads
                an_ipi_goes_to_its_processor
                broadcasts_reach_whom_they_name
                a_halted_processor_wakes_for_an_ipi
                an_nmi_goes_to_the_other_processor
                init_restarts_a_running_processor
                a_tlb_shoot_down_reaches_the_other_processor
                cross_modified_code_runs_changed
                much_code_runs_on_both
                a_kick_ends_the_next_hlt_too
                a_waiting_processor_answers_a_kick
            }
            snapshot {
                a_state_survives_its_own_round_trip
                a_guest_goes_on_in_another_machine
                reading_the_state_changes_nothing
                a_pending_exception_is_delivered_first
                a_pending_interrupt_is_delivered_first
                impossible_states_are_refused
            }
            syscalls {
                syscall_enters_ring_0
                syscall_keeps_the_unmasked_flags
                sysret_goes_back_to_64_bit_code
                sysret_goes_to_32_bit_code
                syscall_needs_sce
                sysret_to_a_non_canonical_address_is_gp
                iret_within_ring_0_loads_the_stack
                iret_with_nt_is_gp
                iret_to_nowhere_faults
                iret_to_user_checks_the_stack_segment
                iret_in_user_mode_keeps_if_and_iopl
                a_return_to_ring_3_clears_null_selectors
                iret_enters_32_bit_user_code
            }
            time {
                rdtsc_never_goes_back
                tsd_keeps_the_counter_from_user_code
                rdtscp_returns_tsc_aux
                the_counter_can_be_written
                the_machine_clock_runs_and_can_be_set
                the_paravirtual_clock_advances
            }
            unclaimed {
                a_port_write_exits_complete
                a_port_read_takes_the_callers_data
                memory_accesses_exit_likewise
                string_input_exits_once_an_element
                a_read_modify_write_exits_twice
                claimed_accesses_do_not_exit
                wrong_completions_are_refused
                a_new_state_gives_a_waiting_read_up
            }
            vector {
                vector_registers_survive_exits
                vector_registers_survive_the_hosts_own_use
                mxcsr_is_the_guests_own
                fxsave_and_fxrstor_move_the_state
                sse_needs_osfxsr
                avx_state_is_saved_and_restored
                avx_state_travels_in_the_state
            }
        }
    };
}

/// One module a subject, one test a body.
#[doc(hidden)]
#[macro_export]
macro_rules! tests_of {
    ($($subject:ident { $($body:ident)* })*) => {
        $(
            #[cfg(test)]
            mod $subject {
                $(
                    #[test]
                    fn $body() {
                        super::on_bench(
                            concat!(stringify!($subject), "::", stringify!($body)),
                            $crate::bodies::$subject::$body,
                        );
                    }
                )*
            }
        )*
    };
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_body_is_listed() {
        let list = include_str!("list.rs");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bodies");
        for file in fs::read_dir(folder).unwrap() {
            let text = fs::read_to_string(file.unwrap().path()).unwrap();
            let bodies = text
                .lines()
                .filter(|line| line.ends_with("(bench: &Bench<'_>) {"))
                .filter_map(|line| line.strip_prefix("pub fn ")?.split('(').next());
            for body in bodies {
                let listed = list.lines().any(|line| line.trim() == body);
                assert!(listed, "{body} is missing in list.rs");
            }
        }
    }
}
