//! The way between Rust and generated code.
//!
//! [`enter`] loads the guest's registers and jumps into generated code; a *gate* does the
//! opposite and calls [`crate::dispatch::dispatch`], which answers with the address to go on at,
//! or 0 to return from [`enter`]. Entering nests: a monitor routine that needs one guest
//! instruction executed enters again, and each level keeps the previous level's stack pointer.
//!
//! x87 and MMX state stays in the processor all the time: Rust code doesn't use it. SSE and AVX
//! registers and MXCSR are swapped, since Rust code does use those. The upper halves of AVX registers
//! are loaded only when one isn't zero: loading zeroes marks them as used, and legacy SSE code then
//! runs at half its speed.

// UNSAFETY: hand-written entry and exit code.
#![expect(unsafe_code, reason = "switches between guest and host register state")]

use std::arch::naked_asm;

use crate::core::Core;
use crate::dispatch::dispatch;
use crate::hot::GATES;
use crate::hot::Gate;
use crate::hot::hot;

/// RFLAGS bits that live in the processor while guest code runs: CF PF AF ZF SF OF.
pub(crate) const ARITHMETIC_FLAGS: u64 = 0x8d5;

/// Enters generated code at `pc` and returns when a gate's dispatch says so.
pub(crate) type Enter = unsafe extern "C" fn(pc: u64, core: *mut Core);

/// The entry point and the gates that suit this host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gates {
    pub enter: Enter,
    /// Addresses for [`crate::hot::Hot::gates`].
    pub entry_points: [u64; GATES],
}

macro_rules! general_registers {
    (save) => {
        "mov gs:[{gpr}+8*1], rcx
         mov gs:[{gpr}+8*2], rdx
         mov gs:[{gpr}+8*3], rbx
         mov gs:[{gpr}+8*4], rsp
         mov gs:[{gpr}+8*5], rbp
         mov gs:[{gpr}+8*6], rsi
         mov gs:[{gpr}+8*7], rdi
         mov gs:[{gpr}+8*8], r8
         mov gs:[{gpr}+8*9], r9
         mov gs:[{gpr}+8*12], r12
         mov gs:[{gpr}+8*13], r13
         mov gs:[{gpr}+8*14], r14
         mov gs:[{gpr}+8*15], r15
         mov gs:[{t0}], r11
         mov gs:[{t1}], r10"
    };
    (load) => {
        "mov rax, gs:[{gpr}]
         mov rcx, gs:[{gpr}+8*1]
         mov rdx, gs:[{gpr}+8*2]
         mov rbx, gs:[{gpr}+8*3]
         mov rsp, gs:[{gpr}+8*4]
         mov rbp, gs:[{gpr}+8*5]
         mov rsi, gs:[{gpr}+8*6]
         mov rdi, gs:[{gpr}+8*7]
         mov r8, gs:[{gpr}+8*8]
         mov r9, gs:[{gpr}+8*9]
         mov r12, gs:[{gpr}+8*12]
         mov r13, gs:[{gpr}+8*13]
         mov r14, gs:[{gpr}+8*14]
         mov r15, gs:[{gpr}+8*15]
         mov r11, gs:[{t0}]
         mov r10, gs:[{t1}]"
    };
}

macro_rules! vector_registers {
    (save, avx) => {
        "vmovups gs:[{ymm}], ymm0
         vmovups gs:[{ymm}+32*1], ymm1
         vmovups gs:[{ymm}+32*2], ymm2
         vmovups gs:[{ymm}+32*3], ymm3
         vmovups gs:[{ymm}+32*4], ymm4
         vmovups gs:[{ymm}+32*5], ymm5
         vmovups gs:[{ymm}+32*6], ymm6
         vmovups gs:[{ymm}+32*7], ymm7
         vmovups gs:[{ymm}+32*8], ymm8
         vmovups gs:[{ymm}+32*9], ymm9
         vmovups gs:[{ymm}+32*10], ymm10
         vmovups gs:[{ymm}+32*11], ymm11
         vmovups gs:[{ymm}+32*12], ymm12
         vmovups gs:[{ymm}+32*13], ymm13
         vmovups gs:[{ymm}+32*14], ymm14
         vmovups gs:[{ymm}+32*15], ymm15
         vorps ymm0, ymm0, ymm1
         vorps ymm2, ymm2, ymm3
         vorps ymm4, ymm4, ymm5
         vorps ymm6, ymm6, ymm7
         vorps ymm8, ymm8, ymm9
         vorps ymm10, ymm10, ymm11
         vorps ymm12, ymm12, ymm13
         vorps ymm14, ymm14, ymm15
         vorps ymm0, ymm0, ymm2
         vorps ymm4, ymm4, ymm6
         vorps ymm8, ymm8, ymm10
         vorps ymm12, ymm12, ymm14
         vorps ymm0, ymm0, ymm4
         vorps ymm8, ymm8, ymm12
         vorps ymm0, ymm0, ymm8
         vextractf128 xmm0, ymm0, 1
         vptest xmm0, xmm0
         setnz cl
         mov gs:[{upper}], cl
         vzeroupper"
    };
    (load, avx) => {
        "cmp byte ptr gs:[{upper}], 0
         je 3f
         vmovups ymm0, gs:[{ymm}+32*0]
         vmovups ymm1, gs:[{ymm}+32*1]
         vmovups ymm2, gs:[{ymm}+32*2]
         vmovups ymm3, gs:[{ymm}+32*3]
         vmovups ymm4, gs:[{ymm}+32*4]
         vmovups ymm5, gs:[{ymm}+32*5]
         vmovups ymm6, gs:[{ymm}+32*6]
         vmovups ymm7, gs:[{ymm}+32*7]
         vmovups ymm8, gs:[{ymm}+32*8]
         vmovups ymm9, gs:[{ymm}+32*9]
         vmovups ymm10, gs:[{ymm}+32*10]
         vmovups ymm11, gs:[{ymm}+32*11]
         vmovups ymm12, gs:[{ymm}+32*12]
         vmovups ymm13, gs:[{ymm}+32*13]
         vmovups ymm14, gs:[{ymm}+32*14]
         vmovups ymm15, gs:[{ymm}+32*15]
         jmp 4f
         3:
         vmovups xmm0, gs:[{ymm}+32*0]
         vmovups xmm1, gs:[{ymm}+32*1]
         vmovups xmm2, gs:[{ymm}+32*2]
         vmovups xmm3, gs:[{ymm}+32*3]
         vmovups xmm4, gs:[{ymm}+32*4]
         vmovups xmm5, gs:[{ymm}+32*5]
         vmovups xmm6, gs:[{ymm}+32*6]
         vmovups xmm7, gs:[{ymm}+32*7]
         vmovups xmm8, gs:[{ymm}+32*8]
         vmovups xmm9, gs:[{ymm}+32*9]
         vmovups xmm10, gs:[{ymm}+32*10]
         vmovups xmm11, gs:[{ymm}+32*11]
         vmovups xmm12, gs:[{ymm}+32*12]
         vmovups xmm13, gs:[{ymm}+32*13]
         vmovups xmm14, gs:[{ymm}+32*14]
         vmovups xmm15, gs:[{ymm}+32*15]
         4:"
    };
    (save, sse) => {
        "movups gs:[{ymm}], xmm0
         movups gs:[{ymm}+32*1], xmm1
         movups gs:[{ymm}+32*2], xmm2
         movups gs:[{ymm}+32*3], xmm3
         movups gs:[{ymm}+32*4], xmm4
         movups gs:[{ymm}+32*5], xmm5
         movups gs:[{ymm}+32*6], xmm6
         movups gs:[{ymm}+32*7], xmm7
         movups gs:[{ymm}+32*8], xmm8
         movups gs:[{ymm}+32*9], xmm9
         movups gs:[{ymm}+32*10], xmm10
         movups gs:[{ymm}+32*11], xmm11
         movups gs:[{ymm}+32*12], xmm12
         movups gs:[{ymm}+32*13], xmm13
         movups gs:[{ymm}+32*14], xmm14
         movups gs:[{ymm}+32*15], xmm15"
    };
    (load, sse) => {
        "movups xmm0, gs:[{ymm}]
         movups xmm1, gs:[{ymm}+32*1]
         movups xmm2, gs:[{ymm}+32*2]
         movups xmm3, gs:[{ymm}+32*3]
         movups xmm4, gs:[{ymm}+32*4]
         movups xmm5, gs:[{ymm}+32*5]
         movups xmm6, gs:[{ymm}+32*6]
         movups xmm7, gs:[{ymm}+32*7]
         movups xmm8, gs:[{ymm}+32*8]
         movups xmm9, gs:[{ymm}+32*9]
         movups xmm10, gs:[{ymm}+32*10]
         movups xmm11, gs:[{ymm}+32*11]
         movups xmm12, gs:[{ymm}+32*12]
         movups xmm13, gs:[{ymm}+32*13]
         movups xmm14, gs:[{ymm}+32*14]
         movups xmm15, gs:[{ymm}+32*15]"
    };
}

macro_rules! gates {
    ($module:ident, $vector:ident) => {
        mod $module {
            use super::*;

            /// Loads the guest's registers and goes to `resume_pc`. Runs on the host stack.
            #[unsafe(naked)]
            unsafe extern "C" fn resume() {
                naked_asm!(
                    vector_registers!(load, $vector),
                    "/* {upper} */",
                    "ldmxcsr gs:[{mxcsr}]",
                    "mov rax, gs:[{flags}]",
                    "and eax, {arithmetic}",
                    "push rax",
                    "popfq",
                    general_registers!(load),
                    "jmp gs:[{resume_pc}]",
                    ymm = const hot!(ymm),
                    upper = const hot!(upper),
                    mxcsr = const hot!(mxcsr),
                    flags = const hot!(flags),
                    arithmetic = const ARITHMETIC_FLAGS,
                    gpr = const hot!(gpr),
                    t0 = const hot!(t0),
                    t1 = const hot!(t1),
                    resume_pc = const hot!(resume_pc),
                );
            }

            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn enter(_pc: u64, _core: *mut Core) {
                naked_asm!(
                    "push rbx",
                    "push rbp",
                    "push r12",
                    "push r13",
                    "push r14",
                    "push r15",
                    "push gs:[{host_rsp}]",
                    "mov gs:[{host_rsp}], rsp",
                    "mov gs:[{resume_pc}], rdi",
                    "mov gs:[{core}], rsi",
                    "stmxcsr gs:[{host_mxcsr}]",
                    "jmp {resume}",
                    host_rsp = const hot!(host_rsp),
                    resume_pc = const hot!(resume_pc),
                    host_mxcsr = const hot!(host_mxcsr),
                    core = const hot!(core),
                    resume = sym resume,
                );
            }

            /// Where every gate goes, with its number in EAX and guest RAX saved.
            #[unsafe(naked)]
            unsafe extern "C" fn leave() {
                naked_asm!(
                    general_registers!(save),
                    "mov rsp, gs:[{host_rsp}]",
                    "pushfq",
                    "pop rcx",
                    "mov gs:[{flags}], rcx",
                    "stmxcsr gs:[{mxcsr}]",
                    "ldmxcsr gs:[{host_mxcsr}]",
                    vector_registers!(save, $vector),
                    "/* {upper} */",
                    "mov rdi, gs:[{core}]",
                    "mov esi, eax",
                    "call {dispatch}",
                    "test rax, rax",
                    "jz 2f",
                    "mov gs:[{resume_pc}], rax",
                    "jmp {resume}",
                    "2:",
                    "pop gs:[{host_rsp}]",
                    "pop r15",
                    "pop r14",
                    "pop r13",
                    "pop r12",
                    "pop rbp",
                    "pop rbx",
                    "ret",
                    gpr = const hot!(gpr),
                    t0 = const hot!(t0),
                    t1 = const hot!(t1),
                    host_rsp = const hot!(host_rsp),
                    flags = const hot!(flags),
                    mxcsr = const hot!(mxcsr),
                    host_mxcsr = const hot!(host_mxcsr),
                    ymm = const hot!(ymm),
                    upper = const hot!(upper),
                    core = const hot!(core),
                    resume_pc = const hot!(resume_pc),
                    dispatch = sym dispatch,
                    resume = sym resume,
                );
            }

            /// Entry point of gate `KIND`.
            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn gate<const KIND: u32>() {
                naked_asm!(
                    "mov gs:[{gpr}], rax",
                    "mov eax, {kind}",
                    "jmp {leave}",
                    gpr = const hot!(gpr),
                    kind = const KIND,
                    leave = sym leave,
                );
            }
        }
    };
}

gates!(with_avx, avx);
gates!(without_avx, sse);

macro_rules! entry_points {
    ($module:ident) => {{
        const fn number(gate: Gate) -> u32 {
            gate as u32
        }
        let points: [unsafe extern "C" fn(); GATES] = [
            $module::gate::<{ number(Gate::Memory) }>,
            $module::gate::<{ number(Gate::Step) }>,
            $module::gate::<{ number(Gate::Link) }>,
            $module::gate::<{ number(Gate::Miss) }>,
            $module::gate::<{ number(Gate::HostFault) }>,
            $module::gate::<{ number(Gate::Done) }>,
            $module::gate::<{ number(Gate::Crossing) }>,
        ];
        Gates {
            enter: $module::enter,
            entry_points: points.map(|point| point as usize as u64),
        }
    }};
}

impl Gates {
    /// The gates for a host with or without AVX.
    pub(crate) fn new(avx: bool) -> Self {
        if avx {
            entry_points!(with_avx)
        } else {
            entry_points!(without_avx)
        }
    }
}
