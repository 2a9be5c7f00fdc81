//! Interrupt messages: what is sent, to whom.
//!
//! Spec: SDM 3A §11.6.1 (ICR), §11.6.2 (destinations), §11.11 (message-signalled interrupts),
//! §11.12.9 (x2APIC's ICR), §11.12.10 (x2APIC logical IDs).

use ringfence_bus::MsiMessage;

/// First address of the window that messages are written to.
const MSI_WINDOW: u64 = 0xfee0_0000;
const MSI_WINDOW_MASK: u64 = !0xf_ffff;

/// The 8-bit destination that reaches every local APIC.
const BROADCAST_8: u32 = 0xff;
/// The 32-bit one.
const BROADCAST_32: u32 = u32::MAX;

/// What is done to the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The vector is delivered to all destinations.
    Fixed,
    /// The vector is delivered to the destination of lowest priority.
    LowestPriority,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up at the vector's page.
    StartUp,
}

impl Delivery {
    /// The three bits of ICR, LVT, redirection entries and message data. SMI and reserved codes
    /// have no effect here: this machine has no system management mode. ExtINT isn't sent as a
    /// message either: the PIC reaches the processor by its own wire.
    pub(super) fn decode(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            _ => None,
        }
    }
}

/// Who is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// Everybody.
    All,
    /// Everybody but the sender.
    AllButSelf,
    /// The sender.
    Itself,
    /// One APIC ID.
    Physical(u32),
    /// A logical ID, matched by each local APIC in its own mode.
    Logical(u32),
}

impl Destination {
    fn decode(id: u32, logical: bool, broadcast: u32) -> Self {
        match logical {
            // An x2APIC's all-ones logical ID is everybody; 8 bits of ones are matched by mask.
            true if id == BROADCAST_32 => Self::All,
            true => Self::Logical(id),
            false if id == broadcast => Self::All,
            false => Self::Physical(id),
        }
    }
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) destination: Destination,
    pub(super) delivery: Delivery,
    pub(super) vector: u8,
    /// Level-triggered: its end of interrupt is told to the I/O APIC.
    pub(super) level: bool,
}

fn bit(value: u64, index: u32) -> bool {
    value >> index & 1 != 0
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

fn field(value: u64, shift: u32, mask: u32) -> u32 {
    let [a, b, c, d, ..] = (value >> shift).to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) & mask
}

impl Message {
    /// What an ICR write sends; `None` for what has no effect. The destination is the upper half:
    /// bits 56 to 63 in an xAPIC, 32 to 63 in an x2APIC.
    pub(super) fn from_icr(icr: u64, x2apic: bool) -> Option<Self> {
        let delivery = Delivery::decode(field(icr, 8, 7))?;
        let level_triggered = bit(icr, 15);
        let assert = bit(icr, 14);
        // INIT level de-assert: supported by no processor since the Pentium (§11.6.1).
        if delivery == Delivery::Init && level_triggered && !assert {
            return None;
        }
        let (id, broadcast) = if x2apic {
            (field(icr, 32, u32::MAX), BROADCAST_32)
        } else {
            (field(icr, 56, 0xff), BROADCAST_8)
        };
        let destination = match field(icr, 18, 3) {
            0 => Destination::decode(id, bit(icr, 11), broadcast),
            1 => Destination::Itself,
            2 => Destination::All,
            _ => Destination::AllButSelf,
        };
        Some(Self {
            destination,
            delivery,
            vector: low_byte(icr),
            // Processors treat fixed interrupts by ICR as edges.
            level: false,
        })
    }

    /// What a write of `message` to the MSI window sends.
    pub(super) fn from_msi(message: MsiMessage) -> Option<Self> {
        if message.address & MSI_WINDOW_MASK != MSI_WINDOW {
            return None;
        }
        let data = u64::from(message.data);
        Some(Self {
            destination: Destination::decode(
                field(message.address, 12, 0xff),
                bit(message.address, 2),
                BROADCAST_8,
            ),
            delivery: Delivery::decode(field(data, 8, 7))?,
            vector: low_byte(data),
            level: bit(data, 15),
        })
    }

    /// What a redirection entry of the I/O APIC sends (82093AA datasheet §3.2.4).
    pub(super) fn from_redirection(entry: u64) -> Option<Self> {
        Some(Self {
            destination: Destination::decode(field(entry, 56, 0xff), bit(entry, 11), BROADCAST_8),
            delivery: Delivery::decode(field(entry, 8, 7))?,
            vector: low_byte(entry),
            level: bit(entry, 15),
        })
    }
}

/// A local APIC's logical identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogicalId {
    pub(super) x2apic: bool,
    pub(super) ldr: u32,
    pub(super) dfr: u32,
}

impl LogicalId {
    /// Whether `destination` names it.
    pub(super) fn matches(self, destination: u32) -> bool {
        if self.x2apic {
            return self.ldr >> 16 == destination >> 16 && self.ldr & destination & 0xffff != 0;
        }
        if destination > 0xff {
            return false;
        }
        let id = self.ldr >> 24;
        match self.dfr >> 28 {
            // Flat: one bit a processor.
            0xf => id & destination != 0,
            // Cluster: four bits name the cluster (all ones: each), four its members.
            _ => {
                let cluster = destination >> 4;
                (cluster == id >> 4 || cluster == 0xf) && id & destination & 0xf != 0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xapic(ldr: u32, dfr: u32) -> LogicalId {
        LogicalId {
            x2apic: false,
            ldr: ldr << 24,
            dfr: dfr << 28 | 0x0fff_ffff,
        }
    }

    // SDM 3A §11.6.2.2, flat model.
    #[test]
    fn flat_logical_ids_match_by_any_common_bit() {
        assert!(xapic(0b0100, 0xf).matches(0b0110));
        assert!(!xapic(0b0100, 0xf).matches(0b1001));
        assert!(xapic(0b0100, 0xf).matches(0xff));
        assert!(!xapic(0, 0xf).matches(0xff));
    }

    // SDM 3A §11.6.2.2, hierarchical cluster model.
    #[test]
    fn cluster_logical_ids_match_in_their_cluster() {
        let id = xapic(0x24, 0);
        assert!(id.matches(0x24));
        assert!(id.matches(0x2f));
        assert!(id.matches(0xf4));
        assert!(!id.matches(0x34));
        assert!(!id.matches(0x21));
    }

    // SDM 3A §11.12.10.
    #[test]
    fn x2apic_logical_ids_are_a_cluster_of_sixteen() {
        let id = LogicalId {
            x2apic: true,
            ldr: 0x0001_0004,
            dfr: 0,
        };
        assert!(id.matches(0x0001_0006));
        assert!(!id.matches(0x0001_0002));
        assert!(!id.matches(0x0002_0004));
        assert!(!id.matches(0x0000_0004));
    }

    #[test]
    fn icr_shorthands_and_widths_are_decoded() {
        let of = |icr, x2apic| Message::from_icr(icr, x2apic).expect("sends").destination;
        assert_eq!(of(0x0004_0031, false), Destination::Itself);
        assert_eq!(of(0x0008_0031, false), Destination::All);
        assert_eq!(of(0x000c_0031, false), Destination::AllButSelf);
        assert_eq!(of(3 << 56 | 0x31, false), Destination::Physical(3));
        assert_eq!(of(0xff << 56 | 0x31, false), Destination::All);
        assert_eq!(of(0xff << 32 | 0x31, true), Destination::Physical(0xff));
        assert_eq!(of(0xffff_ffff << 32 | 0x31, true), Destination::All);
        assert_eq!(of(2 << 56 | 1 << 11 | 0x31, false), Destination::Logical(2));
    }

    #[test]
    fn an_init_de_assert_and_reserved_modes_send_nothing() {
        assert_eq!(Message::from_icr(0x0000_8500, false), None);
        assert!(Message::from_icr(0x0000_c500, false).is_some());
        assert_eq!(Message::from_icr(0x0000_0231, false), None);
        assert_eq!(Message::from_icr(0x0000_0331, false), None);
    }

    #[test]
    fn messages_outside_the_window_are_not_interrupts() {
        let at = |address| {
            Message::from_msi(MsiMessage {
                address,
                data: 0x4041,
            })
        };
        assert_eq!(at(0xfec0_0000), None);
        assert_eq!(at(0x1_fee0_0000), None);
        assert_eq!(
            at(0xfee0_2004),
            Some(Message {
                destination: Destination::Logical(2),
                delivery: Delivery::Fixed,
                vector: 0x41,
                level: false,
            })
        );
    }
}
