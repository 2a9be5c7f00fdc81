//! A test guest with one processor.

use std::sync::Arc;

use iced_x86::BlockEncoderOptions;
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssemblerResult;
use ringfence_bus::InterruptController;
use ringfence_bus::MmioBus;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioBus;
use ringfence_bus::PioDevice;
use ringfence_bus::Range;
use ringfence_engine::InterruptChips;
use ringfence_engine::Interrupts;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::VcpuState;

use crate::Bench;
use crate::asm::Asm;
use crate::asm::Assembled;
use crate::devices::KickPort;
use crate::dump;
use crate::fault;
use crate::fault::Expected;
use crate::fault::Fault;
use crate::features;
use crate::handlers;
use crate::layout;
use crate::tables;
use crate::trampoline;
use crate::watchdog::Watchdog;

/// Marks a value that the guest has not reported.
const NOT_REPORTED: u64 = 0x6e6f_7420_7365_6e74;

/// How a test guest differs from the usual.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// What unclaimed accesses do.
    pub unclaimed: Unclaimed,
    /// With interrupt chips, whoever brings them; else bare.
    pub chips: bool,
    /// How many processors; the first starts by itself.
    pub vcpus: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ram_bytes: layout::RAM_BYTES,
            unclaimed: Unclaimed::Float,
            chips: false,
            vcpus: 1,
        }
    }
}

/// A test guest: a machine whose first processor waits in 64-bit mode, ring 0.
pub struct Guest {
    /// The processor.
    pub vcpu: Box<dyn Vcpu>,
    /// The further processors.
    pub others: Vec<Box<dyn Vcpu>>,
    /// The machine.
    pub vm: Box<dyn Vm>,
    /// Its RAM.
    pub ram: GuestRam,
    /// Ports.
    pub pio: Arc<PioBus>,
    /// Device memory.
    pub mmio: Arc<MmioBus>,
    /// The interrupt chips, in a machine that has them.
    pub controller: Option<Arc<dyn InterruptController>>,
    /// What the processors answer to CPUID.
    pub cpuid: CpuidTable,
    done: Arc<KickPort>,
    has_chips: bool,
    values: usize,
}

impl Guest {
    /// A bare guest.
    #[must_use]
    pub fn new(bench: &Bench<'_>) -> Self {
        Self::with(bench, Setup::default())
    }

    /// A guest with interrupt chips.
    #[must_use]
    pub fn with_chips(bench: &Bench<'_>) -> Self {
        Self::with(
            bench,
            Setup {
                chips: true,
                ..Setup::default()
            },
        )
    }

    /// A guest of this setup.
    #[must_use]
    pub fn with(bench: &Bench<'_>, setup: Setup) -> Self {
        let mut cpuid = bench.engine.supported_cpuid().expect("supported CPUID");
        if !setup.chips {
            cpuid.hide_local_apic();
        }
        Self::with_cpuid(bench, setup, &cpuid)
    }

    /// A guest of this setup whose processors answer CPUID from `cpuid` (but for their APIC ids).
    #[must_use]
    pub fn with_cpuid(bench: &Bench<'_>, setup: Setup, cpuid: &CpuidTable) -> Self {
        let ram = GuestRam::new(setup.ram_bytes, HugePages::Off).expect("test RAM");
        let pio = Arc::new(PioBus::default());
        let mmio = Arc::new(MmioBus::default());
        let (interrupts, controller) = interrupts(bench, setup, &pio, &mmio);
        let vm = bench
            .engine
            .create_vm(VmSetup {
                ram: ram.clone(),
                pio: Arc::clone(&pio),
                mmio: Arc::clone(&mmio),
                vcpus: setup.vcpus,
                interrupts,
                unclaimed: setup.unclaimed,
            })
            .expect("a machine");
        let mut vcpus: Vec<_> = (0..setup.vcpus)
            .map(|index| {
                let table = with_apic_id(cpuid, index);
                vm.create_vcpu(index, table).expect("a vCPU")
            })
            .collect();
        let vcpu = vcpus.remove(0);
        let mut guest = Self {
            vcpu,
            others: vcpus,
            controller: controller.or_else(|| vm.interrupts()),
            vm,
            ram,
            pio,
            mmio,
            cpuid: cpuid.clone(),
            done: KickPort::new(),
            has_chips: setup.chips,
            values: 0,
        };
        guest.furnish();
        guest
    }

    fn furnish(&mut self) {
        tables::write_pages(&self.ram);
        tables::write_segments(&self.ram);
        tables::write_gates(&self.ram);
        let code = handlers::assemble(self.has_chips).expect("the handlers");
        self.write(layout::HANDLERS, &code);
        if self.has_chips {
            let done: Arc<dyn PioDevice> = self.done.clone();
            self.place_port(layout::DONE_PORT.into(), 1, done);
            self.done.add(self.vcpu.waker());
            trampoline::write(&self.ram).expect("the trampoline");
            self.poke(layout::EOI_MODE, layout::Eoi::Xapic as u64);
        }
        let mut state = self.vcpu.state().expect("the first state");
        tables::long_mode(&mut state);
        self.allow_features(&mut state);
        self.vcpu.set_state(&state).expect("64-bit mode");
    }

    /// As every kernel has it: engines may run user code in other ways than without.
    fn allow_features(&self, state: &mut VcpuState) {
        if self.has(features::FSGSBASE) {
            state.sregs.cr4 |= ringfence_x86::paging::CR4_FSGSBASE;
        }
        if self.has(features::XSAVE) {
            let components = self.cpuid.get(0xd, 0).map_or(1, |leaf| leaf.eax);
            state.sregs.cr4 |= ringfence_x86::paging::CR4_OSXSAVE;
            state.sregs.xcr0 = components.into();
        }
    }

    /// Places a device in port space.
    pub fn place_port(&self, start: u64, len: u64, device: Arc<dyn PioDevice>) {
        self.pio
            .insert(Range { start, len }, device)
            .expect("a free port");
    }

    /// Places a device in memory space.
    pub fn place(&self, start: u64, len: u64, device: Arc<dyn MmioDevice>) {
        self.mmio
            .insert(Range { start, len }, device)
            .expect("a free address");
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .expect("test memory");
    }

    /// Writes a quadword of guest memory.
    pub fn poke(&self, address: u64, value: u64) {
        tables::poke(&self.ram, address, value);
    }

    /// Reads a quadword of guest memory.
    #[must_use]
    pub fn peek(&self, address: u64) -> u64 {
        self.ram
            .memory()
            .read_obj(GuestAddress(address))
            .expect("test memory")
    }

    /// Maps page `index` of the test area to the physical page at `frame` with these entry bits.
    pub fn map(&self, index: u64, frame: u64, bits: u64) {
        self.poke(layout::PT_TEST + index * 8, frame | bits);
    }

    /// The entry of page `index` of the test area.
    #[must_use]
    pub fn mapping(&self, index: u64) -> u64 {
        self.peek(layout::PT_TEST + index * 8)
    }

    /// Writes an IDT gate of `kind` for the usual handler.
    pub fn set_gate(&self, vector: u8, selector: u16, ist: u64, kind: u64) {
        self.set_gate_to(vector, handlers::handler(vector), selector, ist, kind);
    }

    /// Writes an IDT gate.
    pub fn set_gate_to(&self, vector: u8, handler: u64, selector: u16, ist: u64, kind: u64) {
        let [low, high] = tables::gate(handler, selector, ist, kind);
        let at = layout::IDT + u64::from(vector) * 16;
        self.poke(at, low);
        self.poke(at + 8, high);
    }

    /// Whether the processors have a CPUID feature: leaf, subleaf, register (0 EAX to 3 EDX), bit.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        let Feature(leaf, subleaf, register, bit) = feature;
        self.cpuid.get(leaf, subleaf).is_some_and(|result| {
            let registers = [result.eax, result.ebx, result.ecx, result.edx];
            registers[register] >> bit & 1 != 0
        })
    }

    /// Assembles 64-bit code to [`layout::CODE`] and points the processor there, with nothing
    /// logged or reported.
    pub fn load(&mut self, code: impl FnOnce(&mut Asm) -> Assembled) -> CodeAssemblerResult {
        let mut asm = Asm::new(64, self.has_chips).expect("64 is a width");
        let result = assemble(&mut asm, code).expect("the body's code");
        self.values = asm.values();
        self.write(layout::CODE, &result.inner.code_buffer);
        for slot in 0..layout::MAX_VALUES as u64 {
            self.poke(layout::VALUES + slot * 8, NOT_REPORTED);
        }
        self.poke(layout::FAULT_LOG, 0);
        self.poke(layout::RESUME, 0);
        let mut state = self.vcpu.state().expect("a state");
        tables::long_mode(&mut state);
        self.allow_features(&mut state);
        self.vcpu.set_state(&state).expect("a start");
        result
    }

    /// Makes the loaded code start in ring 3, at the user's view of it.
    pub fn start_in_user_mode(&mut self) {
        let mut state = self.vcpu.state().expect("a state");
        tables::user_mode(&mut state);
        self.vcpu.set_state(&state).expect("ring 3");
    }

    /// Runs to the next exit of the first processor, which a body expects to come soon. The
    /// others run meanwhile.
    pub fn resume(&mut self) -> VcpuExit {
        let wakers = [&self.vcpu].into_iter().chain(&self.others);
        let watchdog = Watchdog::start(wakers.map(|vcpu| vcpu.waker()).collect());
        let (vcpu, others) = (&mut self.vcpu, &mut self.others);
        let exit = std::thread::scope(|scope| {
            let wakers: Vec<_> = others.iter().map(|other| other.waker()).collect();
            for other in others {
                scope.spawn(|| run_beside(other.as_mut()));
            }
            let exit = vcpu.run();
            wakers.iter().for_each(|waker| waker.kick());
            exit
        });
        let expired = watchdog.expired();
        drop(watchdog);
        let describe = || dump::describe(self.vcpu.as_ref(), &self.ram);
        match exit {
            Ok(exit) if !expired => exit,
            Ok(exit) => panic!("the guest hangs (then {exit:?})\n{}", describe()),
            Err(error) => panic!("the engine failed: {error}\n{}", describe()),
        }
    }

    /// Runs to a HLT of a bare guest, with no exception on the way.
    pub fn halt(&mut self) {
        let exit = self.resume();
        let faults = self.faults();
        let described = dump::describe(self.vcpu.as_ref(), &self.ram);
        assert_eq!(
            exit,
            VcpuExit::Halt,
            "exceptions so far: {faults:#?}\n{described}"
        );
        assert!(
            faults.is_empty(),
            "unexpected exceptions: {faults:#?}\n{described}"
        );
    }

    /// Runs until the guest ends.
    pub fn finish(&mut self) {
        let wanted = if self.has_chips {
            VcpuExit::Kicked
        } else {
            VcpuExit::Halt
        };
        let exit = self.resume();
        assert_eq!(
            exit,
            wanted,
            "the guest ended in another way; exceptions so far: {:#?}\n{}",
            self.faults(),
            dump::describe(self.vcpu.as_ref(), &self.ram)
        );
    }

    /// Loads and runs `code` to its end and returns what it reported. No exception may happen.
    pub fn run(&mut self, code: impl FnOnce(&mut Asm) -> Assembled) -> Vec<u64> {
        self.run_expecting(&[], code)
    }

    /// As [`Self::run`]; just these exceptions happen.
    pub fn run_expecting(
        &mut self,
        faults: &[Expected],
        code: impl FnOnce(&mut Asm) -> Assembled,
    ) -> Vec<u64> {
        self.load(|a| {
            code(a)?;
            a.ring0();
            a.done()
        });
        self.finish();
        fault::expect(&self.faults(), faults);
        self.values()
    }

    /// As [`Self::run`]; one #UD may happen.
    pub fn run_or_undefined(&mut self, code: impl FnOnce(&mut Asm) -> Assembled) -> Vec<u64> {
        self.load(|a| {
            code(a)?;
            a.ring0();
            a.done()
        });
        self.finish();
        let faults = self.faults();
        if !faults.is_empty() {
            fault::expect(&faults, &[fault::fault(fault::UD)]);
        }
        self.values()
    }

    /// Expects the reports of `other`'s code, for a guest that continues it.
    pub fn load_values_of(&mut self, other: &Guest) {
        self.values = other.values;
    }

    /// What the guest reported.
    #[must_use]
    pub fn values(&self) -> Vec<u64> {
        let values: Vec<u64> = (0..self.values as u64)
            .map(|slot| self.peek(layout::VALUES + slot * 8))
            .collect();
        if let Some(missing) = values.iter().position(|&value| value == NOT_REPORTED) {
            panic!("the guest did not report value {missing}; it reported {values:x?}");
        }
        values
    }

    /// The exceptions logged since the code was loaded.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        let count = self.peek(layout::FAULT_LOG).min(layout::MAX_FAULTS);
        (0..count)
            .map(|index| {
                let field = |n: u64| self.peek(layout::FAULT_LOG + 64 + index * 72 + n * 8);
                Fault {
                    vector: field(0),
                    error: field(1),
                    rip: field(2),
                    cs: field(3),
                    rflags: field(4),
                    rsp: field(5),
                    ss: field(6),
                    cr2: field(7),
                    handler_rsp: field(8),
                }
            })
            .collect()
    }

    /// The interrupts that came, in order.
    #[must_use]
    pub fn interrupts(&self) -> Vec<u64> {
        let count = self.peek(layout::IRQ_LOG).min(255);
        (1..=count)
            .map(|index| self.peek(layout::IRQ_LOG + index * 8))
            .collect()
    }

    /// How often `vector` came.
    #[must_use]
    pub fn interrupt_count(&self, vector: u8) -> u64 {
        self.peek(layout::IRQ_COUNTS + u64::from(vector) * 8)
    }
}

/// A CPUID feature: leaf, subleaf, register (0 EAX to 3 EDX), bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature(pub u32, pub u32, pub usize, pub u32);

/// A further processor runs until it is kicked; how else it may end is the first one's to notice.
fn run_beside(vcpu: &mut dyn Vcpu) {
    match vcpu.run() {
        Ok(VcpuExit::Kicked) => {}
        other => eprintln!("a further processor ended with {other:?}"),
    }
}

fn assemble(
    asm: &mut Asm,
    code: impl FnOnce(&mut Asm) -> Assembled,
) -> Result<CodeAssemblerResult, IcedError> {
    code(asm)?;
    asm.assemble_options(
        layout::CODE,
        BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
    )
}

fn with_apic_id(cpuid: &CpuidTable, index: u32) -> CpuidTable {
    let mut table = cpuid.clone();
    if let Some(features) = table.get_mut(1, 0) {
        features.ebx = features.ebx & 0x00ff_ffff | index << 24;
    }
    table
}

fn interrupts(
    bench: &Bench<'_>,
    setup: Setup,
    pio: &Arc<PioBus>,
    mmio: &Arc<MmioBus>,
) -> (Interrupts, Option<Arc<dyn InterruptController>>) {
    if !setup.chips {
        return (Interrupts::None, None);
    }
    match bench.engine.caps().interrupt_chips {
        InterruptChips::Engine => (Interrupts::Engine, None),
        InterruptChips::Board => {
            let board = bench.board.expect("this engine needs the board's chips");
            let chips = board.make(setup.vcpus, pio, mmio);
            (Interrupts::Board(chips.local_apics), Some(chips.controller))
        }
    }
}
