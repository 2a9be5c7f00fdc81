//! The capabilities that tell the driver what lies where (virtio 1.2 §4.1.4).

use ringfence_pci::MsixLayout;
use ringfence_pci::PciError;
use ringfence_pci::PciFunction;

use super::BAR;
use super::COMMON;
use super::DEVICE;
use super::ISR;
use super::MSIX_PBA;
use super::MSIX_TABLE;
use super::NOTIFY;
use super::NOTIFY_MULTIPLIER;
use super::PART;
use super::common::COMMON_BYTES;

/// Vendor-specific capability.
const VENDOR: u8 = 9;

/// `cfg_type` values.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// `struct virtio_pci_cap` after its ID and next pointer, then `extra`.
fn body(cfg_type: u8, offset: u64, len: u64, extra: &[u8]) -> Vec<u8> {
    let cap_len = u8::try_from(16 + extra.len()).unwrap_or(u8::MAX);
    let mut body = vec![cap_len, cfg_type, BAR, 0, 0, 0];
    for word in [offset, len] {
        let word = u32::try_from(word).unwrap_or(u32::MAX);
        body.extend(word.to_le_bytes());
    }
    body.extend(extra);
    body
}

/// Adds all five; returns the offset of the access window's data.
pub(super) fn add(function: &mut PciFunction, queues: usize) -> Result<u16, PciError> {
    let notify_len = queues.max(1) as u64 * u64::from(NOTIFY_MULTIPLIER);
    let fixed = [
        body(COMMON_CFG, COMMON, COMMON_BYTES as u64, &[]),
        body(
            NOTIFY_CFG,
            NOTIFY,
            notify_len,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        ),
        body(ISR_CFG, ISR, 1, &[]),
        body(DEVICE_CFG, DEVICE, PART, &[]),
    ];
    for capability in fixed {
        function.add_capability(VENDOR, &capability, &vec![0; capability.len()])?;
    }
    // §4.1.4.9: the driver writes bar, offset and length, then reads or writes the data.
    let window = body(PCI_CFG, 0, 0, &[0; 4]);
    let mut writable = vec![0; window.len()];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let at = function.add_capability(VENDOR, &window, &writable)?;
    Ok(u16::from(at) + 16)
}

pub(super) fn msix_layout() -> MsixLayout {
    let low = |offset: u64| u32::try_from(offset).unwrap_or(u32::MAX);
    MsixLayout {
        bar: BAR,
        table_offset: low(MSIX_TABLE),
        pba_offset: low(MSIX_PBA),
    }
}
