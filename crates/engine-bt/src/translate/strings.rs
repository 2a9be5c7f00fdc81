//! REP MOVS and REP STOS within a page on each side: the processor's own instruction, on host
//! addresses. All else goes to the monitor, which takes page by page.

use iced_x86::Mnemonic;

use crate::block::SiteKind;
use crate::hot::hot;
use crate::translate::asm::A;
use crate::translate::asm::Mem;
use crate::translate::asm::NZ;
use crate::translate::asm::RCX;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::cold::Cold;
use crate::translate::decode::Item;
use crate::translate::emit::Emitter;

const RSI: Reg = Reg(6);
const RDI: Reg = Reg(7);
const PAGE: i32 = 4096;

/// Element size as a shift, and whether the instruction has a source.
fn shape(mnemonic: Mnemonic) -> (u8, bool) {
    match mnemonic {
        Mnemonic::Movsb => (0, true),
        Mnemonic::Movsw => (1, true),
        Mnemonic::Movsd => (2, true),
        Mnemonic::Movsq => (3, true),
        Mnemonic::Stosb => (0, false),
        Mnemonic::Stosw => (1, false),
        Mnemonic::Stosd => (2, false),
        _ => (3, false),
    }
}

impl Emitter<'_> {
    pub(crate) fn string(&mut self, item: &Item) {
        let (shift, has_source) = shape(item.instruction.mnemonic());
        let site = self.open_site(SiteKind::Step, item.offset);
        let keep = self.flags_live;
        if keep {
            self.park_flags();
        }
        let mut slow = Vec::new();
        self.asm.cmp_mem8(Mem::gs(hot!(direction_flag) + 1), 0);
        slow.push(self.asm.jcc(NZ));
        // A count that can't fit a page must not overflow what follows.
        self.asm.cmp_imm32(RCX, PAGE);
        slow.push(self.asm.jcc(A));
        self.check_room(RDI, shift, &mut slow);
        if has_source {
            self.check_room(RSI, shift, &mut slow);
        }
        slow.push(self.load_entry(RDI, true));
        if has_source {
            self.asm.store(Mem::gs(hot!(spill, 2)), T1);
            slow.push(self.load_entry(RSI, false));
            self.asm.load(T0, Mem::gs(hot!(spill, 2)));
        } else {
            self.asm.mov(T0, T1);
        }
        if keep {
            self.give_back_flags();
        }
        self.cold.push(Cold::Monitor {
            from: slow,
            site,
            flags_parked: keep,
        });
        self.close_site(site);
        self.asm.lea(RDI, Mem::indexed(RDI, T0, 0));
        if has_source {
            self.asm.lea(RSI, Mem::indexed(RSI, T1, 0));
        }
        let kind = SiteKind::String { source: has_source };
        let site = self.open_site(kind, item.offset);
        let start = usize::from(item.offset);
        let bytes = &self.request.page[start..start + item.instruction.len()];
        self.asm.bytes(bytes);
        self.close_site(site);
        self.subtract(RDI, T0);
        if has_source {
            self.subtract(RSI, T1);
        }
    }

    /// Leaves unless RCX elements at `pointer` end in its page.
    fn check_room(
        &mut self,
        pointer: Reg,
        shift: u8,
        slow: &mut Vec<crate::translate::asm::Fixup>,
    ) {
        self.asm.mov32(T0, pointer);
        self.asm.and_imm32(T0, PAGE - 1);
        self.asm.lea(T0, Mem::indexed(T0, RCX, shift));
        self.asm.cmp_imm32(T0, PAGE);
        slow.push(self.asm.jcc(A));
    }

    /// `to -= by`, with the flags left alone; destroys `by`.
    fn subtract(&mut self, to: Reg, by: Reg) {
        self.asm.not(by);
        self.asm.lea(
            to,
            Mem {
                base: Some(to),
                index: Some((by, 0)),
                disp: 1,
                gs: false,
            },
        );
    }
}
