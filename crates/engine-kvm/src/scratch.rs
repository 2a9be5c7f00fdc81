//! Throw-away guests, by which the host is measured.

use std::sync::Arc;

use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_engine::DebugStop;
use ringfence_engine::EngineError;
use ringfence_engine::Interrupts;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::VmSetup;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::paging;
use ringfence_x86::state::CS;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::engine::Host;
use crate::vcpu::KvmVcpu;
use crate::vm::KvmVm;

const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
const RAM_BYTES: u64 = 64 << 10;

/// A bare machine with `code`. It is 64-bit, since that is what kernels are: real mode may be
/// slow on a good host.
pub(crate) fn guest(host: &Arc<Host>, code: &[u8]) -> Result<KvmVcpu, EngineError> {
    let internal = |what: String| EngineError::Internal(format!("the test guest: {what}"));
    let ram = GuestRam::new(RAM_BYTES, HugePages::Off).map_err(|e| internal(e.to_string()))?;
    let table = paging::PTE_P | paging::PTE_W;
    let memory = ram.memory();
    memory
        .write_slice(code, GuestAddress(CODE))
        .and_then(|()| memory.write_obj(PDPT | table, GuestAddress(PML4)))
        .and_then(|()| memory.write_obj(PD | table, GuestAddress(PDPT)))
        .and_then(|()| memory.write_obj(table | paging::PTE_PS, GuestAddress(PD)))
        .map_err(|error| internal(error.to_string()))?;
    let vm = KvmVm::new(
        host,
        VmSetup {
            ram,
            pio: Arc::new(PioBus::default()),
            mmio: Arc::new(MmioBus::default()),
            vcpus: 1,
            interrupts: Interrupts::None,
            unclaimed: Unclaimed::Exit,
        },
    )?;
    vm.make_vcpu(0, &host.cpuid)
}

/// 64-bit mode, ring 0, at the start of the code.
pub(crate) fn state(vcpu: &KvmVcpu) -> Result<VcpuState, EngineError> {
    const CODE64: u32 = 0xa09b;
    const DATA: u32 = 0xc093;
    let mut state = vcpu.state()?;
    state.msrs.clear();
    state.xsave.clear();
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    };
    state.sregs.segments = [flat(0x10, DATA); 6];
    state.sregs.segments[CS] = flat(8, CODE64);
    state.sregs.cr0 = paging::CR0_PE | paging::CR0_ET | paging::CR0_NE | paging::CR0_PG;
    state.sregs.cr3 = PML4;
    state.sregs.cr4 = paging::CR4_PAE;
    state.sregs.efer = paging::EFER_LME | paging::EFER_LMA;
    state.regs.rip = CODE;
    state.regs.rflags = 2;
    Ok(state)
}

/// Whether a breakpoint on the second of two instructions stops the guest there.
pub(crate) fn breakpoint_fires(host: &Arc<Host>) -> Result<bool, EngineError> {
    const NOP_HLT: [u8; 2] = [0x90, 0xf4];
    let mut vcpu = guest(host, &NOP_HLT)?;
    let first = state(&vcpu)?;
    vcpu.set_state(&first)?;
    vcpu.try_breakpoint(CODE + 1)?;
    let stop = VcpuExit::Debug(DebugStop::Breakpoint(CODE + 1));
    Ok(vcpu.run()? == stop)
}
