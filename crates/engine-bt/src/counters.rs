//! What the engine counts, for `ringfence stats --engine-counters`.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident: $label:literal,)*) => {
        /// Counts of one vCPU. Only its own thread adds; anyone may read.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Counters {
            /// Names and values, in display order.
            pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$(($label, self.$name.get()),)*]
            }
        }
    };
}

/// One count.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub(crate) fn bump(&self) {
        self.add(1);
    }

    /// Adds `n`. Not a read-modify-write: the counter has one writer.
    pub(crate) fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The count.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// Blocks translated.
    blocks: "blocks_translated",
    /// Guest instructions translated.
    instructions: "instructions_translated",
    /// Of those, copied or re-encoded with only their memory operand changed.
    copied: "instructions_copied",
    /// Direct jumps linked.
    linked: "jumps_linked",
    /// Code pages dropped because they were written.
    invalidated: "code_pages_invalidated",
    /// Times the whole code cache was emptied.
    cleared: "code_cache_cleared",
    /// Indirect transfers whose target had to be looked up.
    misses: "indirect_misses",
    /// Accesses of the monitor that a table's entry answered.
    hits: "table_hits",
    /// Those of the monitor and of generated code that a page walk answered.
    fills: "table_fills",
    /// Memory sites that went the slow way.
    slow_memory: "slow_memory_accesses",
    /// Accesses that crossed a page.
    crossings: "page_crossings",
    /// Instructions that the monitor executed.
    steps: "instructions_emulated",
    /// Host signals raised by copied instructions.
    signals: "host_signals",
    /// Polls that the monitor answered.
    polls: "polls",
    /// Exceptions delivered.
    exceptions: "exceptions",
    /// Interrupts delivered.
    interrupts: "interrupts",
    /// Port accesses.
    pio: "port_accesses",
    /// Accesses to device memory.
    mmio: "device_memory_accesses",
    /// Halts.
    halts: "halts",
    /// Address-space switches.
    switches: "address_space_switches",
    /// Visits of user code to a space of its own.
    direct_visits: "direct_visits",
    /// Ticks of the time-stamp counter that these took.
    direct_ticks: "direct_ticks",
    /// System calls made there.
    direct_calls: "direct_system_calls",
    /// Times that it was called back for an event.
    direct_kicks: "direct_kicks",
    /// Exceptions that it caused there, page faults apart.
    direct_traps: "direct_traps",
    /// Times that pages were mapped there.
    direct_fills: "direct_fills",
    /// Page faults of the guest's there.
    direct_faults: "direct_page_faults",
    /// Times that a page of code had to be translated that lies between others that don't.
    direct_holds: "direct_pages_held",
    /// Spaces that were lost or couldn't be made.
    direct_lost: "direct_spaces_lost",
    /// Table flushes.
    flushes: "table_flushes",
}
