//! Guest code to host code, a block at a time.
//!
//! A block is a run of instructions within one guest page, entered at its start. Most instructions
//! are copied; a memory operand is redirected through the window (see [`crate::window`]), and what
//! the guest may not do by itself calls the monitor. The parts:
//!
//! * [`decode`] cuts the block and sorts its instructions into classes,
//! * [`flags`] finds where the arithmetic flags are dead, so that a probe may clobber them,
//! * [`plan`] finds accesses that can share a probe,
//! * [`emit`] writes the host code, with [`memory`] for operands, [`stack`] and [`flow`] for
//!   transfers, and [`cold`] for what is rarely run,
//! * [`straddle`] guards an instruction that reaches into the next page,
//! * [`asm`] and [`rename`] are the tools.

pub(crate) mod asm;
mod cold;
pub(crate) mod crossing;
pub(crate) mod decode;
pub(crate) mod emit;
mod flags;
mod flow;
mod memory;
pub(crate) mod plan;
pub(crate) mod rename;
mod stack;
mod straddle;
mod strings;
mod system;

use crate::block::NewBlock;
use crate::block::PageKey;
use crate::core::Core;
use crate::host::Host;
use crate::mode::Mode;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Most bytes of the next page that an instruction can reach.
pub(crate) const TAIL_BYTES: usize = 14;

pub(crate) use decode::Class;
pub(crate) use decode::decode_block;
pub(crate) use straddle::is_cut;

/// What the translator is given.
pub(crate) struct Request<'a> {
    /// The page, and perhaps the first bytes of the one that follows it in the guest's address
    /// space: see [`straddle`].
    pub page: &'a [u8],
    /// Where in the page the block starts.
    pub offset: u16,
    pub mode: Mode,
    pub host: Host,
    /// The guest reads the host's time-stamp counter as it is.
    pub plain_tsc: bool,
}

impl Core {
    /// Translates the block at `offset` of a page; `plain`: without groups.
    pub(crate) fn translate(
        &mut self,
        key: PageKey,
        page: &[u8],
        offset: u16,
        plain: bool,
    ) -> NewBlock {
        let request = Request {
            page,
            offset,
            mode: self.mode,
            host: self.shared.host,
            plain_tsc: self.has_plain_tsc(),
        };
        let block = decode_block(&request, &mut self.info);
        let copied = block
            .iter()
            .filter(|item| !matches!(item.class, Class::Step | Class::System | Class::String))
            .count();
        self.remote.counters.blocks.bump();
        self.remote.counters.instructions.add(block.len() as u64);
        self.remote.counters.copied.add(copied as u64);
        let plan = plan::plan_block(&block, &mut self.info, self.mode.bits(), plain);
        let (new, starts) = emit::emit_block(&request, &block, &plan);
        let address = self.linear_rip(self.rip);
        self.shared.notes.list(address, key, &block, &new, &starts);
        new
    }

    /// The guest reads the host's time-stamp counter as it is.
    pub(crate) fn has_plain_tsc(&self) -> bool {
        self.msrs.tsc_offset == 0 && !self.mode.traps_tsc()
    }
}
