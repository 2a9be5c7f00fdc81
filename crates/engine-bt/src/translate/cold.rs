//! Code that is rarely run, placed after the block.

use crate::block::Link;
use crate::hot::Gate;
use crate::hot::hot;
use crate::translate::asm::Fixup;
use crate::translate::asm::Mem;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::asm::Z;
use crate::translate::crossing::Routine;
use crate::translate::decode::Item;
use crate::translate::emit::BORROWED_SLOT;
use crate::translate::emit::Emitter;
use crate::translate::emit::position;
use crate::translate::memory::Spot;

/// What becomes of an access that crosses a page.
#[derive(Clone, Copy)]
pub(crate) enum Crossing {
    /// The monitor takes the instruction.
    Monitor,
    /// The instruction reads a buffer: go on behind the probe.
    Read {
        routine: Routine,
        behind_probe: usize,
    },
    /// The instruction, repeated here, writes a buffer.
    Write {
        routines: (Routine, Routine),
        item: Item,
        end: usize,
    },
    /// On with a translation without groups, from the instruction at this offset.
    Ungroup(u16),
}

/// A piece of cold code and the branches that lead to it.
pub(crate) enum Cold {
    /// A memory site that missed: put the flags back and call the monitor.
    Miss {
        from: Vec<Fixup>,
        site: usize,
        /// Register with the guest address.
        address: Reg,
        /// RAX holds the flags.
        flags_parked: bool,
    },
    /// A misaligned access: does it cross a page?
    Misaligned {
        from: Fixup,
        back: usize,
        /// What to do when it does.
        crossing: Crossing,
        /// The site, if the monitor is asked.
        site: usize,
        address: Reg,
        bytes: u16,
        flags_parked: bool,
    },
    /// An instruction that the monitor executes after all.
    Monitor {
        from: Vec<Fixup>,
        site: usize,
        flags_parked: bool,
    },
    /// A group's range crosses a page: go on in a translation without groups.
    Ungroup {
        from: Vec<Fixup>,
        /// Offset of the instruction to go on at.
        offset: u16,
        flags_parked: bool,
        held: Vec<(Reg, usize)>,
    },
    /// A direct jump within the page, to be linked.
    Link {
        from: Fixup,
        target: u16,
        backward: bool,
        plain: bool,
    },
    /// A jump out of the block while registers are borrowed.
    Exit {
        from: Fixup,
        target: i64,
        held: Vec<(Reg, usize)>,
    },
    /// Emitted already.
    Done,
}

impl Emitter<'_> {
    /// Emits all cold code. Pieces may add further ones.
    pub(crate) fn finish_cold(&mut self) {
        let mut index = 0;
        while index < self.cold.len() {
            // A miss that a later piece leads to waits until that piece is emitted.
            let cold = std::mem::replace(&mut self.cold[index], Cold::Done);
            self.emit_cold(cold);
            index += 1;
        }
    }

    fn emit_crossing(&mut self, crossing: Crossing, site: usize, address: Reg, flags_parked: bool) {
        if address != T0 && !matches!(crossing, Crossing::Ungroup(_)) {
            self.asm.mov(T0, address);
        }
        match crossing {
            Crossing::Monitor => {
                if flags_parked {
                    self.give_back_flags();
                }
                self.name_site(site);
                self.gate(Gate::Memory);
            }
            Crossing::Read {
                routine,
                behind_probe,
            } => {
                self.name_cross_site(site);
                let back = self.asm.lea_place(T1);
                self.asm.fix(back, behind_probe);
                self.routine(routine);
            }
            Crossing::Write {
                routines: (prepare, finish),
                item,
                end,
            } => {
                self.name_cross_site(site);
                let prepared = self.asm.lea_place(T1);
                self.routine(prepare);
                self.asm.fix_here(prepared);
                if flags_parked {
                    self.give_back_flags();
                }
                let spot = Spot {
                    base: T0,
                    index: Some(T1),
                    disp: 0,
                };
                self.operation(&item, site, spot);
                let finished = self.asm.lea_place(T1);
                self.routine(finish);
                self.asm.fix_here(finished);
                let jump = self.asm.jmp();
                self.asm.fix(jump, end);
            }
            Crossing::Ungroup(offset) => self.emit_cold(Cold::Ungroup {
                from: Vec::new(),
                offset,
                flags_parked,
                held: self.sites[site].held[..self.sites[site].held_at_start.into()]
                    .iter()
                    .flatten()
                    .map(|&(register, slot)| (Reg(register), slot.into()))
                    .collect(),
            }),
        }
    }

    fn name_cross_site(&mut self, site: usize) {
        self.asm
            .store_imm32(Mem::gs(hot!(cross_site)), position(site).cast_signed());
        self.site_places.push(self.asm.here() - 4);
    }

    fn routine(&mut self, routine: Routine) {
        let place = self.asm.jmp().0;
        self.routine_places.push((place, routine));
    }

    fn give_back(&mut self, held: &[(Reg, usize)]) {
        for &(register, slot) in held {
            self.asm
                .load(register, Mem::gs(hot!(spill, BORROWED_SLOT + slot)));
        }
    }

    fn emit_cold(&mut self, cold: Cold) {
        match cold {
            Cold::Done => {}
            Cold::Miss {
                from,
                site,
                address,
                flags_parked,
            } => {
                for fixup in from {
                    self.asm.fix_here(fixup);
                }
                if address != T0 {
                    self.asm.mov(T0, address);
                }
                if flags_parked {
                    self.give_back_flags();
                }
                self.name_site(site);
                self.gate(Gate::Memory);
            }
            Cold::Misaligned {
                from,
                back,
                crossing,
                site,
                address,
                bytes,
                flags_parked,
            } => {
                self.asm.fix_here(from);
                self.asm.lea(T1, Mem::at(address, i32::from(bytes) - 1));
                self.asm.xor(T1, address);
                self.asm.test_imm32(T1, 0x1000);
                let same_page = self.asm.jcc(Z);
                self.asm.fix(same_page, back);
                self.emit_crossing(crossing, site, address, flags_parked);
            }
            Cold::Monitor {
                from,
                site,
                flags_parked,
            } => {
                for fixup in from {
                    self.asm.fix_here(fixup);
                }
                if flags_parked {
                    self.give_back_flags();
                }
                self.name_site(site);
                self.gate(Gate::Step);
            }
            Cold::Ungroup {
                from,
                offset,
                flags_parked,
                held,
            } => {
                for fixup in from {
                    self.asm.fix_here(fixup);
                }
                if flags_parked {
                    self.give_back_flags();
                }
                self.give_back(&held);
                let from = self.asm.jmp_aligned();
                self.cold.push(Cold::Link {
                    from,
                    target: offset,
                    backward: false,
                    plain: true,
                });
            }
            Cold::Link {
                from,
                target,
                backward,
                plain,
            } => {
                self.asm.fix_here(from);
                let number = self.links.len();
                self.links.push(Link {
                    target,
                    backward,
                    plain,
                    place: position(from.0),
                });
                let place = self.asm.mov_imm32(T1, position(number));
                self.link_places.push(place);
                self.gate(Gate::Link);
            }
            Cold::Exit { from, target, held } => {
                self.asm.fix_here(from);
                self.give_back(&held);
                self.jump_to(target);
            }
        }
    }
}
