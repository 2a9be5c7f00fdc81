//! Cases run by the engine, as ring 3 code of a small guest.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_engine::Engine;
use ringfence_engine::EngineError;
use ringfence_engine::Interrupts;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::VcpuWaker;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_engine_bt::BtEngine;
use ringfence_engine_bt::Direct;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::paging::*;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::CS;
use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::layout::ARENA_BYTES;
use crate::layout::Access;
use crate::layout::CODE_BYTES;
use crate::layout::pages;
use crate::ring0;
use crate::ring0::ARENA;
use crate::ring0::KERNEL;
use crate::state::State;

/// How a batch is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Straight on.
    Straight,
    /// Pages appear when a page fault asks for them.
    Demand,
    /// Kicked at random moments; the state is saved and loaded each time.
    Kicked,
    /// Instruction by instruction, by the monitor.
    Stepped,
}

/// All manners.
pub const MANNERS: [Manner; 4] = [
    Manner::Straight,
    Manner::Demand,
    Manner::Kicked,
    Manner::Stepped,
];

/// Why a batch could not be run to its end.
#[derive(Debug)]
pub enum Failure {
    /// The engine gave up.
    Engine(EngineError),
    /// It came back for another reason than the end.
    Exit(VcpuExit),
    /// It didn't end: where it was.
    Hang(u64),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(error) => write!(f, "{error}"),
            Self::Exit(exit) => write!(f, "unexpected exit: {exit:?}"),
            Self::Hang(rip) => write!(f, "the batch doesn't end: it is at {rip:#x}"),
        }
    }
}

/// The guest.
pub struct Guest {
    // Dropped before the machine that it belongs to.
    vcpu: Box<dyn Vcpu>,
    vm: Box<dyn Vm>,
    ram: GuestRam,
    kicker: Kicker,
    stepping: bool,
    written: Vec<u8>,
}

/// A flat segment.
fn flat(selector: u64, access: u32) -> Segment {
    Segment {
        selector: u16::try_from(selector).unwrap_or(0),
        base: 0,
        limit: u32::MAX,
        access,
    }
}

impl Guest {
    /// A guest that waits for its first batch. Its code is translated.
    ///
    /// # Errors
    /// When the host can't run the engine.
    pub fn new() -> Result<Self, EngineError> {
        Self::with(Direct::Never)
    }

    /// The same, with code run directly when `direct` says so.
    ///
    /// # Errors
    /// When the host can't run the engine.
    ///
    /// # Panics
    /// When test memory can't be had.
    pub fn with(direct: Direct) -> Result<Self, EngineError> {
        let engine = BtEngine::new()?.with_direct(direct);
        let ram = GuestRam::new(ring0::RAM_BYTES, HugePages::Off).expect("test RAM");
        let vm = engine.create_vm(VmSetup {
            ram: ram.clone(),
            pio: Arc::new(PioBus::default()),
            mmio: Arc::new(MmioBus::default()),
            vcpus: 1,
            interrupts: Interrupts::None,
            unclaimed: Unclaimed::Float,
        })?;
        let mut cpuid = engine.supported_cpuid()?;
        cpuid.hide_local_apic();
        let vcpu = vm.create_vcpu(0, cpuid)?;
        let kicker = Kicker::new(vcpu.waker());
        let mut guest = Self {
            vcpu,
            vm,
            ram,
            kicker,
            stepping: false,
            written: vec![0; CODE_BYTES],
        };
        guest.furnish()?;
        Ok(guest)
    }

    /// One of the engine's counters; 0 when it has none of that name.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        let all = self.vm.counters();
        all.iter()
            .find(|(known, _)| *known == name)
            .map_or(0, |&(_, value)| value)
    }

    /// Its vCPU.
    pub(crate) fn vcpu(&mut self) -> &mut dyn Vcpu {
        self.vcpu.as_mut()
    }

    /// Kicks the vCPU at random moments from now on, or no more.
    pub(crate) fn kick_all_the_time(&self, on: bool) {
        if on {
            self.kicker.watch(true);
        } else {
            self.kicker.rest();
        }
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .expect("test memory");
    }

    fn poke(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    fn furnish(&mut self) -> Result<(), EngineError> {
        for (selector, descriptor) in [
            (ring0::KERNEL_CODE, 0x00af_9b00_0000_ffff),
            (ring0::KERNEL_DATA, 0x00cf_9300_0000_ffff),
            (0x20, 0x00cf_fb00_0000_ffff),
            (ring0::USER_DATA & !7, 0x00cf_f300_0000_ffff),
            (ring0::USER_CODE & !7, 0x00af_fb00_0000_ffff),
        ] {
            self.poke(ring0::GDT + selector, descriptor);
        }
        let base = KERNEL + ring0::TSS;
        let low = 0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        self.poke(ring0::GDT + u64::from(ring0::TASK), low);
        self.poke(ring0::GDT + u64::from(ring0::TASK) + 8, base >> 32);
        // The I/O permission map lies behind the limit: no port is open.
        self.write(ring0::TSS + 0x66, &0x68_u16.to_le_bytes());
        self.poke(ring0::TSS + 4, KERNEL + ring0::KERNEL_STACK);
        for vector in 0..32 {
            let handler = KERNEL + ring0::STUBS + vector * ring0::STUB_BYTES;
            let kind = if matches!(vector, 3 | 4) { 0xee } else { 0x8e };
            let low = handler & 0xffff
                | ring0::KERNEL_CODE << 16
                | kind << 40
                | (handler >> 16 & 0xffff) << 48;
            self.poke(ring0::IDT + vector * 16, low);
            self.poke(ring0::IDT + vector * 16 + 8, handler >> 32);
            self.write(
                ring0::STUBS + vector * ring0::STUB_BYTES,
                &ring0::stub(vector).expect("a stub"),
            );
        }
        let demanded = self.write_tables();
        let (code, start) = ring0::main(demanded).expect("ring 0's code");
        assert!(code.len() < 4096);
        self.write(ring0::MAIN, &code);
        let mut state = self.vcpu.state()?;
        enter_long_mode(&mut state, start);
        self.vcpu.set_state(&state)
    }

    /// Page tables; returns how many pages can be withdrawn.
    fn write_tables(&self) -> usize {
        let mut tables = Tables {
            guest: self,
            next: ring0::TABLES + 0x1000,
        };
        for large in 0..ring0::RAM_BYTES >> 21 {
            let at = large << 21;
            let entry = tables.entry(KERNEL + at, 2);
            self.poke(entry, at | PTE_P | PTE_W | PTE_PS | PTE_A | PTE_D);
        }
        let mut demanded = 0;
        for (address, place, access) in pages() {
            let entry = tables.entry(address, 1);
            let rights = match access {
                Access::Absent => continue,
                Access::Read => PTE_NX,
                Access::Write => PTE_NX | PTE_W,
                Access::All => PTE_W,
            };
            let value = (ARENA + place) | PTE_P | PTE_U | rights;
            self.poke(entry, value);
            let at = ring0::DEMAND_TABLE + demanded as u64 * ring0::DEMAND_BYTES;
            self.poke(at, address >> 12);
            self.poke(at + 8, value);
            self.poke(at + 16, KERNEL + entry);
            demanded += 1;
        }
        demanded
    }

    /// Makes the guest's memory `arena`. Code is written as a device writes it, which the engine
    /// must notice, and only where it changes.
    ///
    /// # Panics
    /// When `arena` has another length than the arena.
    pub fn set_arena(&mut self, arena: &[u8]) {
        assert_eq!(arena.len(), ARENA_BYTES);
        self.write(ARENA, arena);
        self.written.copy_from_slice(&arena[..CODE_BYTES]);
    }

    /// The guest's memory.
    ///
    /// # Panics
    /// When test memory can't be read.
    #[must_use]
    pub fn arena(&self) -> Vec<u8> {
        let mut arena = vec![0; ARENA_BYTES];
        self.ram
            .memory()
            .read_slice(&mut arena, GuestAddress(ARENA))
            .expect("test memory");
        arena
    }

    /// Runs a batch.
    ///
    /// # Errors
    /// When it doesn't come to its end.
    ///
    /// # Panics
    /// When test memory can't be read.
    pub fn run(&mut self, inputs: &[State], manner: Manner) -> Result<Vec<State>, Failure> {
        for (index, input) in (0..).zip(inputs) {
            self.write(
                ring0::INPUTS + index * size_of::<State>() as u64,
                input.bytes(),
            );
        }
        self.poke(ring0::COUNT, inputs.len() as u64);
        self.poke(ring0::DEMAND, u64::from(manner == Manner::Demand));
        let stepping = manner == Manner::Stepped;
        if stepping != self.stepping {
            self.vcpu
                .set_debug(stepping, &[])
                .map_err(Failure::Engine)?;
            self.stepping = stepping;
        }
        let result = self.run_to_end(inputs.len(), manner);
        self.kicker.rest();
        if manner == Manner::Demand {
            // Nobody supplies the next batch's pages. Absent ones are in no TLB.
            self.write_tables();
        }
        result?;
        let mut bytes = vec![0; size_of_val(inputs)];
        self.ram
            .memory()
            .read_slice(&mut bytes, GuestAddress(ring0::OUTPUTS))
            .expect("test memory");
        Ok(bytes
            .chunks(size_of::<State>())
            .map(State::from_bytes)
            .collect())
    }

    fn hang(&self) -> Failure {
        Failure::Hang(self.vcpu.state().map_or(0, |state| state.regs.rip))
    }

    fn run_to_end(&mut self, cases: usize, manner: Manner) -> Result<(), Failure> {
        self.kicker.watch(manner == Manner::Kicked);
        let mut steps = 0_usize;
        loop {
            let exit = self.vcpu.run().map_err(Failure::Engine)?;
            match exit {
                VcpuExit::Halt => return Ok(()),
                VcpuExit::Kicked if self.kicker.is_late() => return Err(self.hang()),
                VcpuExit::Kicked => {
                    let state = self.vcpu.state().map_err(Failure::Engine)?;
                    self.vcpu.set_state(&state).map_err(Failure::Engine)?;
                }
                VcpuExit::Debug(_) => {
                    steps += 1;
                    if steps > cases * 100_000 + 1_000_000 {
                        return Err(self.hang());
                    }
                }
                other => return Err(Failure::Exit(other)),
            }
        }
    }
}

/// Writes page tables.
struct Tables<'a> {
    guest: &'a Guest,
    next: u64,
}

impl Tables<'_> {
    /// Physical address of `address`'s entry at `level` (1 for pages).
    fn entry(&mut self, address: u64, level: u32) -> u64 {
        let mut table = ring0::TABLES;
        for above in (level + 1..=4).rev() {
            let at = table + (address >> (3 + 9 * above) & 0x1ff) * 8;
            let found: u64 = self
                .guest
                .ram
                .memory()
                .read_obj(GuestAddress(at))
                .expect("test memory");
            table = found & PTE_ADDR;
            if table == 0 {
                table = self.next;
                self.next += 0x1000;
                self.guest.poke(at, table | PTE_P | PTE_W | PTE_U | PTE_A);
            }
        }
        table + (address >> (3 + 9 * level) & 0x1ff) * 8
    }
}

pub(crate) fn enter_long_mode(state: &mut VcpuState, start: u64) {
    state.msrs.clear();
    state.xsave.clear();
    state.lapic.clear();
    let sregs = &mut state.sregs;
    sregs.segments = [flat(ring0::KERNEL_DATA, 0xc093); 6];
    sregs.segments[CS] = flat(ring0::KERNEL_CODE, 0xa09b);
    // As Linux leaves them: null.
    for index in [ringfence_x86::state::ES, ringfence_x86::state::DS, FS, GS] {
        sregs.segments[index] = Segment {
            access: ACCESS_UNUSABLE,
            ..Segment::default()
        };
    }
    sregs.tr = Segment {
        selector: ring0::TASK,
        base: KERNEL + ring0::TSS,
        limit: 0x67,
        access: 0x8b,
    };
    sregs.ldtr = Segment {
        access: ACCESS_UNUSABLE,
        ..Segment::default()
    };
    sregs.gdt = DescriptorTable {
        base: KERNEL + ring0::GDT,
        limit: 0x4f,
    };
    sregs.idt = DescriptorTable {
        base: KERNEL + ring0::IDT,
        limit: 0x1ff,
    };
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    sregs.cr3 = ring0::TABLES;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE;
    sregs.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    sregs.xcr0 = 7;
    state.regs.rip = start;
    state.regs.rflags = 2;
    state.regs.gpr = [0; 16];
    state.regs.gpr[4] = KERNEL + ring0::KERNEL_STACK;
}

/// Kicks a vCPU from another thread: at random moments, or when a batch takes too long.
struct Kicker {
    shared: Arc<KickerState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct KickerState {
    /// Counts batches; odd while one runs.
    batch: AtomicU64,
    /// Kicks come all the time.
    restless: AtomicBool,
    late: AtomicBool,
    over: AtomicBool,
}

impl Kicker {
    /// A batch takes milliseconds; the rest is for hosts that are busy with other things.
    const LATE_MS: u64 = 60_000;

    fn new(waker: Arc<dyn VcpuWaker>) -> Self {
        let shared = Arc::new(KickerState::default());
        let state = Arc::clone(&shared);
        let thread = std::thread::spawn(move || state.work(waker.as_ref()));
        Self {
            shared,
            thread: Some(thread),
        }
    }

    fn watch(&self, restless: bool) {
        self.shared.restless.store(restless, Ordering::SeqCst);
        self.shared.batch.fetch_add(1, Ordering::SeqCst);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    fn rest(&self) {
        self.shared.batch.fetch_add(1, Ordering::SeqCst);
    }

    fn is_late(&self) -> bool {
        self.shared.late.load(Ordering::SeqCst)
    }
}

impl KickerState {
    fn work(&self, waker: &dyn VcpuWaker) {
        let mut random = crate::random::Random::new(1);
        while !self.over.load(Ordering::SeqCst) {
            let batch = self.batch.load(Ordering::SeqCst);
            if batch.is_multiple_of(2) {
                std::thread::park();
                continue;
            }
            let start = std::time::Instant::now();
            let mut late = false;
            while self.batch.load(Ordering::SeqCst) == batch {
                if self.restless.load(Ordering::SeqCst) {
                    for _ in 0..random.below(40_000) {
                        std::hint::spin_loop();
                    }
                    waker.kick();
                } else {
                    std::thread::park_timeout(std::time::Duration::from_millis(500));
                }
                let spent = start.elapsed().as_millis();
                if !late && spent > u128::from(Kicker::LATE_MS) {
                    late = true;
                    self.late.store(true, Ordering::SeqCst);
                    waker.kick();
                }
            }
        }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.shared.batch.fetch_add(2, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                // It says so itself.
            }
        }
    }
}
