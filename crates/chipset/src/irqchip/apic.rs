//! One local APIC: pending and served vectors, priorities, events, registers' state.
//!
//! Spec: SDM 3A §11.4 to §11.12 ("Advanced Programmable Interrupt Controller").
//!
//! The vCPU's own thread is inside for every register access and acknowledge; other threads only
//! add: vectors to IRR and TMR, events, errors, the level of the PIC's wire. So the registers are
//! atomics without locks, and `has_interrupt` costs two loads when nothing waits. The timer, which
//! its callback and the vCPU both change, is behind a lock of its own.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use ringfence_clock::Clock;
use ringfence_engine::ApicEvent;
use ringfence_engine::VcpuWaker;

use super::apic_timer::ApicTimer;
use super::delivery::Delivery;
use super::delivery::LogicalId;
use super::vectors::VectorSet;

/// Physical address of the register page after reset.
pub(super) const DEFAULT_BASE: u64 = 0xfee0_0000;
/// IA32_APIC_BASE: bootstrap processor, x2APIC mode, enabled (SDM 3A §11.12.1).
pub(super) const BASE_BSP: u64 = 1 << 8;
pub(super) const BASE_X2APIC: u64 = 1 << 10;
pub(super) const BASE_ENABLE: u64 = 1 << 11;

/// SVR: software enable (§11.9).
pub(super) const SVR_ENABLE: u32 = 1 << 8;
const SVR_RESET: u32 = 0xff;
const DFR_RESET: u32 = u32::MAX;

/// LVT: masked; delivery mode ExtINT.
pub(super) const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 7 << 8;
const LVT_EXTINT: u32 = 7 << 8;

/// ESR bits (§11.5.3).
pub(super) const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub(super) const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
pub(super) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Vectors below are the processor's exceptions.
const FIRST_VECTOR: u8 = 16;

const EVENT_NMI: u32 = 1 << 0;
const EVENT_INIT: u32 = 1 << 1;
const EVENT_SIPI: u32 = 1 << 2;

/// Entries of the local vector table that something here drives, by the place of their registers
/// from 0x320 on. Thermal sensor (1), performance counters (2) and LINT1 (4) have no source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Lvt {
    Timer = 0,
    Lint0 = 3,
    Error = 5,
}

pub(super) const LVT_ENTRIES: usize = 6;

/// One local APIC.
pub(super) struct Apic {
    pub(super) id: u32,
    pub(super) base: AtomicU64,
    pub(super) tpr: AtomicU32,
    ppr: AtomicU32,
    pub(super) irr: VectorSet,
    pub(super) isr: VectorSet,
    pub(super) tmr: VectorSet,
    pub(super) ldr: AtomicU32,
    pub(super) dfr: AtomicU32,
    pub(super) svr: AtomicU32,
    pub(super) esr: AtomicU32,
    esr_pending: AtomicU32,
    pub(super) icr: AtomicU64,
    pub(super) lvt: [AtomicU32; LVT_ENTRIES],
    pub(super) timer: ApicTimer,
    events: AtomicU32,
    start_up_vector: AtomicU32,
    waits_for_start_up: AtomicBool,
    pic_wire: AtomicBool,
    waker: OnceLock<Arc<dyn VcpuWaker>>,
}

impl std::fmt::Debug for Apic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Apic")
            .field("id", &self.id)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl Apic {
    /// The APIC of processor `id` after power-up: processor 0 is the bootstrap processor, the
    /// others wait for their start-up message.
    pub(super) fn new(id: u32, clock: Arc<Clock>) -> Self {
        let is_bsp = id == 0;
        let base = DEFAULT_BASE | BASE_ENABLE | if is_bsp { BASE_BSP } else { 0 };
        let apic = Self {
            id,
            base: AtomicU64::new(base),
            tpr: AtomicU32::new(0),
            ppr: AtomicU32::new(0),
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            ldr: AtomicU32::new(0),
            dfr: AtomicU32::new(DFR_RESET),
            svr: AtomicU32::new(SVR_RESET),
            esr: AtomicU32::new(0),
            esr_pending: AtomicU32::new(0),
            icr: AtomicU64::new(0),
            lvt: [const { AtomicU32::new(LVT_MASKED) }; LVT_ENTRIES],
            timer: ApicTimer::new(clock),
            events: AtomicU32::new(0),
            start_up_vector: AtomicU32::new(0),
            waits_for_start_up: AtomicBool::new(!is_bsp),
            pic_wire: AtomicBool::new(false),
            waker: OnceLock::new(),
        };
        if is_bsp {
            // What firmware leaves behind for the operating system: the PIC's wire connected
            // (MP specification 1.4 §3.6.2.2, virtual wire mode).
            apic.lvt(Lvt::Lint0).store(LVT_EXTINT, Ordering::Relaxed);
        }
        apic
    }

    pub(super) fn connect(&self, waker: Arc<dyn VcpuWaker>) {
        // A vCPU is made once a machine, so there is one waker.
        let _ = self.waker.set(waker);
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    pub(super) fn lvt(&self, entry: Lvt) -> &AtomicU32 {
        &self.lvt[entry as usize]
    }

    pub(super) fn is_x2apic(&self) -> bool {
        self.base.load(Ordering::Relaxed) & BASE_X2APIC != 0
    }

    pub(super) fn is_hardware_enabled(&self) -> bool {
        self.base.load(Ordering::Relaxed) & BASE_ENABLE != 0
    }

    pub(super) fn is_software_enabled(&self) -> bool {
        self.svr.load(Ordering::Relaxed) & SVR_ENABLE != 0
    }

    fn accepts_vectors(&self) -> bool {
        self.is_hardware_enabled() && self.is_software_enabled()
    }

    /// The logical identity; an x2APIC's is derived from its ID (§11.12.10.2).
    pub(super) fn logical_id(&self) -> LogicalId {
        let x2apic = self.is_x2apic();
        LogicalId {
            x2apic,
            ldr: if x2apic {
                x2apic_ldr(self.id)
            } else {
                self.ldr.load(Ordering::Relaxed)
            },
            dfr: self.dfr.load(Ordering::Relaxed),
        }
    }

    /// Priority class for lowest-priority arbitration; `None` when it takes no vectors.
    pub(super) fn arbitration_priority(&self) -> Option<u32> {
        self.accepts_vectors()
            .then(|| self.ppr.load(Ordering::Relaxed))
    }

    /// Takes a message in. `announce` is off for what a vCPU sends to itself: its engine looks
    /// for interrupts after the access anyway.
    pub(super) fn deliver(&self, delivery: Delivery, vector: u8, level: bool, announce: bool) {
        let new = match delivery {
            Delivery::Fixed | Delivery::LowestPriority => self.accept(vector, level),
            Delivery::Nmi => self.post(EVENT_NMI),
            Delivery::Init => self.post(EVENT_INIT),
            Delivery::StartUp => self.post_start_up(vector),
        };
        if new && announce {
            self.wake();
        }
    }

    /// Adds a vector to IRR; whether it is new there.
    fn accept(&self, vector: u8, level: bool) -> bool {
        if !self.accepts_vectors() {
            return false;
        }
        if vector < FIRST_VECTOR {
            return self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
        }
        // Nearly every vector keeps its trigger mode: don't take the cache line for those.
        if self.tmr.contains(vector) != level {
            self.tmr.set(vector, level);
        }
        self.irr.insert(vector)
    }

    /// Records an error; whether that made an interrupt wait.
    pub(super) fn error(&self, bit: u32) -> bool {
        let before = self.esr_pending.fetch_or(bit, Ordering::SeqCst);
        let entry = self.lvt(Lvt::Error).load(Ordering::Relaxed);
        let vector = entry.to_le_bytes()[0];
        if before & bit != 0 || entry & LVT_MASKED != 0 {
            return false;
        }
        if vector < FIRST_VECTOR {
            // An error about the error interrupt itself: recorded, or it would never end.
            self.esr_pending
                .fetch_or(ESR_RECEIVE_ILLEGAL_VECTOR, Ordering::SeqCst);
            return false;
        }
        self.accept(vector, false)
    }

    /// A write to ESR shows what was recorded since the last one (§11.5.3).
    pub(super) fn latch_errors(&self) {
        let errors = self.esr_pending.swap(0, Ordering::SeqCst);
        self.esr.store(errors, Ordering::Relaxed);
    }

    fn post(&self, event: u32) -> bool {
        self.events.fetch_or(event, Ordering::SeqCst) & event == 0
    }

    /// Start-up messages count only after INIT (§9.4.3): the second one that the algorithm sends
    /// meets a running processor.
    fn post_start_up(&self, vector: u8) -> bool {
        let init_pending = self.events.load(Ordering::SeqCst) & EVENT_INIT != 0;
        if !init_pending && !self.waits_for_start_up.load(Ordering::SeqCst) {
            return false;
        }
        self.start_up_vector
            .store(u32::from(vector), Ordering::SeqCst);
        self.post(EVENT_SIPI)
    }

    /// The next INIT, SIPI or NMI.
    pub(super) fn take_event(&self) -> Option<ApicEvent> {
        let events = self.events.load(Ordering::SeqCst);
        if events == 0 {
            return None;
        }
        if events & EVENT_INIT != 0 {
            self.waits_for_start_up.store(true, Ordering::SeqCst);
            self.events.fetch_and(!EVENT_INIT, Ordering::SeqCst);
            self.reset_by_init();
            return Some(ApicEvent::Init);
        }
        if self.waits_for_start_up.load(Ordering::SeqCst) {
            // An NMI stays pending until the processor runs.
            if events & EVENT_SIPI == 0 {
                return None;
            }
            self.waits_for_start_up.store(false, Ordering::SeqCst);
            self.events.fetch_and(!EVENT_SIPI, Ordering::SeqCst);
            let vector = self.start_up_vector.load(Ordering::SeqCst);
            return Some(ApicEvent::Sipi(vector.to_le_bytes()[0]));
        }
        self.events
            .fetch_and(!(EVENT_NMI | EVENT_SIPI), Ordering::SeqCst);
        (events & EVENT_NMI != 0).then_some(ApicEvent::Nmi)
    }

    /// "An INIT reset … resets the local APIC to its power-up state", IDs and base excepted
    /// (§11.4.7.3).
    fn reset_by_init(&self) {
        self.timer.stop();
        for set in [&self.irr, &self.isr, &self.tmr] {
            set.clear();
        }
        self.tpr.store(0, Ordering::Relaxed);
        self.ldr.store(0, Ordering::Relaxed);
        self.dfr.store(DFR_RESET, Ordering::Relaxed);
        self.svr.store(SVR_RESET, Ordering::Relaxed);
        self.esr.store(0, Ordering::Relaxed);
        self.esr_pending.store(0, Ordering::Relaxed);
        self.icr.store(0, Ordering::Relaxed);
        for entry in &self.lvt {
            entry.store(LVT_MASKED, Ordering::Relaxed);
        }
        self.update_priority();
    }

    /// Whether the processor was told INIT and waits for its start-up message.
    pub(super) fn waits_for_start_up(&self) -> bool {
        self.waits_for_start_up.load(Ordering::SeqCst)
    }

    /// Sets [`Self::waits_for_start_up`], on restore.
    pub(super) fn set_waits_for_start_up(&self, waits: bool) {
        self.waits_for_start_up.store(waits, Ordering::SeqCst);
    }

    /// The vector that [`Self::acknowledge`] would take.
    fn deliverable(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        let above = u32::from(vector >> 4) > self.ppr.load(Ordering::Relaxed) >> 4;
        (above && self.accepts_vectors()).then_some(vector)
    }

    pub(super) fn has_interrupt(&self) -> bool {
        self.deliverable().is_some() || self.pic_interrupts()
    }

    /// Takes the deliverable vector of highest priority into service.
    pub(super) fn acknowledge(&self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        self.update_priority();
        Some(vector)
    }

    /// Ends the interrupt of highest priority in service; its vector, when the I/O APIC must hear.
    pub(super) fn end_of_interrupt(&self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        self.update_priority();
        self.tmr.contains(vector).then_some(vector)
    }

    /// PPR from TPR and the vectors in service (§11.8.3.1).
    pub(super) fn update_priority(&self) {
        let tpr = self.tpr.load(Ordering::Relaxed);
        let served = u32::from(self.isr.highest().unwrap_or(0)) & 0xf0;
        let ppr = if tpr & 0xf0 >= served { tpr } else { served };
        self.ppr.store(ppr, Ordering::Relaxed);
    }

    pub(super) fn ppr(&self) -> u32 {
        self.ppr.load(Ordering::Relaxed)
    }

    /// Drives the wire from the PIC's output.
    pub(super) fn set_pic_wire(&self, high: bool) {
        if self.pic_wire.swap(high, Ordering::SeqCst) != high && high {
            self.wake();
        }
    }

    /// Whether the PIC's wire reaches the processor: by LINT0 as ExtINT, or directly while the
    /// APIC is off (§11.4.3).
    pub(super) fn pic_interrupts(&self) -> bool {
        if !self.pic_wire.load(Ordering::SeqCst) {
            return false;
        }
        let lint0 = self.lvt(Lvt::Lint0).load(Ordering::Relaxed);
        !self.is_hardware_enabled() || lint0 & (LVT_MASKED | LVT_MODE) == LVT_EXTINT
    }

    /// A local source fires.
    pub(super) fn fire(&self, entry: Lvt, announce: bool) {
        let value = self.lvt(entry).load(Ordering::Relaxed);
        if value & LVT_MASKED != 0 {
            return;
        }
        if let Some(delivery) = Delivery::decode(value >> 8) {
            self.deliver(delivery, value.to_le_bytes()[0], false, announce);
        }
    }
}

/// §11.12.10.2: cluster in the upper half, one bit of sixteen in the lower.
pub(super) fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}
