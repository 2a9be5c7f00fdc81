//! An instruction that reaches into the next page.
//!
//! Blocks belong to one guest-physical page, since what follows it in the guest's address space may
//! change. An instruction across the border makes a block of its own, guarded each time by asking
//! whether the next page is one that code runs in now (it is in the code table) and holds the same
//! bytes as when the block was made. Where it doesn't, the monitor executes the instruction.

use iced_x86::Decoder;
use iced_x86::DecoderError;
use iced_x86::DecoderOptions;
use iced_x86::InstructionInfoFactory;

use crate::block::SiteKind;
use crate::hot::hot;
use crate::step::decoder_options;
use crate::translate::Class;
use crate::translate::PAGE_BYTES;
use crate::translate::Request;
use crate::translate::asm::Mem;
use crate::translate::asm::NZ;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::asm::Z;
use crate::translate::cold::Cold;
use crate::translate::decode::Item;
use crate::translate::decode::classify;
use crate::translate::decode::item;
use crate::translate::emit::Emitter;

/// The instruction at the request's offset, if it reaches into the next page and can be guarded.
pub(crate) fn decode(request: &Request<'_>, info: &mut InstructionInfoFactory) -> Option<Item> {
    let start = usize::from(request.offset);
    if request.page.len() <= PAGE_BYTES || request.mode.bits() != 64 {
        return None;
    }
    let mut decoder = Decoder::with_ip(
        64,
        &request.page[start..],
        u64::from(request.offset),
        decoder_options(request.host.amd),
    );
    let instruction = decoder.decode();
    if instruction.is_invalid() || start + instruction.len() <= PAGE_BYTES {
        return None;
    }
    let class = classify(request, &instruction, info);
    let guarded = !matches!(class, Class::Step | Class::System | Class::String);
    guarded.then(|| item(instruction, request.offset, class, info))
}

/// Whether the instruction at `offset` doesn't end within `page`.
pub(crate) fn is_cut(page: &[u8], offset: u16, bits: u32) -> bool {
    let mut decoder = Decoder::new(bits, &page[usize::from(offset)..], DecoderOptions::NONE);
    let invalid = decoder.decode().is_invalid();
    invalid && decoder.last_error() == DecoderError::NoMoreBytes
}

impl Emitter<'_> {
    /// Lets an instruction pass that lies within its page, or whose other page is as it was.
    pub(crate) fn guard_straddler(&mut self, item: &Item) {
        let end = usize::from(item.offset) + item.instruction.len();
        if end <= PAGE_BYTES {
            return;
        }
        let keep = self.flags_live;
        let kind = SiteKind::Memory {
            bytes: 1,
            write: false,
        };
        let site = self.open_site(kind, item.offset);
        self.sites[site].flags_parked = keep;
        if keep {
            self.park_flags();
        }
        let user = self.request.mode.is_user();
        let code = if user {
            hot!(code_user)
        } else {
            hot!(code_kernel)
        };
        self.next_page();
        self.page_number_as(T1, T0, user);
        self.asm.load(T0, Mem::gs(code));
        self.asm.load(T1, Mem::indexed(T0, T1, 3));
        self.next_page();
        self.asm.lea(T1, Mem::indexed(T1, T0, 2));
        self.asm.cmp_with_mem(T1, Mem::gs(hot!(miss_map)));
        let mut from = vec![self.asm.jcc(Z)];
        let miss = self.load_entry(T0, false);
        self.asm.lea(T1, Mem::indexed(T0, T1, 0));
        let request = self.request;
        let tail = &request.page[PAGE_BYTES..end];
        let mut disp = 0;
        for piece in tail.chunks(4) {
            if let Ok(word) = piece.try_into() {
                self.asm
                    .cmp_mem32(Mem::at(T1, disp), i32::from_le_bytes(word));
                from.push(self.asm.jcc(NZ));
                disp += 4;
                continue;
            }
            for &byte in piece {
                self.asm.cmp_mem8(Mem::at(T1, disp), byte);
                from.push(self.asm.jcc(NZ));
                disp += 1;
            }
        }
        if keep {
            self.give_back_flags();
        }
        self.close_site(site);
        // Code pages are seldom read: the monitor fills the entry and comes back.
        self.cold.push(Cold::Miss {
            from: vec![miss],
            site,
            address: T0,
            flags_parked: keep,
        });
        self.cold.push(Cold::Monitor {
            from,
            site,
            flags_parked: keep,
        });
    }

    /// The next page's address into T0, canonical as the tables count.
    fn next_page(&mut self) {
        self.asm.load(T0, Mem::gs(hot!(pc_base)));
        self.asm.lea(T0, Mem::at(T0, 4096));
        if self.request.mode.is_user() {
            self.asm.shl(T0, 17);
            self.asm.shr(T0, 17);
        } else {
            self.asm.shl(T0, 16);
            self.asm.sar(true, T0, 16);
        }
    }
}
