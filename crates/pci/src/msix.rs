//! MSI-X: the vector table, the pending bits and the masks (PCI 3.0 §6.8.2).

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::InterruptController;
use ringfence_bus::MsiMessage;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

/// Capability ID.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Bytes in a table entry.
pub const MSIX_ENTRY_BYTES: u64 = 16;
/// The vector that names none (virtio 1.2 §4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// Most vectors a function can have.
const MAX_VECTORS: u16 = 2048;
/// Version of [`MsixState`].
const STATE_VERSION: u32 = 1;

/// Message control bits (§6.8.2.3).
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Vector control bit (§6.8.2.9).
const ENTRY_MASKED: u32 = 1;

/// Where a function keeps its table and pending bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// The BAR that holds both.
    pub bar: u8,
    /// Offset of the table, a multiple of 8.
    pub table_offset: u32,
    /// Offset of the pending bits, a multiple of 8.
    pub pba_offset: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address_low: u32,
    address_high: u32,
    data: u32,
    control: u32,
}

impl Entry {
    const RESET: Self = Self {
        address_low: 0,
        address_high: 0,
        data: 0,
        control: ENTRY_MASKED,
    };

    fn message(self) -> MsiMessage {
        MsiMessage {
            address: u64::from(self.address_low) | u64::from(self.address_high) << 32,
            data: self.data,
        }
    }

    fn is_masked(self) -> bool {
        self.control & ENTRY_MASKED != 0
    }

    fn word(&mut self, index: u64) -> &mut u32 {
        match index {
            0 => &mut self.address_low,
            1 => &mut self.address_high,
            2 => &mut self.data,
            _ => &mut self.control,
        }
    }
}

/// The saved table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    version: u32,
    control: u16,
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

#[derive(Debug)]
struct Table {
    control: u16,
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// A function's message-signalled interrupts.
///
/// Shared by the function's registers (vCPU threads) and whoever signals (device workers).
pub struct Msix {
    controller: Arc<dyn InterruptController>,
    table: Mutex<Table>,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Msix").field(&*self.table()).finish()
    }
}

impl Msix {
    /// `vectors` masked vectors, at least one and at most 2048.
    #[must_use]
    pub fn new(controller: Arc<dyn InterruptController>, vectors: u16) -> Self {
        let vectors = usize::from(vectors.clamp(1, MAX_VECTORS));
        Self {
            controller,
            table: Mutex::new(Table {
                control: 0,
                entries: vec![Entry::RESET; vectors],
                pending: vec![false; vectors],
            }),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.table().entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// Bytes that the table takes.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.vectors()) * MSIX_ENTRY_BYTES
    }

    /// Bytes that the pending bits take: whole quad words (§6.8.2.10).
    #[must_use]
    pub fn pba_bytes(&self) -> u64 {
        u64::from(self.vectors()).div_ceil(64) * 8
    }

    /// Whether the guest switched MSI-X on; the INTA wire is silent then.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.table().control & CONTROL_ENABLE != 0
    }

    /// Sends `vector`'s message, or keeps it pending while masked. `false` when MSI-X is off.
    pub fn signal(&self, vector: u16) -> bool {
        let mut table = self.table();
        if table.control & CONTROL_ENABLE == 0 {
            return false;
        }
        let index = usize::from(vector);
        let masked = table.control & CONTROL_FUNCTION_MASK != 0;
        if let Some(entry) = table.entries.get(index).copied() {
            if masked || entry.is_masked() {
                table.pending[index] = true;
            } else {
                // Under the lock: once a mask write returns, no message may follow it.
                self.controller.send_msi(entry.message());
            }
        }
        true
    }

    /// What `vector` sends now; `None` while it is masked or MSI-X is off. For back ends outside
    /// the process that are given the message itself.
    #[must_use]
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let table = self.table();
        if table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) != CONTROL_ENABLE {
            return None;
        }
        let entry = table.entries.get(usize::from(vector))?;
        (!entry.is_masked()).then(|| entry.message())
    }

    /// The guest wrote message control.
    pub(crate) fn set_control(&self, control: u16) {
        let mut table = self.table();
        table.control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        for index in 0..table.entries.len() {
            self.send_if_unmasked(&mut table, index);
        }
    }

    fn send_if_unmasked(&self, table: &mut Table, index: usize) {
        let open = table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let entry = table.entries[index];
        if open && table.pending[index] && !entry.is_masked() {
            table.pending[index] = false;
            self.controller.send_msi(entry.message());
        }
    }

    /// Reads the table. Aligned accesses of 4 or 8 bytes (§6.8.2); others read as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_table_access(offset, data.len()) {
            return;
        }
        let mut table = self.table();
        for (word, chunk) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
            let index = usize::try_from(word / 4).unwrap_or(usize::MAX);
            if let Some(entry) = table.entries.get_mut(index) {
                chunk.copy_from_slice(&entry.word(word % 4).to_le_bytes());
            }
        }
    }

    /// Writes the table; unmasking sends what is pending.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_table_access(offset, data.len()) {
            return;
        }
        let mut table = self.table();
        for (word, chunk) in (offset / 4..).zip(data.chunks_exact(4)) {
            let index = usize::try_from(word / 4).unwrap_or(usize::MAX);
            let Some(entry) = table.entries.get_mut(index) else {
                return;
            };
            let mut value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            match word % 4 {
                0 => value &= !0b11,
                3 => value &= ENTRY_MASKED,
                _ => {}
            }
            *entry.word(word % 4) = value;
            if word % 4 == 3 {
                self.send_if_unmasked(&mut table, index);
            }
        }
    }

    /// Reads the pending bits; the guest can't write them.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        let table = self.table();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64).saturating_mul(8);
            let first = usize::try_from(at).unwrap_or(usize::MAX);
            let bits = table.pending.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, &on)| byte | u8::from(on) << bit);
        }
    }

    /// Masks everything and forgets what is pending.
    pub fn reset(&self) {
        let mut table = self.table();
        table.control = 0;
        table.entries.fill(Entry::RESET);
        table.pending.fill(false);
    }

    /// Takes the state.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let table = self.table();
        MsixState {
            version: STATE_VERSION,
            control: table.control,
            entries: table.entries.clone(),
            pending: table.pending.clone(),
        }
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// [`RestoreError`] for another version or number of vectors.
    pub fn restore(&self, state: MsixState) -> Result<(), RestoreError> {
        const WHAT: &str = "MSI-X";
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        let mut table = self.table();
        let vectors = table.entries.len();
        if state.entries.len() != vectors || state.pending.len() != vectors {
            return Err(RestoreError::Mismatch {
                what: WHAT,
                why: format!("{} vectors instead of {vectors}", state.entries.len()),
            });
        }
        table.control = state.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        table.entries = state.entries;
        table.pending = state.pending;
        Ok(())
    }
}

fn is_table_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
mod tests {
    use ringfence_bus::Gsi;

    use super::*;

    #[derive(Default)]
    struct Sent(Mutex<Vec<u32>>);

    impl InterruptController for Sent {
        fn set_line(&self, _: Gsi, _: bool) {}
        fn send_msi(&self, message: MsiMessage) {
            self.0.lock().expect("test").push(message.data);
        }
    }

    fn msix(vectors: u16) -> (Arc<Sent>, Msix) {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(sent.clone(), vectors);
        (sent, msix)
    }

    fn program(msix: &Msix, vector: u64, data: u32) {
        msix.write_table(vector * 16, &0xfee0_0000_u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &0_u32.to_le_bytes());
    }

    #[test]
    fn an_enabled_unmasked_vector_sends_its_message() {
        let (sent, msix) = msix(2);
        program(&msix, 1, 0x31);
        assert!(!msix.signal(1), "off: the caller uses the wire");
        msix.set_control(CONTROL_ENABLE);
        assert!(msix.signal(1));
        assert_eq!(*sent.0.lock().expect("test"), [0x31]);
    }

    // PCI 3.0 §6.8.3.4: a message masked when it occurs is pending and sent on unmasking.
    #[test]
    fn masked_messages_wait_in_the_pending_bits() {
        let (sent, msix) = msix(3);
        program(&msix, 2, 0x32);
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.signal(2);
        msix.signal(2);
        let mut pba = [0; 8];
        msix.read_pba(0, &mut pba);
        assert_eq!(pba[0], 0b100);
        assert!(sent.0.lock().expect("test").is_empty());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(*sent.0.lock().expect("test"), [0x32]);
        msix.read_pba(0, &mut pba);
        assert_eq!(pba, [0; 8]);
    }

    #[test]
    fn unmasking_one_vector_sends_only_its_own() {
        let (sent, msix) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        msix.signal(0);
        msix.signal(1);
        program(&msix, 1, 0x41);
        assert_eq!(*sent.0.lock().expect("test"), [0x41]);
    }

    #[test]
    fn wild_accesses_and_vectors_do_nothing() {
        let (sent, msix) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(u64::MAX - 7, &[0xff; 8]);
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(16, &[0xff; 4]);
        msix.signal(NO_VECTOR);
        let mut data = [1; 8];
        msix.read_table(1 << 40, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_pba(u64::MAX, &mut data[..1]);
        assert!(sent.0.lock().expect("test").is_empty());
    }

    #[test]
    fn a_saved_table_is_restored_whole() {
        let (_, msix_a) = msix(2);
        program(&msix_a, 0, 0x51);
        msix_a.set_control(CONTROL_ENABLE);
        msix_a.signal(1);
        let (sent, msix_b) = msix(2);
        msix_b.restore(msix_a.save()).expect("same shape");
        msix_b.signal(0);
        program(&msix_b, 1, 0x52);
        assert_eq!(*sent.0.lock().expect("test"), [0x51, 0x52]);
        let (_, other) = msix(3);
        let refused = other.restore(msix_a.save());
        assert!(matches!(refused, Err(RestoreError::Mismatch { .. })));
    }
}
