//! Registers by name.

use std::collections::BTreeMap;

use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::error::NativeError;

/// Encoding order, as in the state.
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// A segment as Python sees it: selector, base, limit, access.
pub(crate) type SegmentTuple = (u16, u64, u32, u32);

/// Every register that is one number, and where it lies.
fn numbers(state: &mut VcpuState) -> Vec<(&'static str, &mut u64)> {
    let sregs = &mut state.sregs;
    let [dr0, dr1, dr2, dr3] = &mut sregs.dr;
    let mut all: Vec<(&'static str, &mut u64)> =
        GENERAL.into_iter().zip(&mut state.regs.gpr).collect();
    all.extend([
        ("rip", &mut state.regs.rip),
        ("rflags", &mut state.regs.rflags),
        ("cr0", &mut sregs.cr0),
        ("cr2", &mut sregs.cr2),
        ("cr3", &mut sregs.cr3),
        ("cr4", &mut sregs.cr4),
        ("cr8", &mut sregs.cr8),
        ("efer", &mut sregs.efer),
        ("apic_base", &mut sregs.apic_base),
        ("xcr0", &mut sregs.xcr0),
        ("gdt_base", &mut sregs.gdt.base),
        ("idt_base", &mut sregs.idt.base),
        ("dr0", dr0),
        ("dr1", dr1),
        ("dr2", dr2),
        ("dr3", dr3),
        ("dr6", &mut sregs.dr6),
        ("dr7", &mut sregs.dr7),
    ]);
    all
}

fn limits(state: &mut VcpuState) -> [(&'static str, &mut DescriptorTable); 2] {
    [
        ("gdt_limit", &mut state.sregs.gdt),
        ("idt_limit", &mut state.sregs.idt),
    ]
}

fn segments(state: &mut VcpuState) -> Vec<(&'static str, &mut Segment)> {
    let sregs = &mut state.sregs;
    let mut all: Vec<_> = SEGMENTS.into_iter().zip(&mut sregs.segments).collect();
    all.extend([("tr", &mut sregs.tr), ("ldtr", &mut sregs.ldtr)]);
    all
}

/// All numbers by name.
pub(crate) fn registers(mut state: VcpuState) -> BTreeMap<&'static str, u64> {
    let limits = limits(&mut state).map(|(name, table)| (name, u64::from(table.limit)));
    let numbers = numbers(&mut state);
    numbers
        .into_iter()
        .map(|(name, value)| (name, *value))
        .chain(limits)
        .collect()
}

/// All segments by name.
pub(crate) fn segment_tuples(mut state: VcpuState) -> BTreeMap<&'static str, SegmentTuple> {
    segments(&mut state)
        .into_iter()
        .map(|(name, s)| (name, (s.selector, s.base, s.limit, s.access)))
        .collect()
}

/// Puts `values` into `state`.
pub(crate) fn set_registers(
    state: &mut VcpuState,
    values: &BTreeMap<String, u64>,
) -> Result<(), NativeError> {
    for (name, &value) in values {
        if let Some((_, table)) = limits(state).into_iter().find(|(known, _)| known == name) {
            table.limit = u16::try_from(value)
                .map_err(|_| NativeError::config(format!("{name} has 16 bits, not {value:#x}")))?;
            continue;
        }
        let Some((_, register)) = numbers(state).into_iter().find(|(known, _)| known == name)
        else {
            return Err(NativeError::config(format!(
                "there is no register {name:?}"
            )));
        };
        *register = value;
    }
    Ok(())
}

/// Puts `values` into `state`.
pub(crate) fn set_segments(
    state: &mut VcpuState,
    values: &BTreeMap<String, SegmentTuple>,
) -> Result<(), NativeError> {
    for (name, &(selector, base, limit, access)) in values {
        let Some((_, segment)) = segments(state).into_iter().find(|(known, _)| known == name)
        else {
            return Err(NativeError::config(format!("there is no segment {name:?}")));
        };
        *segment = Segment {
            selector,
            base,
            limit,
            access,
        };
    }
    Ok(())
}
