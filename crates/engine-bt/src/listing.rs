//! Translations as text: guest code beside the host code that it became.

use iced_x86::Decoder;
use iced_x86::DecoderOptions;
use iced_x86::FastFormatter;
use iced_x86::Instruction;
use iced_x86::InstructionInfoFactory;

use crate::block::NewBlock;
use crate::block::SiteKind;
use crate::host::Host;
use crate::mode::Mode;
use crate::offered::Offered;
use crate::translate::Request;
use crate::translate::decode::Item;
use crate::translate::decode_block;
use crate::translate::emit::emit_block;
use crate::translate::plan::plan_block;

/// What is translated for a listing, and how.
#[derive(Clone, Copy, Debug)]
pub struct Listing {
    /// Offset of the code in its page.
    pub offset: u16,
    /// 64 or 32.
    pub bits: u32,
    /// User code, as opposed to the kernel's.
    pub user: bool,
    /// Without groups.
    pub plain: bool,
    /// For a processor with a fast PEXT.
    pub fast_pext: bool,
}

impl Default for Listing {
    fn default() -> Self {
        Self {
            offset: 0,
            bits: 64,
            user: true,
            plain: false,
            fast_pext: true,
        }
    }
}

/// Translates the block at the start of `code` and lists it.
///
/// The result depends on nothing but the arguments: what the host can do is given.
#[must_use]
pub fn list_translation(code: &[u8], listing: Listing) -> String {
    let mut page = [0xf4; 4096];
    let start = usize::from(listing.offset);
    let len = code.len().min(4096 - start);
    page[start..start + len].copy_from_slice(&code[..len]);
    let request = Request {
        page: &page,
        offset: listing.offset,
        mode: Mode::plain(listing.bits, listing.user),
        host: Host {
            amd: false,
            fast_pext: listing.fast_pext,
            avx: true,
            fsgsbase: true,
            offered: Offered::all(),
            guest_xcr0: 7,
            xsave_len: 832,
        },
        plain_tsc: true,
    };
    list(&request, listing.plain)
}

/// Translates a block and lists it.
pub(crate) fn list(request: &Request<'_>, plain: bool) -> String {
    let mut info = InstructionInfoFactory::new();
    let items = decode_block(request, &mut info);
    let plan = plan_block(&items, &mut info, request.mode.bits(), plain);
    let (block, starts) = emit_block(request, &items, &plan);
    render(&block, &items, &starts)
}

/// Guest instructions, each followed by its host code, and the cold code at the end.
pub(crate) fn render(block: &NewBlock, guest: &[Item], starts: &[usize]) -> String {
    let mut text = String::new();
    let mut next = 0;
    let mut decoder = Decoder::with_ip(64, &block.code, 0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let at = decoder.position();
        while starts.get(next).is_some_and(|&start| start <= at) {
            let heading = match guest.get(next) {
                Some(item) if item.instruction.is_invalid() => {
                    format!("{:03x}: (undefined)\n", item.offset)
                }
                Some(item) => format!("{:03x}: {}\n", item.offset, show(&item.instruction)),
                None => "cold:\n".to_owned(),
            };
            text.push_str(&heading);
            next += 1;
        }
        let instruction = decoder.decode();
        text.push_str(&format!(
            "    {at:4x}  {}{}\n",
            show(&instruction),
            note(block, at)
        ));
    }
    text
}

fn show(instruction: &Instruction) -> String {
    let mut text = String::new();
    FastFormatter::new().format(instruction, &mut text);
    text
}

/// What a jump out of the block means.
fn note(block: &NewBlock, at: usize) -> String {
    let inside = |place: &usize| (at + 1..at + 7).contains(place);
    if let Some((_, gate)) = block.gate_places.iter().find(|(place, _)| inside(place)) {
        return format!("    ; gate {gate:?}");
    }
    if let Some(link) = block
        .links
        .iter()
        .find(|link| inside(&(link.place as usize)))
    {
        let plain = if link.plain { " without groups" } else { "" };
        return format!("    ; link {:03x}{plain}", link.target);
    }
    let site = block.sites.iter().find(|site| site.start as usize == at);
    match site.map(|site| site.kind) {
        Some(SiteKind::Memory { bytes, write }) => {
            let what = if write { "write" } else { "read" };
            format!("    ; {what} {bytes}")
        }
        _ => String::new(),
    }
}
