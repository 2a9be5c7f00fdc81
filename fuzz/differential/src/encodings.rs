//! All ways to encode unprivileged instructions of 64-bit code, by enumeration.
//!
//! Every prefix, map, opcode and ModRM form is decoded once; what is a valid instruction that both
//! sides may execute becomes a [`Form`]. Forms are sorted by instruction, so that each has the same
//! chance, however many encodings it has.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use iced_x86::Code;
use iced_x86::CpuidFeature;
use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::EncodingKind;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

/// Opcode map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Map {
    /// One byte.
    One,
    /// 0F.
    Two,
    /// 0F 38.
    ThreeA,
    /// 0F 3A.
    ThreeB,
}

/// One way to encode an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// With a VEX prefix.
    pub vex: bool,
    /// 0, 66, F3 or F2, as VEX numbers them.
    pub prefix: u8,
    /// Opcode map.
    pub map: Map,
    /// Opcode.
    pub opcode: u8,
    /// REX.W or VEX.W.
    pub w: bool,
    /// VEX.L.
    pub l: bool,
    /// ModRM names memory.
    pub memory: bool,
    /// Values of ModRM.reg that give this instruction, one bit each.
    pub regs: u8,
    /// Values of ModRM.rm that do, in register form.
    pub rms: u8,
}

/// The instructions of a kind, each with its forms.
#[derive(Debug, Default)]
pub struct Group {
    /// Forms by instruction.
    pub forms: Vec<Vec<Form>>,
}

/// All instructions.
#[derive(Debug, Default)]
pub struct Encodings {
    /// General registers, flags, stack, strings.
    pub integer: Group,
    /// Near branches.
    pub branches: Group,
    /// x87 and MMX.
    pub x87: Group,
    /// SSE to SSE4.2 and AES.
    pub sse: Group,
    /// VEX-encoded ones.
    pub vex: Group,
    /// What user code isn't allowed or what doesn't exist here.
    pub refused: Group,
}

/// Both sides execute it alike, or refuse it alike.
#[must_use]
pub fn is_comparable(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    if matches!(
        instruction.encoding(),
        EncodingKind::EVEX | EncodingKind::MVEX | EncodingKind::D3NOW
    ) {
        return false;
    }
    if !instruction
        .cpuid_features()
        .iter()
        .all(|&feature| is_shared(feature))
    {
        return false;
    }
    // Values that differ by nature, system calls, descriptors.
    let differs = matches!(
        instruction.mnemonic(),
        M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysexitq
            | M::Int
            | M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdrand
            | M::Rdseed
            | M::Rdpid
            | M::Rdpmc
            | M::Xgetbv
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Retf
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xrstor
            | M::Xrstor64
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fnsave
            | M::Fldenv
            | M::Frstor
            | M::Fstenv
            | M::Fsave
            | M::Popf
            | M::Popfq
            | M::Vmmcall
            | M::Vmcall
            | M::Vmgexit
            | M::Getsec
            | M::Loadall
            | M::Umov
            | M::Pvalidate
            | M::Psmash
            | M::Rmpadjust
            | M::Rmpupdate
            | M::Rmpquery
            | M::Stgi
            | M::Clgi
            | M::Skinit
            // Some hypervisors report another address for it.
            | M::Int1
            // Whether an empty mask faults is the processor's choice.
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
    );
    // How much a 16-bit MOVSXD reads differs from processor to processor.
    let short_movsxd = instruction.mnemonic() == M::Movsxd && instruction.op0_register().is_gpr16();
    if differs || short_movsxd || is_far(instruction) {
        return false;
    }
    let segment = |operand: u32| {
        instruction.op_kind(operand) == OpKind::Register
            && (instruction.op_register(operand).is_segment_register()
                || instruction.op_register(operand).is_k())
    };
    !(0..instruction.op_count()).any(segment)
}

/// Features whose instructions guests get as far as the host has them. What else there is, hosts
/// may have and guests don't: what is executed here and refused there can't be compared
/// (`tests/hidden.rs` has the guest's side of it).
fn is_shared(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL286_ONLY
            | F::INTEL386
            | F::INTEL386_ONLY
            | F::INTEL486
            | F::X64
            | F::ADX
            | F::AES
            | F::AVX
            | F::AVX2
            | F::AVX_IFMA
            | F::AVX_NE_CONVERT
            | F::AVX_VNNI
            | F::AVX_VNNI_INT16
            | F::AVX_VNNI_INT8
            | F::BMI1
            | F::BMI2
            | F::CET_IBT
            | F::CLDEMOTE
            | F::CLFLUSHOPT
            | F::CLFSH
            | F::CLWB
            | F::CMOV
            | F::CMPXCHG16B
            | F::CX8
            | F::F16C
            | F::FMA
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FSGSBASE
            | F::FXSR
            | F::GFNI
            | F::LZCNT
            | F::MMX
            | F::MOVBE
            | F::MOVDIRI
            | F::MSR
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::PCLMULQDQ
            | F::POPCNT
            | F::PREFETCHW
            | F::PREFETCHWT1
            | F::SEP
            | F::SERIALIZE
            | F::SHA
            | F::SHA512
            | F::SM3
            | F::SM4
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSE4A
            | F::SSE4_1
            | F::SSE4_2
            | F::SSSE3
            | F::SYSCALL
            | F::VAES
            | F::VPCLMULQDQ
            | F::WBNOINVD
            | F::XSAVE
    )
}

fn is_far(instruction: &Instruction) -> bool {
    let far = matches!(
        instruction.op0_kind(),
        OpKind::FarBranch16 | OpKind::FarBranch32
    );
    far || instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect()
}

/// The only one of its bytes.
const PREFIX_BYTES: [Option<u8>; 4] = [None, Some(0x66), Some(0xf3), Some(0xf2)];

/// What a form leaves open.
#[derive(Clone, Copy, Debug)]
pub struct Fill<'a> {
    /// Prefixes before all others.
    pub before: &'a [u8],
    /// ModRM.
    pub modrm: u8,
    /// SIB, where ModRM asks for it.
    pub sib: u8,
    /// REX.R, X and B.
    pub rxb: u8,
    /// VEX.vvvv, not inverted.
    pub vvvv: u8,
    /// Displacement and immediate.
    pub rest: [u8; 8],
    /// Displacement bytes that ModRM asks for.
    pub displacement: [u8; 4],
}

impl Form {
    /// The bytes of this form, with more behind them than it needs.
    #[must_use]
    pub fn bytes(&self, fill: &Fill<'_>) -> Vec<u8> {
        let mut bytes = fill.before.to_vec();
        if self.vex {
            let map = self.map as u8;
            let inverted = !fill.rxb & 7;
            bytes.push(0xc4);
            bytes.push(inverted << 5 | map);
            bytes.push(
                u8::from(self.w) << 7
                    | (!fill.vvvv & 15) << 3
                    | u8::from(self.l) << 2
                    | self.prefix,
            );
        } else {
            bytes.extend(PREFIX_BYTES[usize::from(self.prefix)]);
            let rex = 0x40 | u8::from(self.w) << 3 | fill.rxb & 7;
            if rex != 0x40 || fill.vvvv & 1 != 0 {
                bytes.push(rex);
            }
            match self.map {
                Map::One => {}
                Map::Two => bytes.push(0x0f),
                Map::ThreeA => bytes.extend([0x0f, 0x38]),
                Map::ThreeB => bytes.extend([0x0f, 0x3a]),
            }
        }
        bytes.push(self.opcode);
        bytes.push(fill.modrm);
        let (mode, rm) = (fill.modrm >> 6, fill.modrm & 7);
        if mode != 3 && rm == 4 {
            bytes.push(fill.sib);
        }
        let absolute = mode == 0 && (rm == 5 || (rm == 4 && fill.sib & 7 == 5));
        match mode {
            1 => bytes.push(fill.displacement[0]),
            2 => bytes.extend(fill.displacement),
            _ if absolute => bytes.extend(fill.displacement),
            _ => {}
        }
        bytes.extend(fill.rest);
        bytes
    }
}

/// Decodes one instruction.
#[must_use]
pub fn decode(bytes: &[u8], ip: u64) -> Instruction {
    Decoder::with_ip(64, bytes, ip, decoder_options()).decode()
}

/// AMD and Intel differ in a few corners.
#[must_use]
pub fn decoder_options() -> u32 {
    static OPTIONS: OnceLock<u32> = OnceLock::new();
    *OPTIONS.get_or_init(|| {
        if std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Auth") {
            DecoderOptions::AMD
        } else {
            DecoderOptions::NONE
        }
    })
}

impl Encodings {
    /// What both sides can be compared on.
    #[must_use]
    pub fn new() -> Self {
        Self::enumerate(is_comparable)
    }

    /// All that `wanted` takes.
    #[must_use]
    pub fn enumerate(wanted: impl Fn(&Instruction) -> bool) -> Self {
        let mut found: BTreeMap<Code, (Instruction, BTreeMap<[u8; 7], Form>)> = BTreeMap::new();
        for form in shapes() {
            for reg in 0..8_u8 {
                for rm in 0..8_u8 {
                    // With a SIB byte too: gathers want one.
                    if form.memory && rm != 3 && rm != 4 {
                        continue;
                    }
                    let modrm = if form.memory { 0x80 } else { 0xc0 } | rm | reg << 3;
                    let fill = Fill {
                        before: &[],
                        modrm,
                        sib: 0,
                        rxb: 0,
                        vvvv: 0,
                        rest: [0; 8],
                        displacement: [0; 4],
                    };
                    let instruction = decode(&form.bytes(&fill), 0);
                    if instruction.is_invalid() || !wanted(&instruction) {
                        continue;
                    }
                    let key = [
                        u8::from(form.vex),
                        form.prefix,
                        form.map as u8,
                        form.opcode,
                        u8::from(form.w),
                        u8::from(form.l),
                        u8::from(form.memory),
                    ];
                    let (_, forms) = found
                        .entry(instruction.code())
                        .or_insert_with(|| (instruction, BTreeMap::new()));
                    let known = forms.entry(key).or_insert(Form {
                        regs: 0,
                        rms: 0,
                        ..form
                    });
                    known.regs |= 1 << reg;
                    known.rms |= 1 << rm;
                }
            }
        }
        let mut all = Self::default();
        for (instruction, forms) in found.into_values() {
            all.group(&instruction)
                .forms
                .push(forms.into_values().collect());
        }
        all
    }

    fn group(&mut self, instruction: &Instruction) -> &mut Group {
        use CpuidFeature as F;
        let any = |wanted: &[CpuidFeature]| {
            instruction
                .cpuid_features()
                .iter()
                .any(|feature| wanted.contains(feature))
        };
        if instruction.is_privileged()
            || matches!(instruction.flow_control(), FlowControl::Exception)
        {
            return &mut self.refused;
        }
        if instruction.flow_control() != FlowControl::Next {
            return &mut self.branches;
        }
        if instruction.encoding() != EncodingKind::Legacy {
            return &mut self.vex;
        }
        if any(&[F::FPU, F::FPU287, F::FPU387, F::MMX]) {
            return &mut self.x87;
        }
        let vector = (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register
                && (instruction.op_register(operand).is_vector_register()
                    || instruction.op_register(operand).is_mm())
        });
        if vector || any(&[F::SSE, F::SSE2]) {
            return &mut self.sse;
        }
        &mut self.integer
    }
}

/// Every shape to try.
fn shapes() -> Vec<Form> {
    let mut shapes = Vec::new();
    for vex in [false, true] {
        let maps: &[Map] = if vex {
            &[Map::Two, Map::ThreeA, Map::ThreeB]
        } else {
            &[Map::One, Map::Two, Map::ThreeA, Map::ThreeB]
        };
        for &map in maps {
            for prefix in 0..4 {
                for opcode in 0..=255 {
                    if map == Map::One && is_prefix(opcode) {
                        continue;
                    }
                    for bits in 0..8_u8 {
                        let l = bits & 4 != 0;
                        if l && !vex {
                            continue;
                        }
                        shapes.push(Form {
                            vex,
                            prefix,
                            map,
                            opcode,
                            w: bits & 1 != 0,
                            l,
                            memory: bits & 2 != 0,
                            regs: 0,
                            rms: 0,
                        });
                    }
                }
            }
        }
    }
    shapes
}

/// Prefixes, escapes and the first bytes of VEX, EVEX and XOP.
fn is_prefix(byte: u8) -> bool {
    matches!(
        byte,
        0x0f | 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x62 | 0x64..=0x67 | 0xc4 | 0xc5 | 0xf0
            | 0xf2 | 0xf3
    )
}
