//! Where an emulated host's processor differs from the manuals: QEMU's TCG, version 7.2, as the
//! nested test host uses it. On any other host this list is empty and every body has to pass.

use std::arch::x86_64::__cpuid;

use ringfence_conformance::Deviation;

const fn deviation(body: &'static str, reason: &'static str) -> Deviation {
    Deviation { body, reason }
}

const IDT_ERROR: &str = "error codes that name a gate hold its number times 16, not 8";
const CANONICAL: &str = "bases aren't checked for being canonical";
const LIMITS: &str = "segment limits aren't checked";
const RESERVED: &str = "page faults for reserved bits lack the present bit";

const TCG: [Deviation; 23] = [
    deviation("exceptions::absent_gates_are_np", IDT_ERROR),
    deviation("exceptions::bad_gates_fault_with_what_is_bad", IDT_ERROR),
    deviation(
        "exceptions::software_interrupts_check_the_gates_privilege",
        IDT_ERROR,
    ),
    deviation("exceptions::vectors_past_the_idt_limit_are_gp", IDT_ERROR),
    deviation(
        "exceptions::alignment_checks_are_for_user_code",
        "there are no alignment checks",
    ),
    deviation("exceptions::int1_is_db", "INT1 is #UD in a guest"),
    deviation(
        "exceptions::non_canonical_addresses_are_gp_or_ss",
        "#GP for the stack too",
    ),
    deviation(
        "exceptions::sse_errors_are_xm",
        "SSE errors are never raised",
    ),
    deviation(
        "exceptions::two_contributory_faults_are_a_double_fault",
        "an intercepted #GP doesn't tell which event it interrupted",
    ),
    deviation(
        "exceptions::x87_errors_come_at_the_next_x87_instruction",
        "x87 errors are raised by WAIT alone",
    ),
    deviation("msrs::non_canonical_values_are_gp", CANONICAL),
    deviation("segments::fsgsbase_values_are_canonical", CANONICAL),
    deviation("segments::non_canonical_table_bases_are_gp", CANONICAL),
    deviation(
        "segments::ltr_refuses_the_null_selector",
        "LTR takes the null selector",
    ),
    deviation(
        "control::cr0_refuses_its_upper_half",
        "the upper half is dropped",
    ),
    deviation("control::cr3_refuses_reserved_bits", "CR3 takes any value"),
    deviation(
        "control::general_detect_guards_the_debug_registers",
        "DR7.GD has no effect",
    ),
    deviation(
        "control::a_load_of_ss_delays_a_data_breakpoint",
        "a load of SS delays no debug exception",
    ),
    deviation("modes::compatibility_mode_has_segment_limits", LIMITS),
    deviation("modes::real_mode_checks_the_limit", LIMITS),
    deviation(
        "syscalls::syscall_keeps_the_unmasked_flags",
        "SYSCALL clears the status flags",
    ),
    deviation("paging_bits::nx_without_nxe_is_reserved", RESERVED),
    deviation("paging_bits::reserved_bits_fault", RESERVED),
];

/// The list for the host that this runs on.
pub(crate) fn deviations() -> &'static [Deviation] {
    let leaf = __cpuid(0x4000_0000);
    let signature = [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .concat();
    if signature == b"TCGTCGTCGTCG" {
        &TCG
    } else {
        &[]
    }
}
