//! A small assembler for the sequences that the translator adds around guest instructions.
//!
//! It knows only what those sequences need. Guest instructions themselves are copied or
//! re-encoded by iced-x86.

/// A host general register by its encoding number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reg(pub u8);

/// The accumulator; LAHF and SAHF work on it.
pub(crate) const RAX: Reg = Reg(0);
/// The counter; JRCXZ tests it.
pub(crate) const RCX: Reg = Reg(1);
/// The guest's stack pointer, in its own register.
pub(crate) const RSP: Reg = Reg(4);
/// Scratch: holds the guest address at a memory site and the target of an indirect transfer.
/// Guest R11 lives in memory.
pub(crate) const T0: Reg = Reg(11);
/// Scratch: holds the addend at a memory site. Guest R10 lives in memory.
pub(crate) const T1: Reg = Reg(10);

impl Reg {
    fn low(self) -> u8 {
        self.0 & 7
    }

    fn high(self) -> u8 {
        self.0 >> 3
    }
}

/// A memory operand in a host address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mem {
    pub base: Option<Reg>,
    /// Index register and the base-2 logarithm of its scale.
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
    /// Relative to the host's GS base.
    pub gs: bool,
}

impl Mem {
    /// `gs:[disp]`.
    pub(crate) fn gs(disp: i32) -> Self {
        Self {
            base: None,
            index: None,
            disp,
            gs: true,
        }
    }

    /// `gs:[index * 8 + disp]`.
    pub(crate) fn gs_table(index: Reg, disp: i32) -> Self {
        Self {
            base: None,
            index: Some((index, 3)),
            disp,
            gs: true,
        }
    }

    /// `[base + disp]`.
    pub(crate) fn at(base: Reg, disp: i32) -> Self {
        Self {
            base: Some(base),
            index: None,
            disp,
            gs: false,
        }
    }

    /// `[base + index << shift]`.
    pub(crate) fn indexed(base: Reg, index: Reg, shift: u8) -> Self {
        Self {
            base: Some(base),
            index: Some((index, shift)),
            disp: 0,
            gs: false,
        }
    }
}

/// A condition code, as in the low nibble of Jcc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cond(pub u8);

/// Zero.
pub(crate) const Z: Cond = Cond(4);
/// Not zero.
pub(crate) const NZ: Cond = Cond(5);
/// Above, unsigned.
pub(crate) const A: Cond = Cond(7);

/// Machine code under construction. Positions are byte offsets.
#[derive(Default)]
pub(crate) struct Asm {
    pub code: Vec<u8>,
    /// Branches by the places of their displacements, and where they go.
    pub branches: Vec<(usize, usize)>,
}

/// The place of a 32-bit branch displacement that waits for its target.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Fixup(pub usize);

impl Asm {
    /// Current position.
    pub(crate) fn here(&self) -> usize {
        self.code.len()
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Points a branch at `target`.
    pub(crate) fn fix(&mut self, fixup: Fixup, target: usize) {
        let from = fixup.0 + 4;
        let distance = i32::try_from(target.cast_signed() - from.cast_signed())
            .expect("a block is far smaller than 2 GiB");
        self.code[fixup.0..from].copy_from_slice(&distance.to_le_bytes());
        self.branches.push((fixup.0, target));
    }

    /// Points a branch at the current position.
    pub(crate) fn fix_here(&mut self, fixup: Fixup) {
        self.fix(fixup, self.here());
    }

    /// Prefixes, opcode and ModRM of `opcode reg, mem`.
    fn op_mem(&mut self, wide: bool, opcode: &[u8], reg: Reg, mem: Mem) {
        if mem.gs {
            self.code.push(0x65);
        }
        let index_high = mem.index.map_or(0, |(index, _)| index.high());
        let base_high = mem.base.map_or(0, Reg::high);
        self.rex(wide, reg.high(), index_high, base_high);
        self.bytes(opcode);
        self.modrm_mem(reg.low(), mem);
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | reg << 2 | index << 1 | base;
        if rex != 0x40 {
            self.code.push(rex);
        }
    }

    fn modrm_mem(&mut self, reg: u8, mem: Mem) {
        let field = reg << 3;
        let Some(base) = mem.base else {
            // No base: SIB with base 101 and a 32-bit displacement.
            let (index, shift) = mem
                .index
                .map_or((4, 0), |(index, shift)| (index.low(), shift));
            self.bytes(&[field | 4, shift << 6 | index << 3 | 5]);
            self.imm32(mem.disp);
            return;
        };
        let short = i8::try_from(mem.disp);
        // RBP and R13 as base have no form without displacement.
        let mode = match (mem.disp, short) {
            (0, _) if base.low() != 5 => 0x00,
            (_, Ok(_)) => 0x40,
            _ => 0x80,
        };
        match mem.index {
            Some((index, shift)) => {
                self.bytes(&[mode | field | 4, shift << 6 | index.low() << 3 | base.low()]);
            }
            None if base.low() == 4 => self.bytes(&[mode | field | 4, 0x24]),
            None => self.code.push(mode | field | base.low()),
        }
        match (mode, short) {
            (0x40, Ok(disp)) => self.code.push(disp.cast_unsigned()),
            (0x80, _) => self.imm32(mem.disp),
            _ => {}
        }
    }

    fn op_reg(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        self.rex(wide, reg.high(), 0, rm.high());
        self.bytes(opcode);
        self.code.push(0xc0 | reg.low() << 3 | rm.low());
    }

    /// `mov reg, [mem]`, 64 bits.
    pub(crate) fn load(&mut self, reg: Reg, mem: Mem) {
        self.op_mem(true, &[0x8b], reg, mem);
    }

    /// `mov reg, [mem]`, 32 bits, zero-extended.
    pub(crate) fn load32(&mut self, reg: Reg, mem: Mem) {
        self.op_mem(false, &[0x8b], reg, mem);
    }

    /// `mov [mem], reg`, 64 bits.
    pub(crate) fn store(&mut self, mem: Mem, reg: Reg) {
        self.op_mem(true, &[0x89], reg, mem);
    }

    /// `mov [mem], reg`, 32 bits.
    pub(crate) fn store32(&mut self, mem: Mem, reg: Reg) {
        self.op_mem(false, &[0x89], reg, mem);
    }

    /// `mov qword [mem], imm32` (sign-extended).
    pub(crate) fn store_imm(&mut self, mem: Mem, value: i32) {
        self.op_mem(true, &[0xc7], Reg(0), mem);
        self.imm32(value);
    }

    /// `mov dword [mem], imm32`.
    pub(crate) fn store_imm32(&mut self, mem: Mem, value: i32) {
        self.op_mem(false, &[0xc7], Reg(0), mem);
        self.imm32(value);
    }

    /// `lea reg, [mem]`, 64 bits.
    pub(crate) fn lea(&mut self, reg: Reg, mem: Mem) {
        self.op_mem(true, &[0x8d], reg, mem);
    }

    /// `lea reg, [mem]`, 32 bits: the address is cut to 32 bits and zero-extended.
    pub(crate) fn lea32(&mut self, reg: Reg, mem: Mem) {
        self.op_mem(false, &[0x8d], reg, mem);
    }

    /// `mov to, from`, 64 bits.
    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x8b], to, from);
    }

    /// `mov to, from`, 32 bits, zero-extended.
    pub(crate) fn mov32(&mut self, to: Reg, from: Reg) {
        self.op_reg(false, &[0x8b], to, from);
    }

    /// `movsxd to, from`: the low 32 bits, sign-extended.
    pub(crate) fn movsxd(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x63], to, from);
    }

    /// `mov reg32, imm32`, zero-extended. Returns the place of the immediate.
    pub(crate) fn mov_imm32(&mut self, reg: Reg, value: u32) -> usize {
        self.rex(false, 0, 0, reg.high());
        self.code.push(0xb8 | reg.low());
        let place = self.here();
        self.bytes(&value.to_le_bytes());
        place
    }

    /// `not reg`, which leaves the flags alone.
    pub(crate) fn not(&mut self, reg: Reg) {
        self.op_reg(true, &[0xf7], Reg(2), reg);
    }

    /// `shl reg, n`.
    pub(crate) fn shl(&mut self, reg: Reg, count: u8) {
        self.op_reg(true, &[0xc1], Reg(4), reg);
        self.code.push(count);
    }

    /// `shr reg, n`.
    pub(crate) fn shr(&mut self, reg: Reg, count: u8) {
        self.op_reg(true, &[0xc1], Reg(5), reg);
        self.code.push(count);
    }

    /// `sar reg, n`, 64 or 32 bits.
    pub(crate) fn sar(&mut self, wide: bool, reg: Reg, count: u8) {
        self.op_reg(wide, &[0xc1], Reg(7), reg);
        self.code.push(count);
    }

    /// `and reg32, imm8`.
    pub(crate) fn and_imm8(&mut self, reg: Reg, value: u8) {
        self.op_reg(false, &[0x83], Reg(4), reg);
        self.code.push(value);
    }

    /// `xor to, from`, 64 bits.
    pub(crate) fn xor(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x33], to, from);
    }

    /// `test a, b`, 64 bits.
    pub(crate) fn test(&mut self, a: Reg, b: Reg) {
        self.op_reg(true, &[0x85], a, b);
    }

    /// `test reg8, imm8` on the lowest byte.
    pub(crate) fn test_low(&mut self, reg: Reg, value: u8) {
        // SPL, BPL, SIL and DIL need a REX prefix, even an empty one.
        if reg.0 >= 8 {
            self.code.push(0x41);
        } else if reg.0 >= 4 {
            self.code.push(0x40);
        }
        self.bytes(&[0xf6, 0xc0 | reg.low(), value]);
    }

    /// `test reg32, imm32`.
    pub(crate) fn test_imm32(&mut self, reg: Reg, value: i32) {
        self.op_reg(false, &[0xf7], Reg(0), reg);
        self.imm32(value);
    }

    /// `movzx to, from8`, zero-extended to 64 bits.
    pub(crate) fn movzx8(&mut self, to: Reg, from: Reg) {
        debug_assert!(
            from.0 < 4 || from.0 >= 8,
            "SPL and its like need a REX prefix"
        );
        self.op_reg(false, &[0x0f, 0xb6], to, from);
    }

    /// `or to, from`, 64 bits.
    pub(crate) fn or(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x0b], to, from);
    }

    /// `or to, [mem]`, 64 bits.
    pub(crate) fn or_mem(&mut self, to: Reg, mem: Mem) {
        self.op_mem(true, &[0x0b], to, mem);
    }

    /// `and to, [mem]`, 64 bits.
    pub(crate) fn and_mem(&mut self, to: Reg, mem: Mem) {
        self.op_mem(true, &[0x23], to, mem);
    }

    /// `sub to, from`, 64 bits.
    pub(crate) fn sub(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x2b], to, from);
    }

    /// `sub to, [mem]`, 64 bits.
    pub(crate) fn sub_mem(&mut self, to: Reg, mem: Mem) {
        self.op_mem(true, &[0x2b], to, mem);
    }

    /// `and reg32, imm32`.
    pub(crate) fn and_imm32(&mut self, reg: Reg, value: i32) {
        self.op_reg(false, &[0x81], Reg(4), reg);
        self.imm32(value);
    }

    /// `and reg, imm32`, 64 bits, sign-extended.
    pub(crate) fn and_imm32_wide(&mut self, reg: Reg, value: i32) {
        self.op_reg(true, &[0x81], Reg(4), reg);
        self.imm32(value);
    }

    /// `cmp reg, imm32`, 64 bits, sign-extended.
    pub(crate) fn cmp_imm32(&mut self, reg: Reg, value: i32) {
        self.op_reg(true, &[0x81], Reg(7), reg);
        self.imm32(value);
    }

    /// Clears all arithmetic flags: 0 + 1 in `reg`.
    pub(crate) fn clear_flags(&mut self, reg: Reg) {
        self.op_reg(false, &[0x33], reg, reg);
        self.op_reg(false, &[0x83], Reg(0), reg);
        self.code.push(1);
    }

    /// `lea reg, [rip + ...]`: the address of a place in this code.
    pub(crate) fn lea_place(&mut self, reg: Reg) -> Fixup {
        self.rex(true, reg.high(), 0, 0);
        self.bytes(&[0x8d, reg.low() << 3 | 5]);
        self.branch()
    }

    /// `cmp byte [mem], imm8`.
    pub(crate) fn cmp_mem8(&mut self, mem: Mem, value: u8) {
        self.op_mem(false, &[0x80], Reg(7), mem);
        self.code.push(value);
    }

    /// `cmp dword [mem], imm32`.
    pub(crate) fn cmp_mem32(&mut self, mem: Mem, value: i32) {
        self.op_mem(false, &[0x81], Reg(7), mem);
        self.imm32(value);
    }

    /// `cmp reg, [mem]`, 64 bits.
    pub(crate) fn cmp_with_mem(&mut self, reg: Reg, mem: Mem) {
        self.op_mem(true, &[0x3b], reg, mem);
    }

    /// `pext to, from, gs:[mask]`, which leaves the flags alone.
    pub(crate) fn pext(&mut self, to: Reg, from: Reg, mask: i32) {
        // VEX.LZ.F3.0F38.W1 F5 /r
        let r = (to.high() ^ 1) << 7;
        let vvvv = (!from.0 & 0xf) << 3;
        self.bytes(&[0x65, 0xc4, r | 0x40 | 0x20 | 0x02, 0x80 | vvvv | 0x02, 0xf5]);
        self.modrm_mem(to.low(), Mem::gs(mask));
    }

    /// `jcc` forwards.
    pub(crate) fn jcc(&mut self, cond: Cond) -> Fixup {
        self.bytes(&[0x0f, 0x80 | cond.0]);
        self.branch()
    }

    /// `jmp` forwards.
    pub(crate) fn jmp(&mut self) -> Fixup {
        self.code.push(0xe9);
        self.branch()
    }

    fn branch(&mut self) -> Fixup {
        let place = self.here();
        self.imm32(0);
        Fixup(place)
    }

    /// A `jmp` whose displacement is aligned, so that it can be replaced while other processors
    /// run it.
    pub(crate) fn jmp_aligned(&mut self) -> Fixup {
        self.align_branch(1);
        self.jmp()
    }

    /// A `jcc` whose displacement is aligned.
    pub(crate) fn jcc_aligned(&mut self, cond: Cond) -> Fixup {
        self.align_branch(2);
        self.jcc(cond)
    }

    fn align_branch(&mut self, opcode_len: usize) {
        const NOPS: [&[u8]; 4] = [&[], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00]];
        let padding = (4 - (self.here() + opcode_len) % 4) % 4;
        self.bytes(NOPS[padding]);
    }

    /// `jrcxz` over the next `distance` bytes.
    pub(crate) fn jrcxz(&mut self, distance: u8) {
        self.bytes(&[0xe3, distance]);
    }

    /// `jmp` over the next `distance` bytes.
    pub(crate) fn jmp_short(&mut self, distance: u8) {
        self.bytes(&[0xeb, distance]);
    }

    /// `jmp [mem]`.
    pub(crate) fn jmp_mem(&mut self, mem: Mem) {
        self.op_mem(false, &[0xff], Reg(4), mem);
    }

    /// `lahf; seto al`: the arithmetic flags into AX.
    pub(crate) fn save_flags(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// `add al, 0x7f; sahf`: the arithmetic flags out of AX.
    pub(crate) fn restore_flags(&mut self) {
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Decoder;
    use iced_x86::DecoderOptions;
    use iced_x86::FastFormatter;

    use super::*;

    fn text(build: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::default();
        build(&mut asm);
        let mut decoder = Decoder::with_ip(64, &asm.code, 0, DecoderOptions::NONE);
        let mut formatter = FastFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut line = String::new();
            formatter.format(&decoder.decode(), &mut line);
            lines.push(line);
        }
        lines.join("; ")
    }

    #[test]
    fn memory_operands_take_every_base_and_index() {
        for base in 0..16 {
            for index in (0..16).filter(|&index| index != 4) {
                for disp in [0, 8, -128, 0x1234] {
                    let mem = Mem {
                        base: Some(Reg(base)),
                        index: Some((Reg(index), 2)),
                        disp,
                        gs: false,
                    };
                    let shown = text(|asm| asm.load(T1, mem));
                    assert!(shown.starts_with("mov r10,"), "{shown}");
                    assert!(shown.contains("*4"), "{shown}");
                    assert!(!shown.contains(';'), "{shown}");
                }
            }
            let shown = text(|asm| asm.lea(T0, Mem::at(Reg(base), -8)));
            assert!(shown.starts_with("lea r11,["), "{shown}");
            assert!(shown.ends_with("-8h]"), "{shown}");
        }
    }

    #[test]
    fn the_probe_reads_as_intended() {
        let shown = text(|asm| {
            asm.test_low(RSP, 7);
            asm.pext(T1, T0, 0x100);
            asm.not(T1);
            asm.load(T1, Mem::gs_table(T1, -0x40));
            asm.test(T1, T1);
        });
        assert_eq!(
            shown,
            "test spl,7h; pext r10,r11,gs:[100h]; not r10; \
             mov r10,gs:[r10*8-40h]; test r10,r10"
        );
    }

    #[test]
    fn pext_encodes_every_pair() {
        for to in 0..16 {
            for from in 0..16 {
                let shown = text(|asm| asm.pext(Reg(to), Reg(from), 8));
                assert!(shown.starts_with("pext r"), "{shown}");
            }
        }
    }

    #[test]
    fn patched_branches_are_aligned() {
        for padding in 0..4 {
            let mut asm = Asm::default();
            asm.bytes(&vec![0x90; padding]);
            assert_eq!(asm.jmp_aligned().0 % 4, 0);
            assert_eq!(asm.jcc_aligned(NZ).0 % 4, 0);
        }
    }
}
