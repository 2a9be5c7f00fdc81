//! Writers to guest memory whom its trackers don't hear: the host's kernel on its own.

use vm_memory::GuestMemoryBackend;

use crate::GuestMemory;
use crate::Unheard;

/// The right to write to guest memory unheard, held for as long as it lasts.
///
/// As long as there is one, there is no dirty log; where there is a log, or a watcher (an engine
/// that has derived something from the memory's content), there can be none.
#[derive(Debug)]
pub struct UnheardWriter(GuestMemory);

impl UnheardWriter {
    /// Asks for it.
    ///
    /// # Errors
    /// [`Unheard`] when somebody must hear of every write.
    pub fn admit(memory: &GuestMemory) -> Result<Self, Unheard> {
        for (admitted, region) in memory.iter().enumerate() {
            if !(**region).bitmap().admit_unheard() {
                for region in memory.iter().take(admitted) {
                    (**region).bitmap().dismiss_unheard();
                }
                return Err(Unheard);
            }
        }
        Ok(Self(memory.clone()))
    }
}

impl Drop for UnheardWriter {
    fn drop(&mut self) {
        for region in self.0.iter() {
            (**region).bitmap().dismiss_unheard();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::GuestAddress;
    use crate::GuestRam;
    use crate::HugePages;
    use crate::MMIO_HOLE_START;
    use crate::WriteWatcher;

    struct Nobody;

    impl WriteWatcher for Nobody {
        fn page_written(&self, _: GuestAddress) {}
    }

    #[test]
    fn a_log_and_an_unheard_writer_exclude_each_other() {
        // Two runs: below and above the hole.
        let ram = GuestRam::new(MMIO_HOLE_START + (1 << 20), HugePages::Off).expect("ram");
        let first = UnheardWriter::admit(ram.memory()).expect("no log");
        let second = UnheardWriter::admit(ram.memory()).expect("no log");
        drop(first);
        assert_eq!(ram.set_logging(true), Err(Unheard));
        drop(second);
        ram.set_logging(true).expect("nobody is left");
        UnheardWriter::admit(ram.memory()).expect_err("heard");
        ram.set_logging(false).expect("off");
        UnheardWriter::admit(ram.memory()).expect("no log");
    }

    #[test]
    fn nobody_writes_unheard_where_every_write_is_watched_for() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        ram.set_watcher(&(Arc::new(Nobody) as Arc<dyn WriteWatcher>));
        UnheardWriter::admit(ram.memory()).expect_err("heard");
    }
}
