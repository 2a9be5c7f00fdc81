//! Memory operands: the probe, and the instruction behind it.
//!
//! The probe turns a guest address into an addend (see [`crate::window`]):
//!
//! ```text
//!     lea  r11, [guest operand]          the guest address (or it is in a register already)
//!     test r11b, size-1 / jnz ...        only an aligned access surely stays in its page
//!     pext r10, r11, gs:[mask]           page number, bounded by the mask
//!     not  r10                           (writes: that table grows downwards)
//!     mov  r10, gs:[r10*8 + table]
//!     test r10, r10 / jz ...             no entry: the monitor fills it
//!     op   ..., [r11 + r10]
//! ```
//!
//! The first access of a group probes for the group's range, whose ends must lie in one page, and
//! keeps the host address in a register; the others are `op ..., [pointer + delta]`.
//!
//! Where the flags are live they are parked in RAX, which waits in memory meanwhile.

use iced_x86::Instruction;
use iced_x86::Register;

use crate::block::SiteKind;
use crate::block::SiteRange;
use crate::block::small;
use crate::hot::hot;
use crate::step::has_high_byte;
use crate::translate::asm::Mem;
use crate::translate::asm::NZ;
use crate::translate::asm::RAX;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::asm::Z;
use crate::translate::cold::Cold;
use crate::translate::cold::Crossing;
use crate::translate::crossing::read_routine;
use crate::translate::crossing::write_routines;
use crate::translate::decode::Item;
use crate::translate::emit::BORROWED_SLOT;
use crate::translate::emit::Emitter;
use crate::translate::plan::Role;
use crate::translate::rename::free_registers;
use crate::translate::rename::general_form;
use crate::translate::rename::mentions;
use crate::translate::rename::operands_with_high_byte;
use crate::translate::rename::registers_used;
use crate::translate::rename::rename;
use crate::translate::rename::set_memory;
use crate::window::READS;
use crate::window::WRITES;

/// Where the bytes of an access are, in host addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    pub base: Reg,
    pub index: Option<Reg>,
    pub disp: i32,
}

impl Spot {
    /// As an operand.
    pub(crate) fn mem(self) -> Mem {
        Mem {
            base: Some(self.base),
            index: self.index.map(|index| (index, 0)),
            disp: self.disp,
            gs: false,
        }
    }
}

/// How an access computes its guest address.
#[derive(Clone, Copy)]
pub(crate) enum Address<'a> {
    /// The instruction's memory operand.
    Operand(&'a Instruction),
    /// A register plus a constant.
    Register(Reg, i32),
}

/// An access to be opened.
#[derive(Clone, Copy)]
pub(crate) struct Opening<'a> {
    pub address: Address<'a>,
    pub bytes: u16,
    pub write: bool,
    /// First or second access of the instruction.
    pub which: usize,
    pub offset: u16,
    /// What becomes of it when it crosses a page.
    pub crossing: Across<'a>,
}

/// How an access may cross a page.
#[derive(Clone, Copy)]
pub(crate) enum Across<'a> {
    /// With the monitor's help.
    Monitor,
    /// By reading a copy.
    Read,
    /// By writing a copy: the instruction.
    Write(&'a Item),
    /// In a translation without groups, from this offset on.
    Ungroup(u16),
    /// It can't: its place in the page is known.
    Never,
}

impl Emitter<'_> {
    /// Opens an access: probes for it, or finds it in its group. Returns its place and its site,
    /// if it has one to be closed.
    pub(crate) fn open(&mut self, opening: Opening<'_>) -> (Spot, usize) {
        let kind = SiteKind::Memory {
            bytes: opening.bytes,
            write: opening.write,
        };
        let role = self.plan.roles[self.index][opening.which];
        let Role::Member { group, delta } = role else {
            let site = self.open_site(kind, opening.offset);
            let address = self.address(opening.address, 0);
            let crossing = if stays_in_page(opening.address, opening.bytes) {
                Across::Never
            } else {
                opening.crossing
            };
            self.probe(site, address, opening.bytes, opening.write, crossing);
            let spot = Spot {
                base: address,
                index: Some(T1),
                disp: 0,
            };
            return (spot, site);
        };
        let opens = self.plan.opens(self.index, opening.which) == Some(group);
        let site = self.open_site(if opens { kind } else { SiteKind::Copied }, opening.offset);
        let pointer = self.plan.groups[group].pointer;
        if opens {
            self.open_group(site, group, delta, opening);
        }
        let spot = Spot {
            base: pointer,
            index: None,
            disp: delta,
        };
        (spot, site)
    }

    /// Probes for a group's range and sets its pointer.
    fn open_group(&mut self, site: usize, group: usize, delta: i32, opening: Opening<'_>) {
        let plan = self.plan.groups[group].clone();
        self.sites[site].range = Some(SiteRange {
            delta: u16::try_from(delta).unwrap_or(0),
            writes: plan.writes,
        });
        let address = self.address(opening.address, -delta);
        match plan.one_size {
            Some(bytes) => {
                let crossing = Across::Ungroup(opening.offset);
                self.probe(site, address, bytes, plan.writes, crossing);
            }
            None => self.probe_range(site, address, plan.len, plan.writes, opening.offset),
        }
        if plan.pointer != T1 {
            self.asm.store(
                Mem::gs(hot!(spill, BORROWED_SLOT + plan.slot)),
                plan.pointer,
            );
            if let Some(place) = self.sites[site].held.iter_mut().find(|held| held.is_none()) {
                *place = Some((plan.pointer.0, small(plan.slot)));
            }
            self.held.push((plan.pointer, plan.slot));
        }
        self.asm.lea(plan.pointer, Mem::indexed(address, T1, 0));
    }

    /// Page number of the address in `from` into `to`, as user or kernel code reaches it.
    pub(crate) fn page_number_as(&mut self, to: Reg, from: Reg, user: bool) {
        if self.request.host.fast_pext {
            let mask = if user {
                hot!(mask_user)
            } else {
                hot!(mask_kernel)
            };
            self.asm.pext(to, from, mask);
            return;
        }
        // Without PEXT: cut the bits above the mask, then the page offset. Clobbers the flags.
        let above = if user { 17 } else { 16 };
        if to != from {
            self.asm.mov(to, from);
        }
        self.asm.shl(to, above);
        self.asm.shr(to, above + 12);
    }

    /// Parks the flags in RAX.
    pub(crate) fn park_flags(&mut self) {
        self.asm.store(Mem::gs(hot!(spill, 1)), RAX);
        self.asm.save_flags();
    }

    /// Undoes [`Self::park_flags`].
    pub(crate) fn give_back_flags(&mut self) {
        self.asm.restore_flags();
        self.asm.load(RAX, Mem::gs(hot!(spill, 1)));
    }

    /// Loads the table entry for `address` into T1 and branches off when there is none.
    pub(crate) fn load_entry(&mut self, address: Reg, write: bool) -> crate::translate::asm::Fixup {
        self.page_number_as(T1, address, self.request.mode.is_user());
        if write {
            self.asm.not(T1);
        }
        let table = if write { WRITES } else { READS };
        self.asm.load(T1, Mem::gs_table(T1, table));
        self.asm.test(T1, T1);
        self.asm.jcc(Z)
    }

    /// Probes for one access: leaves the addend in T1.
    fn probe(&mut self, site: usize, address: Reg, bytes: u16, write: bool, across: Across<'_>) {
        let keep = self.flags_live;
        self.sites[site].flags_parked = keep;
        if keep {
            self.park_flags();
        }
        let misaligned = (bytes > 1 && !matches!(across, Across::Never)).then(|| {
            let mask = bytes.next_power_of_two() - 1;
            self.asm.test_low(address, u8::try_from(mask).unwrap_or(63));
            self.asm.jcc(NZ)
        });
        let back = self.asm.here();
        let miss = self.load_entry(address, write);
        let behind_probe = self.asm.here();
        if keep {
            self.give_back_flags();
        }
        if let Some(from) = misaligned {
            let crossing = self.crossing(across, bytes, behind_probe);
            self.cold.push(Cold::Misaligned {
                from,
                back,
                crossing,
                site,
                address,
                bytes,
                flags_parked: keep,
            });
        }
        self.cold.push(Cold::Miss {
            from: vec![miss],
            site,
            address,
            flags_parked: keep,
        });
    }

    /// How to get an operand of `bytes` bytes across a page.
    fn crossing(&self, across: Across<'_>, bytes: u16, behind_probe: usize) -> Crossing {
        let user = self.request.mode.is_user();
        match across {
            Across::Ungroup(offset) => Crossing::Ungroup(offset),
            Across::Read => {
                read_routine(user, bytes).map_or(Crossing::Monitor, |routine| Crossing::Read {
                    routine,
                    behind_probe,
                })
            }
            Across::Write(item) => {
                write_routines(user, bytes).map_or(Crossing::Monitor, |routines| Crossing::Write {
                    routines,
                    item: *item,
                    end: 0,
                })
            }
            Across::Monitor | Across::Never => Crossing::Monitor,
        }
    }

    /// Tells the cold code of a write where its instruction ends.
    fn end_crossing(&mut self, site: usize) {
        let here = self.asm.here();
        for cold in &mut self.cold {
            if let Cold::Misaligned {
                crossing: Crossing::Write { end, .. },
                site: of,
                ..
            } = cold
                && *of == site
            {
                *end = here;
            }
        }
    }

    /// Probes for a range: leaves the addend in T1, or the block when the range crosses a page.
    fn probe_range(&mut self, site: usize, address: Reg, len: u16, write: bool, offset: u16) {
        let keep = self.flags_live;
        if keep {
            self.park_flags();
        }
        self.asm.lea(T1, Mem::at(address, i32::from(len) - 1));
        self.asm.xor(T1, address);
        self.asm.test_imm32(T1, 0x1000);
        let crosses = self.asm.jcc(NZ);
        let miss = self.load_entry(address, write);
        if keep {
            self.give_back_flags();
        }
        self.cold.push(Cold::Ungroup {
            from: vec![crosses],
            offset,
            flags_parked: keep,
            held: self.held.clone(),
        });
        self.cold.push(Cold::Miss {
            from: vec![miss],
            site,
            address,
            flags_parked: keep,
        });
    }

    /// A guest address plus `shift`, in T0 or in a guest register that has it already.
    fn address(&mut self, address: Address<'_>, shift: i32) -> Reg {
        match address {
            Address::Register(register, disp) => {
                let disp = disp + shift;
                let usable = self.is_wide() && !(register == RAX && self.flags_live);
                if disp == 0 && usable {
                    return register;
                }
                if self.is_wide() {
                    self.asm.lea(T0, Mem::at(register, disp));
                } else {
                    self.asm.lea32(T0, Mem::at(register, disp));
                }
            }
            Address::Operand(instruction) => {
                if shift == 0
                    && let Some(register) = self.bare_register(instruction)
                {
                    return register;
                }
                self.address_into_t0(instruction);
                if shift != 0 {
                    if self.is_wide() {
                        self.asm.lea(T0, Mem::at(T0, shift));
                    } else {
                        self.asm.lea32(T0, Mem::at(T0, shift));
                    }
                }
            }
        }
        T0
    }

    /// `[reg]` of 64 bits without segment base: the register is the address.
    fn bare_register(&self, instruction: &Instruction) -> Option<Reg> {
        let base = instruction.memory_base();
        let bare = instruction.memory_index() == Register::None
            && instruction.memory_displacement64() == 0
            && !has_base(instruction.memory_segment())
            && base.is_gpr64();
        if !bare || has_high_byte(instruction) {
            return None;
        }
        let register = Reg(u8::try_from(base.number()).ok()?);
        let usable = register != T0 && register != T1 && !(register == RAX && self.flags_live);
        usable.then_some(register)
    }

    /// The address computation without segment base, into T0.
    pub(crate) fn lea_into_t0(&mut self, instruction: &Instruction) {
        if instruction.is_ip_rel_memory_operand() {
            let distance = instruction.ip_rel_memory_address().cast_signed();
            let disp = i32::try_from(distance).expect("the classes admit only near operands");
            self.asm.load(T0, Mem::gs(hot!(pc_base)));
            self.asm.lea(T0, Mem::at(T0, disp));
            return;
        }
        let narrow = instruction.memory_base().is_gpr32() || instruction.memory_index().is_gpr32();
        let base = self.address_register(instruction.memory_base(), T1);
        let index = self.address_register(instruction.memory_index(), T0);
        let shift = instruction.memory_index_scale().trailing_zeros();
        let mem = Mem {
            base,
            index: index.map(|index| (index, u8::try_from(shift).unwrap_or(0))),
            disp: displacement(instruction),
            gs: false,
        };
        // Without registers, a displacement of 32 bits means a 32-bit address.
        let absolute32 = base.is_none() && index.is_none() && instruction.memory_displ_size() == 4;
        if narrow || absolute32 {
            self.asm.lea32(T0, mem);
        } else {
            self.asm.lea(T0, mem);
        }
    }

    /// The host register with an address component, fetching R10 and R11 into `scratch`.
    fn address_register(&mut self, register: Register, scratch: Reg) -> Option<Reg> {
        if register == Register::None {
            return None;
        }
        let number = register.number();
        if number == 10 || number == 11 {
            self.asm.load(scratch, Mem::gs(hot!(gpr, number)));
            return Some(scratch);
        }
        Some(Reg(u8::try_from(number).unwrap_or(0)))
    }

    /// The whole address computation, into T0.
    fn address_into_t0(&mut self, instruction: &Instruction) {
        let segment = instruction.memory_segment();
        self.lea_into_t0(instruction);
        if has_base(segment) {
            let index = if segment == Register::FS { 4 } else { 5 };
            self.asm.load(T1, Mem::gs(hot!(seg_base, index)));
            if self.is_wide() {
                self.asm.lea(T0, Mem::indexed(T0, T1, 0));
            } else {
                self.asm.lea32(T0, Mem::indexed(T0, T1, 0));
            }
        }
    }

    /// An instruction with one memory operand of fixed size.
    pub(crate) fn memory(&mut self, item: &Item, bytes: u16, reads: bool, write: bool) {
        let instruction = &item.instruction;
        // A copy is written by repeating the instruction: it must keep the address in T0.
        // Cold code has no site to fault at.
        let repeatable = crate::step::is_plain_store(instruction)
            && !mentions(instruction, Register::R10)
            && !mentions(instruction, Register::R11)
            && !has_high_byte(instruction);
        let crossing = match (reads, write) {
            (_, false) => Across::Read,
            (false, true) if repeatable => Across::Write(item),
            _ => Across::Monitor,
        };
        let (spot, site) = self.open(Opening {
            address: Address::Operand(instruction),
            bytes,
            write,
            which: 0,
            offset: item.offset,
            crossing,
        });
        self.operation(item, site, spot);
        self.close_site(site);
        self.end_crossing(site);
    }

    /// The instruction itself, on its bytes at `spot`.
    pub(crate) fn operation(&mut self, item: &Item, site: usize, spot: Spot) {
        let instruction = &item.instruction;
        let uses_r10 = mentions(instruction, Register::R10);
        let uses_r11 = mentions(instruction, Register::R11);
        let mut changed = general_form(instruction);
        if has_high_byte(instruction) {
            return self.operation_with_high_byte(changed, site, spot);
        }
        if !uses_r10 && !uses_r11 {
            set_memory(&mut changed, spot.base, spot.index, spot.disp);
            self.encode(&changed);
            return;
        }
        // One of the scratch registers takes the address, the other stands for the operand.
        let spot = if spot.base == T0 || spot.index.is_some() {
            self.asm.lea(T1, spot.mem());
            Spot {
                base: T1,
                index: None,
                disp: 0,
            }
        } else {
            spot
        };
        set_memory(&mut changed, spot.base, None, spot.disp);
        let (first, slot) = if uses_r11 {
            (Register::R11, 11)
        } else {
            (Register::R10, 10)
        };
        self.asm.load(T0, Mem::gs(hot!(gpr, slot)));
        let borrowed = (uses_r10 && uses_r11).then(|| {
            let mut busy = registers_used(instruction);
            for &(register, _) in &self.held {
                busy.insert(register);
            }
            let register = free_registers(busy)
                .any()
                .expect("an instruction names at most six registers");
            self.borrow(site, register);
            self.asm.load(register, Mem::gs(hot!(gpr, 10)));
            rename(&mut changed, Register::R10, register);
            register
        });
        rename(&mut changed, first, T0);
        self.encode(&changed);
        let written = if uses_r11 {
            item.writes_r11
        } else {
            item.writes_r10
        };
        if written {
            self.asm.store(Mem::gs(hot!(gpr, slot)), T0);
        }
        if let Some(register) = borrowed {
            if item.writes_r10 {
                self.asm.store(Mem::gs(hot!(gpr, 10)), register);
            }
            self.asm.load(register, Mem::gs(hot!(spill, 0)));
        }
    }

    /// AH and its like exclude a REX prefix, so the address moves to an old register.
    fn operation_with_high_byte(&mut self, mut changed: Instruction, site: usize, spot: Spot) {
        // Those of the address are free once it is in a scratch register.
        let mut busy = operands_with_high_byte(&changed);
        for &(register, _) in &self.held {
            busy.insert(register);
        }
        let register = free_registers(busy)
            .old()
            .expect("two are the operands' at most, and three are held");
        self.asm.lea(T1, spot.mem());
        self.borrow(site, register);
        self.asm.mov(register, T1);
        set_memory(&mut changed, register, None, 0);
        self.encode(&changed);
        self.asm.load(register, Mem::gs(hot!(spill, 0)));
    }

    fn borrow(&mut self, site: usize, register: Reg) {
        self.asm.store(Mem::gs(hot!(spill, 0)), register);
        self.sites[site].transient = Some(register.0);
    }

    /// BT, BTS, BTR or BTC on memory with the bit offset in a register: the word that holds the
    /// bit is addressed, and the bit within it.
    pub(crate) fn bit_string(&mut self, item: &Item, bytes: u16, write: bool) {
        let instruction = &item.instruction;
        let site = self.open_site(SiteKind::Memory { bytes, write }, item.offset);
        let keep = self.flags_live;
        let wide = bytes == 8;
        self.address_into_t0(instruction);
        let offset = instruction.op1_register();
        self.bit_offset(T1, offset);
        if !wide {
            self.asm.movsxd(T1, T1);
        }
        if keep {
            self.park_flags();
        }
        let (bits, scale) = if wide { (6, 3) } else { (5, 2) };
        self.asm.sar(true, T1, bits);
        if self.is_wide() {
            self.asm.lea(T0, Mem::indexed(T0, T1, scale));
        } else {
            self.asm.lea32(T0, Mem::indexed(T0, T1, scale));
        }
        if keep {
            self.give_back_flags();
        }
        self.probe(site, T0, bytes, write, Across::Monitor);
        self.asm.lea(T1, Mem::indexed(T0, T1, 0));
        // Masking the bit number clobbers the flags, which the operation only partly sets.
        self.bit_offset(T0, offset);
        if keep {
            self.park_flags();
        }
        self.asm.and_imm8(T0, if wide { 63 } else { 31 });
        if keep {
            self.give_back_flags();
        }
        let mut changed = *instruction;
        set_memory(&mut changed, T1, None, 0);
        rename(&mut changed, offset.full_register(), T0);
        self.encode(&changed);
        self.close_site(site);
    }

    /// The register with a bit offset, whole.
    fn bit_offset(&mut self, to: Reg, register: Register) {
        let number = register.number();
        if number == 10 || number == 11 {
            self.asm.load(to, Mem::gs(hot!(gpr, number)));
        } else {
            self.asm.mov(to, Reg(u8::try_from(number).unwrap_or(0)));
        }
    }
}

/// Whether an operand lies within one page wherever the code is mapped: one that is addressed by RIP
/// is as far into its page as the code is into its own.
fn stays_in_page(address: Address<'_>, bytes: u16) -> bool {
    let Address::Operand(instruction) = address else {
        return false;
    };
    instruction.is_ip_rel_memory_operand()
        && !has_base(instruction.memory_segment())
        && instruction.ip_rel_memory_address() % 4096 + u64::from(bytes) <= 4096
}

/// FS and GS have bases in 64-bit mode; the others don't.
fn has_base(segment: Register) -> bool {
    matches!(segment, Register::FS | Register::GS)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a displacement is 32 bits, sign- or zero-extended"
)]
fn displacement(instruction: &Instruction) -> i32 {
    instruction.memory_displacement64() as i32
}
