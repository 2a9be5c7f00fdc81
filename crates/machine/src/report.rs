//! The guest's state as text, for the report of a bug in an engine.

use std::fmt::Write;

use ringfence_engine::Vcpu;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_x86::state::RSP;
use ringfence_x86::state::VcpuState;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
/// Around the instruction pointer, and up from the stack pointer.
const CODE_BEFORE: u64 = 32;
const CODE_BYTES: u64 = 96;
const STACK_BYTES: u64 = 128;

/// Registers, code, stack, and what the engine itself knows. It may hold the guest's data.
pub(crate) fn of(vcpu: &dyn Vcpu, ram: &GuestRam) -> String {
    let mut text = String::new();
    match vcpu.state() {
        Ok(state) => {
            add_registers(&mut text, &state);
            let rip = state.regs.rip;
            let code = rip.wrapping_sub(CODE_BEFORE);
            add_memory(&mut text, vcpu, ram, "code", (code, CODE_BYTES));
            let stack = (state.regs.gpr[RSP], STACK_BYTES);
            add_memory(&mut text, vcpu, ram, "stack", stack);
            add_msrs(&mut text, &state);
        }
        Err(error) => add(&mut text, format_args!("no registers: {error}")),
    }
    text.push_str(&vcpu.diagnosis());
    text
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    // A string takes all that it is given.
    let _ = writeln!(text, "{line}");
}

fn add_registers(text: &mut String, state: &VcpuState) {
    let (regs, system) = (&state.regs, &state.sregs);
    add(
        text,
        format_args!(
            "rip {:#x} rflags {:#x} {:?}",
            regs.rip, regs.rflags, state.activity
        ),
    );
    for (names, values) in NAMES.chunks(4).zip(regs.gpr.chunks(4)) {
        let line: Vec<_> = names
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name:3} {value:016x}"))
            .collect();
        add(text, format_args!("{}", line.join(" ")));
    }
    let named = SEGMENTS.iter().zip(&system.segments);
    for (name, segment) in named.chain([(&"tr", &system.tr), (&"ldt", &system.ldtr)]) {
        add(
            text,
            format_args!(
                "{name:3} {:04x} base {:#x} limit {:#x} access {:#x}",
                segment.selector, segment.base, segment.limit, segment.access
            ),
        );
    }
    add(
        text,
        format_args!(
            "gdt {:#x}+{:#x} idt {:#x}+{:#x}",
            system.gdt.base, system.gdt.limit, system.idt.base, system.idt.limit
        ),
    );
    add(
        text,
        format_args!(
            "cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} cr8 {:#x} efer {:#x} xcr0 {:#x}",
            system.cr0, system.cr2, system.cr3, system.cr4, system.cr8, system.efer, system.xcr0
        ),
    );
    add(
        text,
        format_args!("dr {:x?} {:#x} {:#x}", system.dr, system.dr6, system.dr7),
    );
    add(text, format_args!("events {:?}", state.events));
}

fn add_memory(
    text: &mut String,
    vcpu: &dyn Vcpu,
    ram: &GuestRam,
    name: &str,
    (start, len): (u64, u64),
) {
    for line in (start..start.saturating_add(len)).step_by(16) {
        let bytes: Vec<_> = (0..16)
            .map(|at| match byte(vcpu, ram, line + at) {
                Some(byte) => format!("{byte:02x}"),
                None => "--".to_owned(),
            })
            .collect();
        add(text, format_args!("{name} {line:016x} {}", bytes.join(" ")));
    }
}

fn byte(vcpu: &dyn Vcpu, ram: &GuestRam, address: u64) -> Option<u8> {
    let place = vcpu.translate(address).ok()??;
    ram.memory().read_obj(GuestAddress(place)).ok()
}

fn add_msrs(text: &mut String, state: &VcpuState) {
    for (number, value) in &state.msrs {
        add(text, format_args!("msr {number:#x} {value:#x}"));
    }
}
