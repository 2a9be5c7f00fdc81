//! The dirty log (§4.8): KVM keeps one bitmap a memory slot and empties all of it at each read,
//! while callers ask for runs of pages, so what wasn't asked for is kept here.

use kvm_ioctls::VmFd;
use ringfence_engine::EngineError;
use ringfence_memory::PAGE_SIZE;
use ringfence_memory::RamRange;

const WORD_BITS: u64 = u64::BITS as u64;

/// One memory slot and the dirty pages not yet handed out.
#[derive(Debug)]
struct SlotLog {
    slot: u32,
    range: RamRange,
    dirty: Vec<u64>,
}

/// The log of a machine's RAM.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    slots: Vec<SlotLog>,
}

impl DirtyLog {
    /// An empty log of `ranges`, which are slots 0, 1 and so on.
    pub(crate) fn new(ranges: &[RamRange]) -> Self {
        let slots = (0..).zip(ranges).map(|(slot, &range)| SlotLog {
            slot,
            range,
            dirty: Vec::new(),
        });
        Self {
            slots: slots.collect(),
        }
    }

    /// See [`ringfence_engine::Vm::take_dirty`].
    pub(crate) fn take(
        &mut self,
        vm: &VmFd,
        start: u64,
        pages: usize,
    ) -> Result<Vec<u64>, EngineError> {
        if !start.is_multiple_of(PAGE_SIZE) {
            return Err(EngineError::Config(format!(
                "a run of pages starts at a multiple of {PAGE_SIZE}, not at {start:#x}"
            )));
        }
        let mut result = vec![0; pages.div_ceil(64)];
        for slot in &mut self.slots {
            slot.fetch(vm)?;
            for index in 0..pages {
                let address = (index as u64)
                    .checked_mul(PAGE_SIZE)
                    .and_then(|offset| offset.checked_add(start));
                if address.is_some_and(|address| slot.take_page(address)) {
                    result[index / 64] |= 1 << (index % 64);
                }
            }
        }
        Ok(result)
    }
}

impl SlotLog {
    fn fetch(&mut self, vm: &VmFd) -> Result<(), EngineError> {
        let len_bytes = usize::try_from(self.range.len_bytes)
            .map_err(|_| EngineError::Internal("RAM larger than the address space".into()))?;
        let fresh = vm
            .get_dirty_log(self.slot, len_bytes)
            .map_err(|errno| EngineError::host("read KVM's dirty log")(errno.into()))?;
        self.dirty.resize(self.dirty.len().max(fresh.len()), 0);
        for (kept, fresh) in self.dirty.iter_mut().zip(fresh) {
            *kept |= fresh;
        }
        Ok(())
    }

    fn take_page(&mut self, address: u64) -> bool {
        let Some(offset) = address.checked_sub(self.range.start.0) else {
            return false;
        };
        let page = offset / PAGE_SIZE;
        let Ok(word) = usize::try_from(page / WORD_BITS) else {
            return false;
        };
        let Some(word) = self.dirty.get_mut(word) else {
            return false;
        };
        let bit = 1 << (page % WORD_BITS);
        let was_dirty = *word & bit != 0;
        *word &= !bit;
        was_dirty
    }
}
