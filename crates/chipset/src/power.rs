//! What a guest does to its machine as a whole.

use std::sync::Arc;

/// The guest turned the machine off or over, or says that it is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Soft off (ACPI S5).
    PowerOff,
    /// A reset, by whichever register.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest's kernel panicked and goes on in a crash kernel of its own.
    CrashKernel,
}

/// Who is told. Called from the vCPU's thread, in the middle of its access: it must not wait for a
/// vCPU.
pub type PowerEvents = Arc<dyn Fn(PowerEvent) + Send + Sync>;

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers events.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder(Mutex<Vec<PowerEvent>>);

    impl Recorder {
        pub(crate) fn sink(self: &Arc<Self>) -> PowerEvents {
            let recorder = Arc::clone(self);
            Arc::new(move |event| recorder.0.lock().expect("test").push(event))
        }

        pub(crate) fn taken(&self) -> Vec<PowerEvent> {
            std::mem::take(&mut self.0.lock().expect("test"))
        }
    }
}
