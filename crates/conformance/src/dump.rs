//! What a failed body says of its guest.

use std::fmt::Write;

use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::Formatter;
use iced_x86::NasmFormatter;
use ringfence_engine::Vcpu;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::CS;
use ringfence_x86::state::SS;
use ringfence_x86::state::VcpuState;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Registers and the code at RIP.
pub(crate) fn describe(vcpu: &dyn Vcpu, ram: &GuestRam) -> String {
    match vcpu.state() {
        Err(error) => format!("(no state: {error})"),
        Ok(state) => registers(&state) + &code(vcpu, ram, &state),
    }
}

fn registers(state: &VcpuState) -> String {
    let mut text = String::new();
    for (index, (name, value)) in NAMES.iter().zip(state.regs.gpr).enumerate() {
        let end = if index % 4 == 3 { "\n" } else { "  " };
        let _ = write!(text, "  {name:>3} {value:016x}{end}");
    }
    let sregs = &state.sregs;
    let _ = writeln!(
        text,
        "  rip {:016x}   flags {:x}  cs {:x}  ss {:x}  cr0 {:x}  cr2 {:x}  cr3 {:x}  cr4 {:x}  efer {:x}",
        state.regs.rip,
        state.regs.rflags,
        sregs.segments[CS].selector,
        sregs.segments[SS].selector,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer,
    );
    text
}

fn code(vcpu: &dyn Vcpu, ram: &GuestRam, state: &VcpuState) -> String {
    const SHOWN: usize = 4;
    let long = state.sregs.segments[CS].access & ACCESS_L != 0;
    let base = if long {
        0
    } else {
        state.sregs.segments[CS].base
    };
    let linear = base.wrapping_add(state.regs.rip);
    let Ok(Some(physical)) = vcpu.translate(linear) else {
        return format!("  (nothing is mapped at {linear:#x})\n");
    };
    let mut bytes = [0; 48];
    if ram
        .memory()
        .read_slice(&mut bytes, GuestAddress(physical))
        .is_err()
    {
        return format!("  (no memory at {physical:#x})\n");
    }
    let bits = if long { 64 } else { 32 };
    let decoder = Decoder::with_ip(bits, &bytes, state.regs.rip, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    let mut text = String::new();
    for instruction in decoder.into_iter().take(SHOWN) {
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let _ = writeln!(text, "  {:#x}: {line}", instruction.ip());
    }
    text
}
