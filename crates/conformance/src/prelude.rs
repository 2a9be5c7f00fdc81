//! What every body uses.

pub use iced_x86::code_asm::*;
pub use ringfence_engine::DebugStop;
pub use ringfence_engine::IoAccess;
pub use ringfence_engine::IoDirection;
pub use ringfence_engine::IoSpace;
pub use ringfence_engine::Unclaimed;
pub use ringfence_engine::VcpuExit;
pub use ringfence_x86::msr;
pub use ringfence_x86::paging;
pub use ringfence_x86::paging::{PTE_A, PTE_D, PTE_G, PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W};
pub use ringfence_x86::state;

pub use crate::Bench;
pub use crate::asm::{Asm, Assembled};
pub use crate::devices::{CallPort, KickPort, Recorder, Seen};
pub use crate::fault::*;
pub use crate::features::*;
pub use crate::guest::{Feature, Guest, Setup};
pub use crate::layout;
