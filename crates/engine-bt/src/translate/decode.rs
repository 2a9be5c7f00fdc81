//! Cutting a block out of a page and sorting its instructions.

use iced_x86::Code;
use iced_x86::Decoder;
use iced_x86::DecoderError;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::InstructionInfoFactory;
use iced_x86::InstructionInfoOptions;
use iced_x86::Mnemonic;
use iced_x86::OpAccess;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::step::decoder_options;
use crate::step::has_short_address;
use crate::step::is_emulated;
use crate::step::is_hint;
use crate::translate::PAGE_BYTES;
use crate::translate::Request;
use crate::translate::rename::general_form;
use crate::translate::rename::mentions;
use crate::translate::straddle;

/// Most instructions in a block.
const MAX_INSTRUCTIONS: usize = 64;
/// Conditional jumps that a block may fall through.
const MAX_SIDE_EXITS: usize = 4;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Copied as it is, but for R10 and R11.
    Copy,
    /// Nothing to do.
    Nop,
    /// An address computation.
    Lea,
    /// Copied with its one memory operand redirected.
    Memory {
        bytes: u16,
        reads: bool,
        write: bool,
    },
    /// BT and its relatives on memory with a register bit offset.
    BitString {
        bytes: u16,
        write: bool,
    },
    /// PUSH of a register, immediate or memory operand of 64 bits.
    Push,
    /// POP to a register of 64 bits.
    Pop,
    Leave,
    Jump,
    JumpIndirect,
    Call,
    CallIndirect,
    Return,
    Conditional,
    /// JRCXZ and LOOP with a 64-bit counter.
    Counted,
    /// Emitted in place: see [`crate::translate::system`].
    System,
    /// REP MOVS or REP STOS.
    String,
    /// The monitor's.
    Step,
}

/// One instruction of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub instruction: Instruction,
    /// Its place in the page; may be 4096 only for the end marker.
    pub offset: u16,
    pub class: Class,
    /// Operands that name guest R10 or R11 and are written.
    pub writes_r10: bool,
    pub writes_r11: bool,
}

/// A direct transfer's target, relative to the page.
pub(crate) fn target(item: &Item) -> i64 {
    let target = item.instruction.near_branch_target();
    if item.instruction.op0_kind() == OpKind::NearBranch64 {
        target.cast_signed()
    } else {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "32-bit code has 32-bit targets"
        )]
        let low = target as u32;
        i64::from(low.cast_signed())
    }
}

/// Cuts a block. It is never empty: an instruction that can't be decoded is the monitor's.
pub(crate) fn decode_block(request: &Request<'_>, info: &mut InstructionInfoFactory) -> Vec<Item> {
    if let Some(item) = straddle::decode(request, info) {
        return vec![item];
    }
    let start = usize::from(request.offset);
    let mut decoder = Decoder::with_ip(
        request.mode.bits(),
        &request.page[start..PAGE_BYTES],
        u64::from(request.offset),
        decoder_options(request.host.amd),
    );
    let mut items = Vec::new();
    let mut side_exits = 0;
    while items.len() < MAX_INSTRUCTIONS {
        let offset = u16::try_from(decoder.ip()).unwrap_or(0);
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        let cut = instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes;
        if cut && !items.is_empty() {
            // A block of its own may translate it.
            break;
        }
        let class = classify(request, &instruction, info);
        items.push(item(instruction, offset, class, info));
        match class {
            Class::Conditional | Class::Counted => {
                side_exits += 1;
                if side_exits > MAX_SIDE_EXITS {
                    break;
                }
            }
            Class::System if leaves(&instruction) => break,
            Class::Step
            | Class::Jump
            | Class::JumpIndirect
            | Class::Call
            | Class::CallIndirect
            | Class::Return => break,
            _ => {}
        }
    }
    items
}

pub(crate) fn item(
    instruction: Instruction,
    offset: u16,
    class: Class,
    info: &mut InstructionInfoFactory,
) -> Item {
    let mut item = Item {
        instruction,
        offset,
        class,
        writes_r10: false,
        writes_r11: false,
    };
    let touches = mentions(&instruction, Register::R10) || mentions(&instruction, Register::R11);
    if touches {
        let access = info.info_options(&instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) != OpKind::Register {
                continue;
            }
            let written = !matches!(
                access.op_access(operand),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            let full = instruction.op_register(operand).full_register();
            item.writes_r10 |= written && full == Register::R10;
            item.writes_r11 |= written && full == Register::R11;
        }
    }
    item
}

/// SYSCALL and SYSRET end a block.
pub(crate) fn leaves(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Syscall | Mnemonic::Sysretq
    )
}

/// A load of CR2 to a register that the processor has while generated code runs.
fn reads_cr2(instruction: &Instruction) -> bool {
    instruction.op1_register() == Register::CR2
        && !matches!(instruction.op0_register(), Register::R10 | Register::R11)
}

/// System and string instructions that are emitted in place.
fn inline_class(request: &Request<'_>, instruction: &Instruction) -> Option<Class> {
    use Mnemonic as M;
    if request.mode.bits() != 64 {
        return None;
    }
    let user = request.mode.is_user();
    let system = match instruction.mnemonic() {
        M::Cli | M::Sti | M::Swapgs | M::Sysretq => !user,
        M::Pushfq | M::Cld | M::Std => true,
        M::Mov => !user && reads_cr2(instruction),
        M::Syscall => user,
        M::Rdtsc | M::Rdtscp => request.plain_tsc,
        _ => false,
    };
    if system {
        return Some(Class::System);
    }
    let string = matches!(
        instruction.mnemonic(),
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq
    );
    let wide = [instruction.op0_kind(), instruction.op1_kind()]
        .iter()
        .any(|kind| matches!(kind, OpKind::MemoryESRDI));
    let based = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    (string && wide && !based && instruction.has_rep_prefix()).then_some(Class::String)
}

pub(crate) fn classify(
    request: &Request<'_>,
    instruction: &Instruction,
    info: &mut InstructionInfoFactory,
) -> Class {
    if let Some(class) = inline_class(request, instruction) {
        return class;
    }
    if is_hint(instruction) {
        return Class::Nop;
    }
    if instruction.is_invalid() || is_emulated(instruction) || !is_available(request, instruction) {
        return Class::Step;
    }
    if !reaches_target(instruction) {
        return Class::Step;
    }
    let wide = request.mode.bits() == 64;
    let near = if wide {
        OpKind::NearBranch64
    } else {
        OpKind::NearBranch32
    };
    let direct = instruction.op0_kind() == near;
    let (jump, call) = if wide {
        (Code::Jmp_rm64, Code::Call_rm64)
    } else {
        (Code::Jmp_rm32, Code::Call_rm32)
    };
    match instruction.flow_control() {
        FlowControl::Next => match classify_plain(instruction, info, wide) {
            Class::Copy | Class::Memory { .. } | Class::BitString { .. }
                if !wide && !is_in_64bit_code(instruction) =>
            {
                Class::Step
            }
            class => class,
        },
        FlowControl::UnconditionalBranch if direct => Class::Jump,
        FlowControl::IndirectBranch if instruction.code() == jump => {
            indirect(instruction, Class::JumpIndirect)
        }
        FlowControl::ConditionalBranch if direct => match instruction.mnemonic() {
            Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jecxz | Mnemonic::Jcxz => Class::Step,
            Mnemonic::Jrcxz => Class::Counted,
            Mnemonic::Loop if instruction.code() == Code::Loop_rel8_64_RCX => Class::Counted,
            Mnemonic::Loop => Class::Step,
            _ => Class::Conditional,
        },
        FlowControl::Return => match instruction.code() {
            Code::Retnq | Code::Retnq_imm16 if wide => Class::Return,
            Code::Retnd | Code::Retnd_imm16 if !wide => Class::Return,
            _ => Class::Step,
        },
        FlowControl::Call if direct => Class::Call,
        FlowControl::IndirectCall if instruction.code() == call => {
            indirect(instruction, Class::CallIndirect)
        }
        _ => Class::Step,
    }
}

/// Whether 64-bit code has such an instruction.
fn is_in_64bit_code(instruction: &Instruction) -> bool {
    general_form(instruction).op_code().mode64()
}

/// An indirect transfer's class, unless its memory operand can't be encoded.
fn indirect(instruction: &Instruction, class: Class) -> Class {
    let memory = instruction.op0_kind() == OpKind::Memory;
    if memory && !is_addressable(instruction) {
        Class::Step
    } else {
        class
    }
}

/// A near branch's distance from its page, if the translator can encode it.
fn reaches_target(instruction: &Instruction) -> bool {
    instruction.op0_kind() != OpKind::NearBranch64
        || i32::try_from(instruction.near_branch_target().cast_signed()).is_ok()
}

fn is_available(request: &Request<'_>, instruction: &Instruction) -> bool {
    let offered = request.host.offered.allows(instruction);
    let trapped = request.mode.fpu_traps() && crate::step::uses_fpu(instruction);
    let avx = request.mode.no_avx() && crate::step::is_avx(instruction);
    let sse = request.mode.no_sse() && crate::step::is_sse(instruction);
    offered && !trapped && !avx && !sse
}

fn classify_plain(
    instruction: &Instruction,
    info: &mut InstructionInfoFactory,
    wide: bool,
) -> Class {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Push => {
            return match instruction.code() {
                Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 if wide => Class::Push,
                Code::Push_r32 | Code::Pushd_imm8 | Code::Pushd_imm32 if !wide => Class::Push,
                Code::Push_rm64 if wide => indirect(instruction, Class::Push),
                Code::Push_rm32 if !wide => indirect(instruction, Class::Push),
                _ => Class::Step,
            };
        }
        M::Pop => {
            let register = instruction.op0_kind() == OpKind::Register;
            return match instruction.code() {
                Code::Pop_r64 | Code::Pop_rm64 if wide && register => Class::Pop,
                Code::Pop_r32 | Code::Pop_rm32 if !wide && register => Class::Pop,
                _ => Class::Step,
            };
        }
        M::Leave => {
            return if instruction.code() == Code::Leaveq {
                Class::Leave
            } else {
                Class::Step
            };
        }
        M::Lea => {
            return if is_addressable(instruction) {
                Class::Lea
            } else {
                Class::Step
            };
        }
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Cldemote
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchnta
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1 => return Class::Nop,
        // Register forms of PREFETCH are reserved: the processor decides.
        M::Reservednop if instruction.op0_kind() != OpKind::Register => return Class::Nop,
        M::Enter | M::Pushf | M::Pushfq | M::Popf | M::Popfq => return Class::Step,
        _ => {}
    }
    let has_memory =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    if !has_memory {
        return Class::Copy;
    }
    classify_memory(instruction, info)
}

fn classify_memory(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Class {
    use Mnemonic as M;
    if !is_addressable(instruction) {
        return Class::Step;
    }
    let used = info.info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
    let Some(memory) = used.used_memory().first() else {
        return Class::Step;
    };
    let bytes = memory.memory_size().size();
    let write = !matches!(memory.access(), OpAccess::Read | OpAccess::CondRead);
    let Ok(bytes) = u16::try_from(bytes) else {
        return Class::Step;
    };
    if bytes == 0 || bytes > 64 || used.used_memory().len() != 1 {
        return Class::Step;
    }
    let bit_string = matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && instruction.op1_kind() == OpKind::Register;
    if bit_string {
        return if bytes >= 4 && !has_short_address(instruction) {
            Class::BitString { bytes, write }
        } else {
            Class::Step
        };
    }
    let reads = !matches!(memory.access(), OpAccess::Write);
    Class::Memory {
        bytes,
        reads,
        write,
    }
}

/// Whether the translator can compute the memory operand's address.
fn is_addressable(instruction: &Instruction) -> bool {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    if instruction.is_vsib() || base == Register::EIP || base.is_gpr16() || index.is_gpr16() {
        return false;
    }
    if base == Register::RIP {
        return i32::try_from(instruction.ip_rel_memory_address().cast_signed()).is_ok();
    }
    if base == Register::None && index == Register::None {
        // 16-bit addresses, and 64-bit ones that no displacement holds.
        let disp = instruction.memory_displacement64();
        return match instruction.memory_displ_size() {
            4 => true,
            8 => i32::try_from(disp.cast_signed()).is_ok(),
            _ => false,
        };
    }
    true
}
