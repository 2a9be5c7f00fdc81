//! Host code for a block.

use iced_x86::Encoder;
use iced_x86::Instruction;
use iced_x86::Register;

use crate::block::BODY_ENTRY;
use crate::block::Link;
use crate::block::NewBlock;
use crate::block::POLL_ENTRY;
use crate::block::Site;
use crate::block::SiteKind;
use crate::block::small;
use crate::hot::Gate;
use crate::hot::hot;
use crate::translate::Class;
use crate::translate::Request;
use crate::translate::asm::Asm;
use crate::translate::asm::Fixup;
use crate::translate::asm::Mem;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::cold::Cold;
use crate::translate::crossing::Routine;
use crate::translate::decode::Item;
use crate::translate::decode::leaves;
use crate::translate::decode::target;
use crate::translate::flags::live_before;
use crate::translate::plan::Plan;
use crate::translate::rename::addresses;
use crate::translate::rename::general_form;
use crate::translate::rename::mentions;
use crate::translate::rename::rename;
use crate::translate::rename::set_memory;

/// First spill slot of borrowed registers; the slots before it serve single instructions.
pub(crate) const BORROWED_SLOT: usize = 4;

/// A block under construction.
pub(crate) struct Emitter<'a> {
    pub request: &'a Request<'a>,
    pub plan: &'a Plan,
    pub asm: Asm,
    pub sites: Vec<Site>,
    pub links: Vec<Link>,
    pub cold: Vec<Cold>,
    pub site_places: Vec<usize>,
    pub link_places: Vec<usize>,
    pub gate_places: Vec<(usize, Gate)>,
    pub routine_places: Vec<(usize, Routine)>,
    encoder: Encoder,
    /// Flags are live at the instruction being emitted.
    pub flags_live: bool,
    /// Number of the instruction being emitted, and its offset in the page.
    pub index: usize,
    pub offset: u16,
    /// Registers that are borrowed right now, with their slots.
    pub held: Vec<(Reg, usize)>,
}

/// What most blocks have room enough with.
const USUAL_BYTES: usize = 1024;
const USUAL: usize = 16;

/// Writes the host code of `items`. Also says where each instruction's code starts, and then the
/// cold code.
pub(crate) fn emit_block(
    request: &Request<'_>,
    items: &[Item],
    plan: &Plan,
) -> (NewBlock, Vec<usize>) {
    let mut emitter = Emitter::new(request, plan);
    emitter.entry();
    let (live, mut seen) = live_before(request, items);
    let mut starts = Vec::with_capacity(items.len() + 1);
    for (index, (item, live)) in items.iter().zip(live).enumerate() {
        starts.push(emitter.asm.here());
        emitter.index = index;
        emitter.offset = item.offset;
        emitter.flags_live = live != 0;
        emitter.guard_straddler(item);
        emitter.item(item);
        emitter.release();
    }
    let end = items.last().map_or(request.offset, end_of);
    if items.last().is_none_or(falls_through) {
        emitter.jump_to(i64::from(end));
    }
    let hot_len = emitter.asm.here();
    starts.push(hot_len);
    emitter.finish_cold();
    seen |= crate::block::parts(request.offset, end - request.offset);
    let block = NewBlock {
        hot_len,
        branches: emitter.asm.branches,
        code: emitter.asm.code,
        guest: request.offset,
        parts: seen,
        sites: emitter.sites,
        links: emitter.links,
        site_places: emitter.site_places,
        link_places: emitter.link_places,
        gate_places: emitter.gate_places,
        routine_places: emitter.routine_places,
    };
    (block, starts)
}

/// Offset of the byte after an instruction; an undecodable one counts as one byte.
fn end_of(item: &Item) -> u16 {
    #[expect(clippy::cast_possible_truncation, reason = "at most 15")]
    let len = item.instruction.len().max(1) as u16;
    item.offset + len
}

fn falls_through(item: &Item) -> bool {
    if item.class == Class::System {
        return !leaves(&item.instruction);
    }
    !matches!(
        item.class,
        Class::Step
            | Class::Jump
            | Class::JumpIndirect
            | Class::Call
            | Class::CallIndirect
            | Class::Return
    )
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(request: &'a Request<'a>, plan: &'a Plan) -> Self {
        Self {
            request,
            plan,
            asm: Asm {
                code: Vec::with_capacity(USUAL_BYTES),
                branches: Vec::with_capacity(USUAL),
            },
            sites: Vec::with_capacity(USUAL),
            links: Vec::with_capacity(2),
            cold: Vec::with_capacity(USUAL),
            site_places: Vec::with_capacity(USUAL),
            link_places: Vec::with_capacity(2),
            gate_places: Vec::with_capacity(USUAL),
            routine_places: Vec::new(),
            encoder: Encoder::new(64),
            flags_live: true,
            index: 0,
            offset: request.offset,
            held: Vec::new(),
        }
    }

    /// 64-bit code, as opposed to 32-bit.
    pub(crate) fn is_wide(&self) -> bool {
        self.request.mode.bits() == 64
    }

    /// The ways in: from another page (T0 has the guest address), from a backward jump, from a
    /// forward jump.
    fn entry(&mut self) {
        let offset = i32::from(self.request.offset);
        // A fixed length, whatever the offset: LEA with a 32-bit displacement.
        self.asm.bytes(&[0x4d, 0x8d, 0x9b]);
        self.asm.bytes(&(-offset).to_le_bytes());
        self.asm.store(Mem::gs(hot!(pc_base)), T0);
        debug_assert_eq!(self.asm.here(), POLL_ENTRY as usize);
        self.asm.load(T1, Mem::gs(hot!(poll)));
        self.asm.load(T1, Mem::at(T1, 0));
        debug_assert_eq!(self.asm.here(), BODY_ENTRY as usize);
    }

    fn item(&mut self, item: &Item) {
        match item.class {
            Class::Copy => self.copy(item),
            Class::Nop => {}
            Class::Lea => self.lea(item),
            Class::Memory {
                bytes,
                reads,
                write,
            } => self.memory(item, bytes, reads, write),
            Class::BitString { bytes, write } => self.bit_string(item, bytes, write),
            Class::Push => self.push(item),
            Class::Pop => self.pop(item),
            Class::Leave => self.leave(item),
            Class::Jump => self.jump_to(target(item)),
            Class::JumpIndirect => self.jump_indirect(item),
            Class::Call => self.call(item),
            Class::CallIndirect => self.call_indirect(item),
            Class::Return => self.ret(item),
            Class::Conditional => self.conditional(item),
            Class::Counted => self.counted(item),
            Class::System => self.system(item),
            Class::String => self.string(item),
            Class::Step => self.step(item),
        }
    }

    /// Opens a site for the instruction at `offset`; its end is set by [`Self::close_site`].
    pub(crate) fn open_site(&mut self, kind: SiteKind, offset: u16) -> usize {
        let start = position(self.asm.here());
        let mut site = Site {
            kind,
            range: None,
            transient: None,
            flags_parked: false,
            held: [None; crate::translate::plan::MAX_BORROWED],
            held_at_start: small(self.held.len()),
            guest: offset,
            start,
            end: start,
        };
        for (place, &(register, slot)) in site.held.iter_mut().zip(&self.held) {
            *place = Some((register.0, small(slot)));
        }
        self.sites.push(site);
        self.sites.len() - 1
    }

    pub(crate) fn close_site(&mut self, site: usize) {
        self.sites[site].end = position(self.asm.here());
    }

    /// Gives back the registers of groups that end with the current instruction. An instruction
    /// that leaves the block does so before its jump.
    pub(crate) fn release(&mut self) {
        let index = self.index;
        let ended: Vec<_> = self
            .plan
            .borrowed_at(index)
            .filter(|group| group.last == index)
            .map(|group| group.pointer)
            .collect();
        for pointer in ended {
            if let Some(place) = self.held.iter().position(|&(held, _)| held == pointer) {
                let (register, slot) = self.held.remove(place);
                self.asm
                    .load(register, Mem::gs(hot!(spill, BORROWED_SLOT + slot)));
            }
        }
    }

    /// Hands an instruction to the monitor, which goes on wherever it leads.
    pub(crate) fn step(&mut self, item: &Item) {
        let site = self.open_site(SiteKind::Step, item.offset);
        self.name_site(site);
        self.gate(Gate::Step);
        self.close_site(site);
    }

    /// `mov r10d, site`: tells a gate which site calls it.
    pub(crate) fn name_site(&mut self, site: usize) {
        let place = self.asm.mov_imm32(T1, position(site));
        self.site_places.push(place);
    }

    pub(crate) fn gate(&mut self, gate: Gate) {
        let place = self.asm.jmp().0;
        self.gate_places.push((place, gate));
    }

    /// Encodes a (changed) guest instruction for the host.
    pub(crate) fn encode(&mut self, instruction: &Instruction) {
        let plain = general_form(instruction);
        self.encoder
            .encode(&plain, 0)
            .expect("the classes admit only instructions that 64-bit code has");
        let bytes = self.encoder.take_buffer();
        self.asm.bytes(&bytes);
    }

    /// The guest's own bytes, where they mean the same to the host.
    fn copy_bytes(&mut self, item: &Item) {
        if self.is_wide() {
            let start = usize::from(item.offset);
            let bytes = &self.request.page[start..start + item.instruction.len()];
            self.asm.bytes(bytes);
        } else {
            self.encode(&item.instruction);
        }
    }

    /// An instruction without memory operand. R10 and R11 are fetched from memory around it.
    fn copy(&mut self, item: &Item) {
        let instruction = &item.instruction;
        let site = (!crate::step::cannot_fault(instruction))
            .then(|| self.open_site(SiteKind::Copied, item.offset));
        if mentions(instruction, Register::R10) {
            self.asm.load(T1, Mem::gs(hot!(gpr, 10)));
        }
        if mentions(instruction, Register::R11) {
            self.asm.load(T0, Mem::gs(hot!(gpr, 11)));
        }
        self.copy_bytes(item);
        if item.writes_r10 {
            self.asm.store(Mem::gs(hot!(gpr, 10)), T1);
        }
        if item.writes_r11 {
            self.asm.store(Mem::gs(hot!(gpr, 11)), T0);
        }
        if let Some(site) = site {
            self.close_site(site);
        }
    }

    /// LEA: the same computation, with R10, R11 and RIP fetched.
    fn lea(&mut self, item: &Item) {
        let instruction = &item.instruction;
        let absolute = instruction.memory_base() == Register::None
            && instruction.memory_index() == Register::None;
        let special = instruction.is_ip_rel_memory_operand()
            || (absolute && !self.is_wide())
            || addresses(instruction, Register::R10)
            || addresses(instruction, Register::R11)
            || mentions(instruction, Register::R10)
            || mentions(instruction, Register::R11);
        if !special {
            self.copy_bytes(item);
            return;
        }
        self.lea_into_t0(instruction);
        let to = instruction.op0_register();
        let mut moved = *instruction;
        set_memory(&mut moved, T0, None, 0);
        let full = to.full_register();
        if full == Register::R10 || full == Register::R11 {
            let slot = if full == Register::R10 { 10 } else { 11 };
            if to.size() == 2 {
                // A 16-bit LEA keeps the rest of its destination.
                self.asm.load(T1, Mem::gs(hot!(gpr, slot)));
            }
            rename(&mut moved, full, T1);
            self.encode(&moved);
            self.asm.store(Mem::gs(hot!(gpr, slot)), T1);
        } else {
            self.encode(&moved);
        }
    }

    /// A branch that will be linked: names its target, relative to the page.
    pub(crate) fn link(&mut self, from: Fixup, target: i64) {
        let target = u16::try_from(target).unwrap_or(0);
        self.cold.push(Cold::Link {
            from,
            target,
            backward: target <= self.request.offset,
            plain: false,
        });
    }
}

pub(crate) fn position(value: usize) -> u32 {
    u32::try_from(value).expect("a block is far smaller than 4 GiB")
}
