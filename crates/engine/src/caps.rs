//! What an engine can do here.

/// Whose interrupt chips a machine of this engine uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptChips {
    /// The engine brings its own (KVM's in-kernel APICs).
    Engine,
    /// The board models them.
    Board,
}

/// An engine's abilities on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineCaps {
    /// Most vCPUs a machine may have.
    pub max_vcpus: u32,
    /// Whose interrupt chips.
    pub interrupt_chips: InterruptChips,
    /// [`Vm::add_doorbell`](crate::Vm::add_doorbell) works.
    pub doorbells: bool,
    /// [`Vm::set_irq_event`](crate::Vm::set_irq_event) works.
    pub irq_events: bool,
    /// [`Vm::take_dirty`](crate::Vm::take_dirty) works.
    pub dirty_log: bool,
    /// The host's kernel may write to guest memory without anybody hearing of it
    /// ([`UnheardWriter`](ringfence_memory::UnheardWriter)): nothing is derived from its content.
    pub unheard_writers: bool,
    /// Single step and breakpoints work.
    pub debug: bool,
}
