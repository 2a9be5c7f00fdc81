//! What a body runs on: an engine, and the board's chips where the engine brings none.

use std::sync::Arc;

use ringfence_bus::InterruptController;
use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_engine::Engine;
use ringfence_engine::LocalApic;

/// Interrupt chips made by the board.
pub struct Chips {
    /// One a vCPU, in order.
    pub local_apics: Vec<Arc<dyn LocalApic>>,
    /// Lines and messages.
    pub controller: Arc<dyn InterruptController>,
}

/// Makes interrupt chips for engines that bring none, and places their registers on the buses:
/// IOAPIC at 0xfec0_0000, PICs at their ports, and the PIT at its ports with its line on the PICs'
/// input 0 and IOAPIC pin 2. The local APICs' page is the engine's to route.
pub trait BoardChips: Send + Sync {
    /// Chips for `vcpus` processors.
    fn make(&self, vcpus: u32, pio: &Arc<PioBus>, mmio: &Arc<MmioBus>) -> Chips;
}

/// An engine under test.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    /// The engine.
    pub engine: &'a dyn Engine,
    /// The board's chips, for engines whose capabilities ask for them.
    pub board: Option<&'a dyn BoardChips>,
}
