//! What emulated functions have in common: header, BARs, capabilities, interrupts.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::InterruptController;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use crate::BarSpec;
use crate::ConfigSpace;
use crate::Identity;
use crate::IntxPin;
use crate::MSIX_CAPABILITY;
use crate::Msix;
use crate::MsixLayout;
use crate::MsixState;
use crate::PciError;
use crate::Space;
use crate::Window;
use crate::config::COMMAND;
use crate::config::COMMAND_INTX_DISABLE;
use crate::config::COMMAND_IO;
use crate::config::COMMAND_MEMORY;
use crate::config::INTERRUPT_LINE;
use crate::config::INTERRUPT_PIN;
use crate::config::STATUS;
use crate::config::STATUS_INTERRUPT;

/// Version of [`FunctionState`].
const STATE_VERSION: u32 = 1;

/// A function's saved configuration space and MSI-X table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    version: u32,
    config: Vec<u8>,
    intx_asserted: bool,
    msix: Option<MsixState>,
}

#[derive(Debug)]
struct Header {
    config: ConfigSpace,
    intx_asserted: bool,
}

/// The part of an emulated function that every one has. A device owns one and delegates to it.
#[derive(Debug)]
pub struct PciFunction {
    header: Mutex<Header>,
    bars: Vec<BarSpec>,
    msix: Option<(u16, Arc<Msix>)>,
    intx: Option<IntxPin>,
}

impl PciFunction {
    /// A function with nothing but its header.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        Self {
            header: Mutex::new(Header {
                config: ConfigSpace::new(identity),
                intx_asserted: false,
            }),
            bars: Vec::new(),
            msix: None,
            intx: None,
        }
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header_mut(&mut self) -> &mut Header {
        self.header
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a BAR.
    ///
    /// # Errors
    /// [`PciError::BadBar`] when the header can't hold it.
    pub fn add_bar(&mut self, spec: BarSpec) -> Result<(), PciError> {
        spec.check()?;
        let registers = |bar: &BarSpec| bar.index..=bar.index + u8::from(bar.is_64_bit());
        let taken = self.bars.iter().any(|other| {
            registers(other).contains(&spec.index) || registers(&spec).contains(&other.index)
        });
        if taken {
            return Err(PciError::BadBar {
                index: spec.index,
                size: spec.size,
                why: "its register is taken",
            });
        }
        let mask = (!(spec.size - 1)).to_le_bytes();
        let config = &mut self.header_mut().config;
        config.set(spec.register(), &spec.flags().to_le_bytes());
        let width = if spec.is_64_bit() { 8 } else { 4 };
        config.set_writable(spec.register(), &mask[..width]);
        self.bars.push(spec);
        Ok(())
    }

    /// Appends a capability: see [`ConfigSpace::add_capability`].
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`] when it doesn't fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, PciError> {
        self.header_mut().config.add_capability(id, body, writable)
    }

    /// Gives it `vectors` message-signalled interrupts (§6.8.2).
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`] when the capability doesn't fit.
    pub fn add_msix(
        &mut self,
        controller: Arc<dyn InterruptController>,
        vectors: u16,
        layout: MsixLayout,
    ) -> Result<Arc<Msix>, PciError> {
        let msix = Arc::new(Msix::new(controller, vectors));
        let mut body = Vec::with_capacity(10);
        body.extend((msix.vectors() - 1).to_le_bytes());
        for offset in [layout.table_offset, layout.pba_offset] {
            body.extend((offset & !7 | u32::from(layout.bar)).to_le_bytes());
        }
        let mut writable = [0; 10];
        writable[1] = 0b1100_0000;
        let at = self.add_capability(MSIX_CAPABILITY, &body, &writable)?;
        self.msix = Some((u16::from(at) + 2, Arc::clone(&msix)));
        Ok(msix)
    }

    /// Wires INTA.
    pub fn add_intx(&mut self, pin: IntxPin) {
        let line = pin.gsi().and_then(|gsi| u8::try_from(gsi.0).ok());
        let config = &mut self.header_mut().config;
        config.set(INTERRUPT_PIN, &[1]);
        config.set(INTERRUPT_LINE, &[line.unwrap_or(0xff)]);
        self.intx = Some(pin);
    }

    /// Its message-signalled interrupts.
    #[must_use]
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// Asserts or releases INTA. Silent while MSI-X is on or the guest disabled it (§6.2.2).
    pub fn set_intx(&self, high: bool) {
        let mut header = self.header();
        header.intx_asserted = high;
        self.drive_intx(&mut header);
    }

    fn drive_intx(&self, header: &mut Header) {
        let status = header.config.u16(STATUS) & !STATUS_INTERRUPT;
        let pending = if header.intx_asserted {
            STATUS_INTERRUPT
        } else {
            0
        };
        header.config.set(STATUS, &(status | pending).to_le_bytes());
        if let Some(pin) = &self.intx {
            let messages = self.msix().is_some_and(|msix| msix.is_enabled());
            let disabled = header.config.u16(COMMAND) & COMMAND_INTX_DISABLE != 0;
            pin.set(header.intx_asserted && !messages && !disabled);
        }
    }

    /// A configuration read.
    pub fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.header().config.read(offset, data);
    }

    /// A configuration write with its effects on the interrupts.
    pub fn write_config(&self, offset: u16, data: &[u8]) {
        let mut header = self.header();
        header.config.write(offset, data);
        let touches = |register: u16| {
            let end = usize::from(offset) + data.len();
            usize::from(register) < end && offset < register.saturating_add(2)
        };
        let mut interrupts = touches(0x04);
        if let Some((control, msix)) = &self.msix
            && touches(*control)
        {
            msix.set_control(header.config.u16(usize::from(*control)));
            interrupts = true;
        }
        if interrupts {
            self.drive_intx(&mut header);
        }
    }

    /// Its BARs.
    #[must_use]
    pub fn bars(&self) -> &[BarSpec] {
        &self.bars
    }

    /// What decodes now.
    #[must_use]
    pub fn windows(&self) -> Vec<Window> {
        let header = self.header();
        let command = header.config.u16(COMMAND);
        let decodes = |bar: &&BarSpec| {
            let enable = match bar.space() {
                Space::Io => COMMAND_IO,
                Space::Memory => COMMAND_MEMORY,
            };
            command & enable != 0
        };
        let window = |bar: &BarSpec| {
            let mut start = u64::from(header.config.u32(bar.register()));
            if bar.is_64_bit() {
                start |= u64::from(header.config.u32(bar.register() + 4)) << 32;
            }
            Window {
                bar: bar.index,
                space: bar.space(),
                start: start & !(bar.size - 1),
                len: bar.size,
            }
        };
        self.bars.iter().filter(decodes).map(window).collect()
    }

    /// Back to power-on, but for the BAR addresses: whoever resets programs them or keeps them.
    pub fn reset(&self) {
        let mut header = self.header();
        header.config.write(0x04, &[0; 2]);
        header.intx_asserted = false;
        if let Some((control, msix)) = &self.msix {
            header.config.write(*control, &[0; 2]);
            msix.reset();
        }
        self.drive_intx(&mut header);
    }

    /// Takes the state.
    #[must_use]
    pub fn save(&self) -> FunctionState {
        let header = self.header();
        FunctionState {
            version: STATE_VERSION,
            config: header.config.bytes().to_vec(),
            intx_asserted: header.intx_asserted,
            msix: self.msix().map(|msix| msix.save()),
        }
    }

    /// Becomes what was saved. The root complex must look at the windows afterwards.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is another device's.
    pub fn restore(&self, state: FunctionState) -> Result<(), RestoreError> {
        const WHAT: &str = "PCI function";
        let mismatch = |why: &str| RestoreError::Mismatch {
            what: WHAT,
            why: why.to_owned(),
        };
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        let config: [u8; 256] = state
            .config
            .try_into()
            .map_err(|_| mismatch("its configuration space is not 256 bytes"))?;
        let mut header = self.header();
        if !header.config.same_device(&config) {
            return Err(mismatch("the configuration header is another device's"));
        }
        match (&self.msix, state.msix) {
            (Some((_, msix)), Some(saved)) => msix.restore(saved)?,
            (None, None) => {}
            _ => return Err(mismatch("only one of the two has MSI-X")),
        }
        header.config.load(&config);
        header.intx_asserted = state.intx_asserted;
        self.drive_intx(&mut header);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering;

    use ringfence_bus::Gsi;
    use ringfence_bus::IrqLine;
    use ringfence_bus::MsiMessage;

    use super::*;
    use crate::BarKind;
    use crate::IntxRouter;
    use crate::PciAddress;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl InterruptController for Wire {
        fn set_line(&self, _: Gsi, high: bool) {
            self.0.store(high, Ordering::SeqCst);
        }
        fn send_msi(&self, _: MsiMessage) {}
    }

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn function(wire: &Arc<Wire>) -> PciFunction {
        let mut function = PciFunction::new(&IDENTITY);
        function
            .add_bar(BarSpec {
                index: 0,
                kind: BarKind::Memory64 {
                    prefetchable: false,
                },
                size: 0x8000,
            })
            .expect("bar");
        let layout = MsixLayout {
            bar: 0,
            table_offset: 0x4000,
            pba_offset: 0x6000,
        };
        function.add_msix(wire.clone(), 2, layout).expect("msix");
        let router = IntxRouter::new(vec![IrqLine::new(wire.clone(), Gsi(16))]);
        function.add_intx(router.pin(PciAddress::new(1, 0)));
        function
    }

    fn dword(function: &PciFunction, offset: u16) -> u32 {
        let mut data = [0; 4];
        function.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    // PCI 3.0 §6.2.5.1: software writes all ones and reads back the size.
    #[test]
    fn sizing_a_bar_shows_its_size_and_kind() {
        let function = function(&Arc::default());
        function.write_config(0x10, &[0xff; 4]);
        function.write_config(0x14, &[0xff; 4]);
        assert_eq!(dword(&function, 0x10), 0xffff_8004);
        assert_eq!(dword(&function, 0x14), 0xffff_ffff);
    }

    #[test]
    fn a_window_decodes_only_while_memory_space_is_on() {
        let function = function(&Arc::default());
        function.write_config(0x10, &0xd000_0000_u32.to_le_bytes());
        function.write_config(0x14, &1_u32.to_le_bytes());
        assert!(function.windows().is_empty());
        function.write_config(0x04, &COMMAND_MEMORY.to_le_bytes());
        let [window] = function.windows()[..] else {
            panic!("one window");
        };
        assert_eq!(window.start, 0x1_d000_0000);
        assert_eq!(window.len, 0x8000);
    }

    #[test]
    fn the_wire_is_silent_while_messages_are_on_or_it_is_disabled() {
        let wire = Arc::new(Wire::default());
        let function = function(&wire);
        let (control, _) = *function.msix.as_ref().expect("msix");
        let high = || wire.0.load(Ordering::SeqCst);
        function.set_intx(true);
        assert!(high());
        assert_ne!(dword(&function, 4) >> 16 & u32::from(STATUS_INTERRUPT), 0);
        function.write_config(control, &0x8000_u16.to_le_bytes());
        assert!(!high());
        function.write_config(control, &[0; 2]);
        assert!(high());
        function.write_config(4, &COMMAND_INTX_DISABLE.to_le_bytes());
        assert!(!high());
    }

    #[test]
    fn overlapping_bars_are_refused() {
        let mut function = function(&Arc::default());
        let refused = function.add_bar(BarSpec {
            index: 1,
            kind: BarKind::Memory32,
            size: 4096,
        });
        assert!(matches!(refused, Err(PciError::BadBar { index: 1, .. })));
    }

    #[test]
    fn a_saved_function_decodes_where_it_did() {
        let one = function(&Arc::default());
        one.write_config(0x10, &0xd000_0000_u32.to_le_bytes());
        one.write_config(0x04, &COMMAND_MEMORY.to_le_bytes());
        let two = function(&Arc::default());
        two.restore(one.save()).expect("same device");
        assert_eq!(two.windows(), one.windows());
    }

    #[test]
    fn another_devices_state_is_refused() {
        let other = PciFunction::new(&Identity {
            device: 0x1041,
            ..IDENTITY
        });
        let refused = other.restore(function(&Arc::default()).save());
        assert!(matches!(refused, Err(RestoreError::Mismatch { .. })));
    }
}
