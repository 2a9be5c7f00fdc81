//! Saved state of the chips that don't belong to one vCPU. The local APICs' is in their vCPUs'.

use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use super::IoApicState;
use super::Irqchip;
use super::PicState;
use super::ioapic::IOAPIC_STATE_VERSION;
use super::ioapic::IoApic;
use super::pic::PIC_STATE_VERSION;
use super::pic::PicPair;

/// Version of [`IrqchipState`].
const STATE_VERSION: u32 = 1;

/// The I/O APIC's and the PICs' saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    version: u32,
    ioapic: IoApicState,
    pic: PicState,
}

impl Persist for Irqchip {
    type State = IrqchipState;

    const NAME: &'static str = "interrupt chips";

    fn save(&self) -> IrqchipState {
        IrqchipState {
            version: STATE_VERSION,
            ioapic: self.ioapic().save(),
            pic: self.with_pic(|pic| pic.save()),
        }
    }

    fn restore(&self, state: IrqchipState) -> Result<(), RestoreError> {
        for (what, found, known) in [
            (Self::NAME, state.version, STATE_VERSION),
            ("I/O APIC", state.ioapic.version, IOAPIC_STATE_VERSION),
            ("PIC", state.pic.version, PIC_STATE_VERSION),
        ] {
            if found != known {
                return Err(RestoreError::Version { what, found, known });
            }
        }
        let ioapic = IoApic::from_state(state.ioapic).ok_or_else(|| RestoreError::Mismatch {
            what: "I/O APIC",
            why: "it has another number of inputs".to_owned(),
        })?;
        *self.ioapic() = ioapic;
        self.with_pic(|pic| *pic = PicPair::from_state(state.pic));
        Ok(())
    }
}
