//! The list of bodies, as tests of an engine's crate.

/// Makes each body a test. `$engine` makes the engine; `$board` is an
/// `Option<&'static dyn BoardChips>`.
#[macro_export]
macro_rules! suite {
    ($engine:expr, $board:expr $(,)?) => {
        fn on_bench(body: fn(&$crate::Bench<'_>)) {
            let engine = $engine;
            body(&$crate::Bench {
                engine: &engine,
                board: $board,
            });
        }

        $crate::tests_of! {
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
            registers {
                a_new_processor_is_in_reset_state
                general_registers_reach_the_guest_and_come_back
                flags_reach_the_guest_and_come_back
                rip_is_behind_the_hlt
                narrow_results_keep_or_clear_the_upper_bits
                segment_bases_reach_the_guest_and_come_back
                translate_walks_the_page_tables
            }
            snapshot {
                a_state_survives_its_own_round_trip
                a_guest_goes_on_in_another_machine
                reading_the_state_changes_nothing
                a_pending_exception_is_delivered_first
                a_pending_interrupt_is_delivered_first
                impossible_states_are_refused
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
                        super::on_bench($crate::bodies::$subject::$body);
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
