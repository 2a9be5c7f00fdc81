//! Accesses that cross a page, without the monitor.
//!
//! Unaligned vector code meets a page's end every few hundred bytes. The bytes around it are
//! copied to a buffer in [`crate::hot::Hot`], first page's end beside second page's start, and the instruction
//! works on the buffer; a store is copied back byte by byte, so that nothing beside it is touched.
//! The routines are made once a machine; blocks reach them from their cold code, with the guest
//! address in T0 and the address to return to in T1. They leave an addend in T1, as the probe does.

use crate::block::NewBlock;
use crate::host::Host;
use crate::hot::Gate;
use crate::hot::hot;
use crate::mode::Mode;
use crate::translate::Request;
use crate::translate::asm::A;
use crate::translate::asm::Fixup;
use crate::translate::asm::Mem;
use crate::translate::asm::NZ;
use crate::translate::asm::RAX;
use crate::translate::asm::RCX;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::emit::Emitter;
use crate::translate::plan::Plan;

const RSI: Reg = Reg(6);
const RDI: Reg = Reg(7);
/// Operand sizes that have routines; smaller ones use the first.
const SIZES: [i32; 3] = [8, 16, 32];
/// Bytes of one half of the buffer.
const HALF: i32 = 32;

/// A routine of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Routine {
    /// Fills the buffer; the instruction reads it.
    Read { user: bool, size: i32 },
    /// Checks that both pages may be written; the instruction writes the buffer.
    PrepareWrite { user: bool, size: i32 },
    /// Copies the buffer to both pages.
    FinishWrite { user: bool, size: i32 },
}

/// The routine that reads an operand; `None` for sizes that go to the monitor.
pub(crate) fn read_routine(user: bool, bytes: u16) -> Option<Routine> {
    let size = match bytes {
        2 | 4 | 8 => 8,
        16 => 16,
        32 => 32,
        _ => return None,
    };
    Some(Routine::Read { user, size })
}

/// The routines around a write of an operand; `None` for sizes that go to the monitor.
pub(crate) fn write_routines(user: bool, bytes: u16) -> Option<(Routine, Routine)> {
    let size = i32::from(bytes);
    SIZES.contains(&size).then_some((
        Routine::PrepareWrite { user, size },
        Routine::FinishWrite { user, size },
    ))
}

/// All routines.
pub(crate) fn routines() -> Vec<Routine> {
    let mut all = Vec::new();
    for user in [false, true] {
        for size in SIZES {
            all.push(Routine::Read { user, size });
            all.push(Routine::PrepareWrite { user, size });
            all.push(Routine::FinishWrite { user, size });
        }
    }
    all
}

/// The code of a routine.
pub(crate) fn build(routine: Routine, host: Host) -> NewBlock {
    let (Routine::Read { user, .. }
    | Routine::PrepareWrite { user, .. }
    | Routine::FinishWrite { user, .. }) = routine;
    let request = Request {
        page: &[0; 4096],
        offset: 0,
        mode: Mode::plain(64, user),
        host,
        plain_tsc: true,
    };
    let plan = Plan::default();
    let mut emitter = Emitter::new(&request, &plan);
    emitter.asm.store(Mem::gs(hot!(cross_saved, 4)), T1);
    emitter.asm.store(Mem::gs(hot!(cross_saved, 5)), RAX);
    emitter.asm.store(Mem::gs(hot!(cross_saved, 6)), RCX);
    match routine {
        Routine::Read { size, .. } => emitter.read_routine(size),
        Routine::PrepareWrite { size, .. } => emitter.prepare_routine(size),
        Routine::FinishWrite { size, .. } => emitter.finish_routine(size),
    }
    NewBlock {
        hot_len: emitter.asm.here(),
        code: emitter.asm.code,
        gate_places: emitter.gate_places,
        ..NewBlock::default()
    }
}

impl Emitter<'_> {
    /// Guest address of the second page into RAX.
    fn boundary(&mut self) {
        self.asm.lea(RAX, Mem::at(T0, 0xfff));
        self.asm.and_imm32_wide(RAX, -0x1000);
    }

    /// Branches off for an address that isn't canonical, or not in the half that user code has: the
    /// page number alone doesn't tell. Clobbers RCX.
    fn leave_unless_reachable(&mut self, address: Reg) -> Fixup {
        const HALF_BITS: u8 = 47;
        self.asm.mov(RCX, address);
        self.asm.sar(true, RCX, HALF_BITS);
        if self.request.mode.is_user() {
            self.asm.test(RCX, RCX);
            return self.asm.jcc(NZ);
        }
        self.asm.lea(RCX, Mem::at(RCX, 1));
        self.asm.cmp_imm32(RCX, 1);
        self.asm.jcc(A)
    }

    fn restore_and_return(&mut self) {
        self.asm.load(RCX, Mem::gs(hot!(cross_saved, 6)));
        self.asm.load(RAX, Mem::gs(hot!(cross_saved, 5)));
        self.asm.jmp_mem(Mem::gs(hot!(cross_saved, 4)));
    }

    /// A page without entry: the monitor takes the instruction over.
    fn give_up(&mut self, from: Vec<Fixup>) {
        for fixup in from {
            self.asm.fix_here(fixup);
        }
        self.asm.load(RCX, Mem::gs(hot!(cross_saved, 6)));
        self.asm.load(RAX, Mem::gs(hot!(cross_saved, 5)));
        self.gate(Gate::Crossing);
    }

    /// The addend that leads from the guest address to its place in the buffer, into T1. RAX holds
    /// the second page's address.
    fn buffer_addend(&mut self) {
        self.asm.load(T1, Mem::gs(hot!(cross_address)));
        self.asm.sub(T1, RAX);
        self.asm.lea(T1, Mem::at(T1, HALF));
    }

    fn copy_words(&mut self, size: i32, to: i32) {
        for word in 0..size / 8 {
            self.asm.load(RCX, Mem::at(T1, 8 * word));
            self.asm.store(Mem::gs(hot!(cross) + to + 8 * word), RCX);
        }
    }

    fn read_routine(&mut self, size: i32) {
        let near = self.leave_unless_reachable(T0);
        let first = self.load_entry(T0, false);
        self.boundary();
        let far = self.leave_unless_reachable(RAX);
        // The last bytes of the first page, up to the middle of the buffer.
        self.asm.lea(
            T1,
            Mem {
                base: Some(T1),
                index: Some((RAX, 0)),
                disp: -size,
                gs: false,
            },
        );
        self.copy_words(size, HALF - size);
        let second = self.load_entry(RAX, false);
        self.asm.lea(T1, Mem::indexed(T1, RAX, 0));
        self.copy_words(size, HALF);
        self.buffer_addend();
        self.restore_and_return();
        self.give_up(vec![near, first, far, second]);
    }

    fn prepare_routine(&mut self, _size: i32) {
        let near = self.leave_unless_reachable(T0);
        let first = self.load_entry(T0, true);
        self.boundary();
        let far = self.leave_unless_reachable(RAX);
        let second = self.load_entry(RAX, true);
        self.buffer_addend();
        self.restore_and_return();
        self.give_up(vec![near, first, far, second]);
    }

    /// T0 is the guest address, and the flags are the instruction's: they are parked in RAX,
    /// which the routine has saved.
    fn finish_routine(&mut self, size: i32) {
        self.asm.save_flags();
        self.asm.store(Mem::gs(hot!(cross_saved, 0)), RAX);
        self.asm.store(Mem::gs(hot!(cross_saved, 1)), RSI);
        self.asm.store(Mem::gs(hot!(cross_saved, 2)), RDI);
        let first = self.load_entry(T0, true);
        self.boundary();
        // From the buffer's middle less what is before the boundary.
        self.asm.mov(RCX, RAX);
        self.asm.sub(RCX, T0);
        self.asm.load(RSI, Mem::gs(hot!(cross_address)));
        self.asm.lea(RSI, Mem::at(RSI, HALF));
        self.asm.sub(RSI, RCX);
        self.asm.lea(RDI, Mem::indexed(T0, T1, 0));
        self.asm.store(Mem::gs(hot!(cross_saved, 3)), RCX);
        self.asm.bytes(&[0xf3, 0xa4]);
        let second = self.load_entry(RAX, true);
        self.asm.lea(RDI, Mem::indexed(T1, RAX, 0));
        self.asm.mov_imm32(RCX, size.unsigned_abs());
        self.asm.sub_mem(RCX, Mem::gs(hot!(cross_saved, 3)));
        self.asm.bytes(&[0xf3, 0xa4]);
        self.asm.load(RSI, Mem::gs(hot!(cross_saved, 1)));
        self.asm.load(RDI, Mem::gs(hot!(cross_saved, 2)));
        self.asm.load(RAX, Mem::gs(hot!(cross_saved, 0)));
        self.asm.restore_flags();
        self.restore_and_return();
        // Both entries were there when the write was prepared, and nothing came between.
        for fixup in [first, second] {
            self.asm.fix_here(fixup);
        }
        self.asm.bytes(&[0x0f, 0x0b]);
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use iced_x86::Decoder;
    use iced_x86::DecoderOptions;
    use iced_x86::Register;

    use super::*;
    use crate::hot::Hot;

    /// Groups keep up to three guest registers there while an access in between crosses a page.
    #[test]
    fn a_crossing_access_leaves_borrowed_registers_alone() {
        let spill = offset_of!(Hot, spill) as u64..offset_of!(Hot, mask_user) as u64;
        for routine in routines() {
            let code = build(routine, Host::detect()).code;
            for instruction in &mut Decoder::new(64, &code, DecoderOptions::NONE) {
                let at = instruction.memory_displacement64();
                let hot = instruction.memory_segment() == Register::GS
                    && instruction.memory_base() == Register::None;
                assert!(!hot || !spill.contains(&at), "{routine:?}: {instruction}");
            }
        }
    }
}
