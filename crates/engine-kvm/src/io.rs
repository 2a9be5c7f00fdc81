//! Serving the accesses that leave the guest: by the buses, or by the caller.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringfence_engine::EngineError;
use ringfence_engine::IoAccess;
use ringfence_engine::IoDirection;
use ringfence_engine::IoSpace;
use ringfence_engine::Unclaimed;

use crate::run_page::Access;
use crate::run_page::RunPage;
use crate::vm::Shared;

/// An exit's access under way: elements before `next` are done.
#[derive(Debug)]
pub(crate) struct PendingAccess {
    access: Access,
    next: usize,
    /// The caller owes the data of element `next`.
    pub(crate) waits: bool,
}

impl PendingAccess {
    pub(crate) fn new(access: Access) -> Self {
        Self {
            access,
            next: 0,
            waits: false,
        }
    }

    /// Whether every element was moved.
    pub(crate) fn is_done(&self) -> bool {
        self.next == self.access.count
    }

    /// Moves elements until all are done (`None`) or one is the caller's business.
    pub(crate) fn serve(&mut self, page: &mut RunPage, shared: &Arc<Shared>) -> Option<IoAccess> {
        while !self.is_done() {
            let data = page.element(&self.access, self.next);
            if !claimed(&self.access, data, shared) && shared.unclaimed == Unclaimed::Exit {
                let direction = if self.access.write {
                    self.next += 1;
                    IoDirection::Write(data.to_vec())
                } else {
                    self.waits = true;
                    IoDirection::Read(data.len())
                };
                return Some(IoAccess {
                    space: self.access.space,
                    address: self.access.address,
                    direction,
                });
            }
            self.next += 1;
        }
        None
    }

    /// Takes the caller's data for the element that waits.
    pub(crate) fn complete(&mut self, page: &mut RunPage, data: &[u8]) -> Result<(), EngineError> {
        let element = page.element(&self.access, self.next);
        if element.len() != data.len() {
            return Err(EngineError::State(
                "the completed read has another length than the guest's access",
            ));
        }
        element.copy_from_slice(data);
        self.waits = false;
        self.next += 1;
        Ok(())
    }
}

/// Offers one element to the buses; unclaimed reads float (all ones).
fn claimed(access: &Access, data: &mut [u8], shared: &Shared) -> bool {
    match access.space {
        IoSpace::Pio => {
            shared.counts.pio.fetch_add(1, Ordering::Relaxed);
            let found = shared.pio.find(access.address, data.len());
            // A port's offset in its device fits 16 bits because every port does.
            let Some((device, offset)) =
                found.and_then(|(device, offset)| Some((device, u16::try_from(offset).ok()?)))
            else {
                return float(access, data);
            };
            if access.write {
                device.write(offset, data);
            } else {
                data.fill(0xff);
                device.read(offset, data);
            }
        }
        IoSpace::Mmio => {
            shared.counts.mmio.fetch_add(1, Ordering::Relaxed);
            let Some((device, offset)) = shared.mmio.find(access.address, data.len()) else {
                return float(access, data);
            };
            if access.write {
                device.write(offset, data);
            } else {
                data.fill(0xff);
                device.read(offset, data);
            }
        }
    }
    true
}

fn float(access: &Access, data: &mut [u8]) -> bool {
    if !access.write {
        data.fill(0xff);
    }
    false
}
