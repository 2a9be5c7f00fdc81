//! The root complex: who is on the bus, and which windows answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::RwLock;

use ringfence_bus::MmioBus;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioBus;
use ringfence_bus::PioDevice;
use ringfence_bus::Range;
use vm_allocator::AddressAllocator;
use vm_allocator::AllocPolicy;
use vm_allocator::RangeInclusive;

use crate::BarKind;
use crate::BarSpec;
use crate::Identity;
use crate::PciAddress;
use crate::PciDevice;
use crate::PciError;
use crate::PciFunction;
use crate::Space;
use crate::Window;

/// Devices on a bus.
const DEVICES: u8 = 32;
/// BARs are placed on pages of their own, so that an engine may treat a page as one device's.
const PLACEMENT_ALIGN: u64 = 4096;

/// The address ranges that the root complex forwards to its bus (the host bridge's `_CRS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootWindows {
    /// Memory below 4 GiB.
    pub memory32: Range,
    /// Memory above.
    pub memory64: Range,
    /// Ports.
    pub io: Range,
}

impl RootWindows {
    fn holds(&self, window: &Window) -> bool {
        let inside = |range: Range| {
            window.start >= range.start
                && window
                    .start
                    .checked_add(window.len)
                    .zip(range.start.checked_add(range.len))
                    .is_some_and(|(end, range_end)| end <= range_end)
        };
        match window.space {
            Space::Io => inside(self.io),
            Space::Memory => inside(self.memory32) || inside(self.memory64),
        }
    }
}

/// One BAR's place on a bus: routes accesses to the function that owns it.
struct BarWindow {
    device: Arc<dyn PciDevice>,
    bar: u8,
}

impl MmioDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read_bar(self.bar, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(self.bar, offset, data);
    }
}

impl PioDevice for BarWindow {
    fn read(&self, offset: u16, data: &mut [u8]) {
        self.device.read_bar(self.bar, u64::from(offset), data);
    }
    fn write(&self, offset: u16, data: &[u8]) {
        self.device.write_bar(self.bar, u64::from(offset), data);
    }
}

type BarKey = (PciAddress, u8);

struct Placement {
    memory32: AddressAllocator,
    memory64: AddressAllocator,
    io: AddressAllocator,
    /// First addresses, as firmware would give them.
    allocated: BTreeMap<BarKey, (BarKind, RangeInclusive)>,
    /// What answers on the buses now.
    placed: BTreeMap<BarKey, Window>,
}

impl Placement {
    fn new(windows: &RootWindows) -> Result<Self, PciError> {
        let allocator = |range: Range| {
            AddressAllocator::new(range.start, range.len).map_err(|_| PciError::BadWindow {
                start: range.start,
                len: range.len,
            })
        };
        Ok(Self {
            memory32: allocator(windows.memory32)?,
            memory64: allocator(windows.memory64)?,
            io: allocator(windows.io)?,
            allocated: BTreeMap::new(),
            placed: BTreeMap::new(),
        })
    }

    fn allocator(&mut self, kind: BarKind) -> &mut AddressAllocator {
        match kind {
            BarKind::Io => &mut self.io,
            BarKind::Memory32 => &mut self.memory32,
            BarKind::Memory64 { .. } => &mut self.memory64,
        }
    }

    fn allocate(&mut self, address: PciAddress, bar: &BarSpec) -> Result<u64, PciError> {
        let size = match bar.space() {
            Space::Io => bar.size,
            Space::Memory => bar.size.max(PLACEMENT_ALIGN),
        };
        let range = self
            .allocator(bar.kind)
            .allocate(size, size, AllocPolicy::FirstMatch)
            .map_err(|_| PciError::WindowFull { size })?;
        self.allocated
            .insert((address, bar.index), (bar.kind, range));
        Ok(range.start())
    }

    fn free(&mut self, address: PciAddress) {
        let keys = (address, 0)..=(address, u8::MAX);
        let bars: Vec<BarKey> = self.allocated.range(keys).map(|(&key, _)| key).collect();
        for key in bars {
            if let Some((kind, range)) = self.allocated.remove(&key) {
                // Fails only for a range that isn't allocated: these all were.
                let _ = self.allocator(kind).free(&range);
            }
        }
    }
}

/// The root complex.
///
/// Clones of its `Arc` are the configuration ports and the ECAM window.
pub struct PciRoot {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    windows: RootWindows,
    devices: RwLock<BTreeMap<PciAddress, Arc<dyn PciDevice>>>,
    placement: Mutex<Placement>,
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciRoot")
            .field("windows", &self.windows)
            .field("placed", &self.placement().placed)
            .finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A root complex with its host bridge at 00:00.0, that places BARs on the given buses.
    ///
    /// # Errors
    /// [`PciError::BadWindow`] when a window is empty or wraps.
    pub fn new(
        mmio: Arc<MmioBus>,
        pio: Arc<PioBus>,
        windows: RootWindows,
    ) -> Result<Self, PciError> {
        let bridge: Arc<dyn PciDevice> = Arc::new(HostBridge::new());
        Ok(Self {
            mmio,
            pio,
            windows,
            devices: RwLock::new(BTreeMap::from([(PciAddress::new(0, 0), bridge)])),
            placement: Mutex::new(Placement::new(&windows)?),
        })
    }

    /// The windows, for the firmware's tables.
    #[must_use]
    pub fn windows(&self) -> &RootWindows {
        &self.windows
    }

    fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self, address: PciAddress) -> Option<Arc<dyn PciDevice>> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        devices.get(&address).cloned()
    }

    /// The first free device number.
    ///
    /// # Errors
    /// [`PciError::BusFull`].
    pub fn free_address(&self) -> Result<PciAddress, PciError> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        (1..DEVICES)
            .map(|device| PciAddress::new(device, 0))
            .find(|address| !devices.contains_key(address))
            .ok_or(PciError::BusFull)
    }

    /// Puts `device` on the bus and gives its BARs addresses, as firmware would. At run time the
    /// guest finds it when it looks again.
    ///
    /// # Errors
    /// [`PciError`] when the address is taken or the windows are full; nothing is changed then.
    pub fn insert(&self, address: PciAddress, device: &Arc<dyn PciDevice>) -> Result<(), PciError> {
        let mut placement = self.placement();
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if devices.contains_key(&address) {
            return Err(PciError::SlotTaken(address));
        }
        for bar in device.bars() {
            let allocated = bar.check().and_then(|()| placement.allocate(address, &bar));
            match allocated {
                Ok(start) => program_bar(&**device, &bar, start),
                Err(error) => {
                    placement.free(address);
                    return Err(error);
                }
            }
        }
        devices.insert(address, Arc::clone(device));
        drop(devices);
        self.place(&mut placement, address, device);
        Ok(())
    }

    /// Takes the device at `address` away, with its windows.
    ///
    /// # Errors
    /// [`PciError::Empty`] when there is none; the host bridge can't be taken away either.
    pub fn remove(&self, address: PciAddress) -> Result<Arc<dyn PciDevice>, PciError> {
        let mut placement = self.placement();
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let bridge = PciAddress::new(0, 0);
        let device = (address != bridge)
            .then(|| devices.remove(&address))
            .flatten()
            .ok_or(PciError::Empty(address))?;
        drop(devices);
        self.displace(&mut placement, address, &device, &[]);
        placement.free(address);
        Ok(device)
    }

    /// Who is on the bus: address, vendor and device ID.
    #[must_use]
    pub fn list(&self) -> Vec<(PciAddress, u16, u16)> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        devices
            .iter()
            .map(|(&address, device)| {
                let mut id = [0; 4];
                device.read_config(0, &mut id);
                let half = |at: usize| u16::from_le_bytes([id[at], id[at + 1]]);
                (address, half(0), half(2))
            })
            .collect()
    }

    /// Resets every device, as the bus's reset wire does.
    pub fn reset(&self) {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<_> = devices.iter().map(|(&a, d)| (a, Arc::clone(d))).collect();
        drop(devices);
        for (address, device) in all {
            device.reset();
            self.refresh(address);
        }
    }

    /// Looks again at what the device at `address` decodes: after its configuration was restored.
    pub fn refresh(&self, address: PciAddress) {
        if let Some(device) = self.device(address) {
            self.place(&mut self.placement(), address, &device);
        }
    }

    /// A configuration read; where nothing is, ones (PCI 3.0 §6.1).
    pub fn read_config(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(device) = self.device(address) {
            device.read_config(offset, data);
        }
    }

    /// A configuration write, after which the device's windows are where it says.
    pub fn write_config(&self, address: PciAddress, offset: u16, data: &[u8]) {
        if let Some(device) = self.device(address) {
            device.write_config(offset, data);
            self.place(&mut self.placement(), address, &device);
        }
    }

    fn place(&self, placement: &mut Placement, address: PciAddress, device: &Arc<dyn PciDevice>) {
        let wanted = device.windows();
        self.displace(placement, address, device, &wanted);
        for window in wanted {
            let key = (address, window.bar);
            if placement.placed.contains_key(&key) || !self.windows.holds(&window) {
                continue;
            }
            if self.insert_window(device, &window) {
                placement.placed.insert(key, window);
                device.bar_placed(window.bar, Some(window.start));
            }
        }
    }

    /// Takes away what `device` had placed and no longer wants.
    fn displace(
        &self,
        placement: &mut Placement,
        address: PciAddress,
        device: &Arc<dyn PciDevice>,
        wanted: &[Window],
    ) {
        let keys = (address, 0)..=(address, u8::MAX);
        let gone: Vec<(BarKey, Window)> = placement
            .placed
            .range(keys)
            .filter(|(_, window)| !wanted.contains(window))
            .map(|(&key, &window)| (key, window))
            .collect();
        for (key, window) in gone {
            placement.placed.remove(&key);
            match window.space {
                Space::Io => drop(self.pio.remove(window.start)),
                Space::Memory => drop(self.mmio.remove(window.start)),
            }
            device.bar_placed(window.bar, None);
        }
    }

    /// `false` where another device is: the window doesn't decode then.
    fn insert_window(&self, device: &Arc<dyn PciDevice>, window: &Window) -> bool {
        let range = Range {
            start: window.start,
            len: window.len,
        };
        let route = Arc::new(BarWindow {
            device: Arc::clone(device),
            bar: window.bar,
        });
        let inserted = match window.space {
            Space::Io => self.pio.insert(range, route),
            Space::Memory => self.mmio.insert(range, route),
        };
        inserted.is_ok()
    }
}

fn program_bar(device: &dyn PciDevice, bar: &BarSpec, start: u64) {
    let bytes = start.to_le_bytes();
    let register = 0x10 + 4 * u16::from(bar.index);
    device.write_config(register, &bytes[..4]);
    if bar.is_64_bit() {
        device.write_config(register + 4, &bytes[4..]);
    }
}

/// The host bridge: a header that says so.
struct HostBridge(PciFunction);

impl HostBridge {
    fn new() -> Self {
        // The generic host bridge that guests know without a driver of its own.
        Self(PciFunction::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) {
        self.0.write_config(offset, data);
    }
    fn bars(&self) -> Vec<BarSpec> {
        Vec::new()
    }
    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }
    fn read_bar(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
    fn reset(&self) {
        self.0.reset();
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
