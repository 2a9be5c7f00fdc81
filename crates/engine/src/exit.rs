//! Why a vCPU came back.

/// Port or memory space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoSpace {
    /// Ports.
    Pio,
    /// Memory outside RAM.
    Mmio,
}

/// Which way an access goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoDirection {
    /// The guest waits for this many bytes: see [`Vcpu::complete_read`](crate::Vcpu::complete_read).
    Read(usize),
    /// The guest wrote these bytes.
    Write(Vec<u8>),
}

/// An access that no device claims, under [`Unclaimed::Exit`](crate::Unclaimed::Exit).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// Port or memory.
    pub space: IoSpace,
    /// Address in that space.
    pub address: u64,
    /// Which way, with the data.
    pub direction: IoDirection,
}

/// Why the debugger is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugStop {
    /// One instruction was executed.
    Step,
    /// The address was reached; its instruction has not run.
    Breakpoint(u64),
}

/// Why [`Vcpu::run`](crate::Vcpu::run) returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// HLT in a machine without interrupts.
    Halt,
    /// A triple fault: the processor shut down (a PC resets then).
    Shutdown,
    /// [`VcpuWaker::kick`](crate::VcpuWaker::kick).
    Kicked,
    /// An access that no device claims.
    Io(IoAccess),
    /// The debugger's turn.
    Debug(DebugStop),
}
