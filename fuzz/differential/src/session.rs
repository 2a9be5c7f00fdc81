//! Both sides, and batches that run on both.

use std::io;

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use ringfence_engine::EngineError;
use ringfence_engine_bt::Direct;

use crate::case::Case;
use crate::case::END_BYTE;
use crate::compare::differences;
use crate::encodings::decode;
use crate::encodings::is_comparable;
use crate::generate::Generator;
use crate::guest::Failure;
use crate::guest::Guest;
use crate::guest::Manner;
use crate::layout::ARENA_BYTES;
use crate::layout::CODE;
use crate::layout::CODE_BYTES;
use crate::layout::DATA;
use crate::layout::PAGE;
use crate::native::Native;
use crate::native::SYSTEM_CALL;
use crate::native::TIMEOUT;
use crate::random::Random;
use crate::state::MAX_CASES;
use crate::state::State;

const STACK_FAULT: u64 = 12;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
const ALIGNMENT: u64 = 17;
const SIMD: u64 = 19;

/// Both sides.
pub struct Session {
    native: Native,
    guest: Guest,
    direct: Direct,
}

/// What went wrong with a batch.
#[derive(Debug)]
pub struct Mismatch {
    /// The case whose state differs; none when memory does, or the engine gave up.
    pub case: Option<usize>,
    /// How it was run.
    pub manner: Manner,
    /// What differs.
    pub differences: Vec<String>,
}

/// Why a batch couldn't be compared.
#[derive(Debug)]
pub enum Trouble {
    /// The two sides differ.
    Mismatch(Mismatch),
    /// A case doesn't end natively.
    Endless,
    /// The host refused.
    Host(io::Error),
}

/// A batch: cases in their places, and the memory that they start with.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Its cases.
    pub cases: Vec<Case>,
    /// Seed of the memory.
    pub memory: u64,
}

impl Batch {
    /// Places as many of `cases` as there is room for.
    #[must_use]
    pub fn new(cases: Vec<Case>, random: &mut Random) -> Self {
        let mut at = CODE + random.below(64);
        let mut placed = Vec::new();
        for mut case in cases {
            let len = case.len() as u64;
            if at + len > CODE + CODE_BYTES as u64 || placed.len() == MAX_CASES {
                break;
            }
            case.state.rip = at;
            at += len + random.below(24);
            placed.push(case);
        }
        Self {
            cases: placed,
            memory: random.word(),
        }
    }

    /// The batch of a seed: one in four goes through all forms of all instructions.
    #[must_use]
    pub fn of_seed(generator: &Generator, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cases = (0..MAX_CASES)
            .map(|index| {
                if seed.is_multiple_of(4) {
                    let round = usize::try_from(seed / 4 % (1 << 32)).unwrap_or(0);
                    generator.enumerated(round * MAX_CASES + index, &mut random)
                } else {
                    generator.case(&mut random)
                }
            })
            .collect();
        Self::new(cases, &mut random)
    }

    /// The memory.
    #[must_use]
    pub fn arena(&self) -> Vec<u8> {
        let mut random = Random::new(self.memory);
        let mut arena = vec![END_BYTE; ARENA_BYTES];
        for chunk in arena[CODE_BYTES..].chunks_exact_mut(8) {
            let word = match random.below(16) {
                0 => DATA + random.below(12 * PAGE),
                1 => 0,
                2 => random.below(100),
                3 => CODE + random.below(CODE_BYTES as u64),
                _ => random.word(),
            };
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        for case in &self.cases {
            let code = case.code();
            let at = usize::try_from(case.state.rip - CODE).unwrap_or(0);
            arena[at..at + code.len()].copy_from_slice(&code);
        }
        arena
    }
}

impl Session {
    /// Why this host can't compare, if it can't.
    #[must_use]
    pub fn obstacle() -> Option<&'static str> {
        if !is_x86_feature_detected!("avx") {
            return Some("the processor has no AVX");
        }
        // SAFETY: reads the process's auxiliary vector. Bit 1: the kernel lets user code set bases.
        #[expect(unsafe_code, reason = "getauxval")]
        let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        (hwcap2 & 2 == 0).then_some("user code can't set the FS base (FSGSBASE)")
    }

    /// Starts both. Code is translated.
    ///
    /// # Errors
    /// When the host can't run one of them.
    pub fn new() -> Result<Self, EngineError> {
        Self::with(Direct::Never)
    }

    /// Starts both, with code run directly when `direct` says so.
    ///
    /// # Errors
    /// When the host can't run one of them.
    pub fn with(direct: Direct) -> Result<Self, EngineError> {
        let native = Native::new().map_err(EngineError::host("start a process for native code"))?;
        Ok(Self {
            native,
            guest: Guest::with(direct)?,
            direct,
        })
    }

    /// Runs a batch natively and in each of `manners`, and compares.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn run(&mut self, batch: &Batch, manners: &[Manner]) -> Result<(), Trouble> {
        let arena = batch.arena();
        let inputs: Vec<State> = batch.cases.iter().map(|case| case.state).collect();
        self.native.arena().copy_from_slice(&arena);
        let expected = self.native.run(&inputs).map_err(Trouble::Host)?;
        if expected.iter().any(|state| state.trap == TIMEOUT) {
            return Err(Trouble::Endless);
        }
        let excused = self.excused(batch, &arena, &expected);
        if !excused.is_empty() {
            return self.run(&without(batch, &excused), manners);
        }
        for &manner in manners {
            self.guest.set_arena(&arena);
            let result = self.guest.run(&inputs, manner);
            let suppressed = result.as_ref().map_or_else(
                |_| Vec::new(),
                |found| suppressed_stores(&arena, &expected, found),
            );
            if !suppressed.is_empty() {
                return self.run(&without(batch, &suppressed), manners);
            }
            self.judge(manner, &arena, &expected, result)?;
        }
        Ok(())
    }

    /// Cases that aren't compared: system calls by chance, #AC (which unaligned vectors raise is the
    /// processor's choice), a transfer to an address that isn't
    /// canonical (the processor faults before it, bt behind it), and code that was changed by
    /// chance (bt may have forgotten flags that the old code overwrote; see the engine's
    /// DESIGN.md for both).
    fn excused(&mut self, batch: &Batch, before: &[u8], expected: &[State]) -> Vec<usize> {
        let arena = self.native.arena();
        let changed = |case: &Case| {
            let start = usize::try_from(case.state.rip - CODE).unwrap_or(0);
            let patched = case.patched();
            (0..case.len())
                .filter(|at| !patched.contains(at))
                .any(|at| arena[start + at] != before[start + at])
        };
        let excused = |case: &Case, state: &State| {
            let last = last_instruction(arena, state).is_some_and(|instruction| {
                let transfers = matches!(
                    instruction.mnemonic(),
                    Mnemonic::Ret | Mnemonic::Call | Mnemonic::Jmp
                );
                // Parts of an 80-bit operand wrap at 4 GiB by themselves; some processors write
                // the first part, and then find that the second has no page.
                let stores = matches!(instruction.mnemonic(), Mnemonic::Fstp | Mnemonic::Fbstp);
                let parts = instruction.memory_size().size() == 10
                    && (stores || instruction.memory_base().is_gpr32());
                !is_comparable(&instruction)
                    || (state.trap == GENERAL_PROTECTION && transfers)
                    || (state.trap == PAGE_FAULT && parts)
            });
            last || matches!(state.trap, SYSTEM_CALL | ALIGNMENT) || changed(case)
        };
        (0..batch.cases.len())
            .filter(|&index| excused(&batch.cases[index], &expected[index]))
            .collect()
    }

    fn judge(
        &mut self,
        manner: Manner,
        before: &[u8],
        expected: &[State],
        result: Result<Vec<State>, Failure>,
    ) -> Result<(), Trouble> {
        let mismatch = |case, differences| {
            Err(Trouble::Mismatch(Mismatch {
                case,
                manner,
                differences,
            }))
        };
        let found = match result {
            Ok(found) => found,
            Err(failure) => {
                // What the guest is in now is unknown: a new one takes over.
                self.guest = Guest::with(self.direct)
                    .map_err(|error| Trouble::Host(io::Error::other(error)))?;
                return mismatch(None, vec![failure.to_string()]);
            }
        };
        for (index, (native, guest)) in expected.iter().zip(&found).enumerate() {
            let last = last_instruction(before, native);
            let mut differences = differences(native, guest, last.as_ref());
            if let Some(instruction) = last
                && is_order_of_faults(&instruction, native, guest)
            {
                differences.clear();
            }
            if !differences.is_empty() {
                return mismatch(Some(index), differences);
            }
        }
        let memory = self.guest.arena();
        let differing = memory
            .chunks(8)
            .zip(self.native.arena().chunks(8))
            .position(|(guest, native)| guest != native);
        match differing {
            None => Ok(()),
            Some(word) => {
                let native = self.native.arena()[word * 8..word * 8 + 8].to_vec();
                let text = format!(
                    "memory at arena offset {:#x}: before {:02x?}, native {native:02x?}, bt {:02x?}",
                    word * 8,
                    &before[word * 8..word * 8 + 8],
                    &memory[word * 8..word * 8 + 8]
                );
                mismatch(None, vec![text])
            }
        }
    }
}

/// A batch without some of its cases, by rising index.
fn without(batch: &Batch, indices: &[usize]) -> Batch {
    let mut rest = batch.clone();
    for &index in indices.iter().rev() {
        rest.cases.remove(index);
    }
    rest
}

/// Cases in which an x87 store, kept from storing by its unmasked exception, found no page. Some
/// processors don't look for the page then; bt always does.
fn suppressed_stores(arena: &[u8], expected: &[State], found: &[State]) -> Vec<usize> {
    const ERROR_SUMMARY: u8 = 1 << 7;
    let fault = |state: &State| matches!(state.trap, STACK_FAULT | GENERAL_PROTECTION | PAGE_FAULT);
    let suppressed = |native: &State, guest: &State| {
        fault(guest)
            && native.xsave[2] & ERROR_SUMMARY != 0
            && guest.xsave[2] & ERROR_SUMMARY == 0
            && last_instruction(arena, guest).is_some_and(|instruction| {
                matches!(
                    instruction.mnemonic(),
                    Mnemonic::Fst
                        | Mnemonic::Fstp
                        | Mnemonic::Fist
                        | Mnemonic::Fistp
                        | Mnemonic::Fisttp
                        | Mnemonic::Fbstp
                )
            })
    };
    (0..expected.len())
        .filter(|&index| suppressed(&expected[index], &found[index]))
        .collect()
}

/// The instruction that a case ended at.
fn last_instruction(arena: &[u8], state: &State) -> Option<Instruction> {
    let at = usize::try_from(state.rip.checked_sub(CODE)?).ok()?;
    let bytes = arena[..CODE_BYTES].get(at..(at + 15).min(CODE_BYTES))?;
    Some(decode(bytes, state.rip))
}

/// Two operands are wrong in two ways: which one is found out first is the processor's business.
fn is_order_of_faults(instruction: &Instruction, native: &State, guest: &State) -> bool {
    // VCVTPS2PH computes, and then stores.
    let converts = instruction.mnemonic() == Mnemonic::Vcvtps2ph;
    let fault = |state: &State| {
        matches!(state.trap, STACK_FAULT | GENERAL_PROTECTION | PAGE_FAULT)
            || (converts && state.trap == SIMD)
    };
    let two = matches!(instruction.mnemonic(), Mnemonic::Call | Mnemonic::Ret)
        || instruction.is_string_instruction()
        || converts;
    two && fault(native) && fault(guest) && native.rip == guest.rip && native.gpr == guest.gpr
}
