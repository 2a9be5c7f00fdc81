//! The `bt` engine: full virtualization of x86-64 on x86-64 by binary translation, in an ordinary
//! unprivileged process.
//!
//! Guest code is translated a block at a time into a code cache and run directly on the host
//! processor, kernel and user code alike. Guest registers stay in the same host registers (but
//! for R10 and R11), guest flags in the host's flags; innocuous instructions are copied, memory operands are
//! redirected through tables that mirror the guest's page tables, and sensitive instructions call
//! the monitor. DESIGN.md tells how it fits together; SAFETY.md what holds the guest inside.
//!
//! ```text
//!  vm         the engine traits                      run       the loop around translated code
//!  lookup     from RIP to translated code            dispatch  what translated code asks for
//!  translate  guest code to host code                code      the cache and its side tables
//!  window     guest addresses to host addresses      walk      the guest's page tables
//!  step       any one instruction, by the monitor    event     exceptions and interrupts
//! ```

mod access;
mod block;
mod clock;
mod code;
mod code_table;
mod control;
mod core;
mod counters;
mod crash;
mod debug;
mod device;
mod direct;
mod dispatch;
mod event;
mod fault;
mod features;
mod fpu;
mod gate;
mod host;
mod hot;
mod listing;
mod lookup;
mod mapping;
mod mode;
mod msr;
mod notes;
mod offered;
mod pages;
mod paravirt;
mod ram;
mod remote;
mod run;
mod segment;
mod shared;
mod signal;
mod state;
mod step;
mod translate;
mod vm;
mod walk;
mod window;

pub use clock::learn_frequency;
pub use crash::report_crashes;
pub use listing::Listing;
pub use listing::list_translation;
pub use vm::BtEngine;
pub use vm::Direct;
