//! The 16550A serial port: vm-superio's model, wired to this machine.
//!
//! Its interrupt is a pulse, as ISA's edge-triggered inputs want it.

mod output;

use std::convert::Infallible;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use ringfence_bus::IrqLine;
use ringfence_bus::PioDevice;
use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;
use vm_superio::Serial;
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vm_superio::serial::SerialState;

pub use output::{OutputLimits, SerialOutput};

/// First port of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of ports.
pub const SERIAL_PORTS: u64 = 8;

/// Version of [`SerialPortState`].
const STATE_VERSION: u32 = 1;

/// The saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    version: u32,
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

struct Wire(IrqLine);

impl Trigger for Wire {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// Where the port sends to. Without an output, bytes are lost.
struct Line(Option<Arc<SerialOutput>>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(output) = &self.0 {
            output.push(bytes);
        }
        Ok(bytes.len())
    }

    // The model flushes after every byte; the output knows better when.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Notes that the guest has read all input: whoever is told may want the model's lock.
#[derive(Clone, Default)]
struct Drained(Arc<AtomicBool>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

type Model = Serial<Wire, Drained, Line>;
type Callback = Box<dyn Fn() + Send + Sync>;

/// The port. Placed at [`SERIAL_PORT`].
pub struct SerialPort {
    model: Mutex<Model>,
    irq: IrqLine,
    output: Option<Arc<SerialOutput>>,
    drained: Drained,
    on_drained: OnceLock<Callback>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that interrupts by `irq` and sends to `output`.
    #[must_use]
    pub fn new(irq: IrqLine, output: Option<Arc<SerialOutput>>) -> Self {
        let drained = Drained::default();
        let (wire, line) = (Wire(irq.clone()), Line(output.clone()));
        Self {
            model: Mutex::new(Serial::with_events(wire, drained.clone(), line)),
            irq,
            output,
            drained,
            on_drained: OnceLock::new(),
        }
    }

    /// Names who is told, by the vCPU that read it, that the guest has read all its input. Only
    /// the first call has an effect.
    pub fn on_drained(&self, callback: Callback) {
        // One source of input a port.
        let _ = self.on_drained.set(callback);
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that [`Self::receive`] takes now.
    #[must_use]
    pub fn receive_capacity(&self) -> usize {
        self.model().fifo_capacity()
    }

    /// Receives input; how much of it fitted.
    pub fn receive(&self, input: &[u8]) -> usize {
        // The one other error is a full buffer, and the wire can't fail.
        self.model().enqueue_raw_bytes(input).unwrap_or(0)
    }
}

impl PioDevice for SerialPort {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.model().read(offset);
        }
        if self.drained.0.swap(false, Ordering::Relaxed)
            && let Some(callback) = self.on_drained.get()
        {
            callback();
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The output takes everything and the wire can't fail: no error is left.
            let _ = self.model().write(offset, byte);
        }
    }
}

impl Persist for SerialPort {
    type State = SerialPortState;

    const NAME: &'static str = "serial port";

    fn save(&self) -> SerialPortState {
        let state = self.model().state();
        SerialPortState {
            version: STATE_VERSION,
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    fn restore(&self, state: SerialPortState) -> Result<(), RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version {
                what: Self::NAME,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let saved = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let (wire, line) = (Wire(self.irq.clone()), Line(self.output.clone()));
        let model =
            Serial::from_state(&saved, wire, self.drained.clone(), line).map_err(|error| {
                RestoreError::Mismatch {
                    what: Self::NAME,
                    why: format!("{error:?}"),
                }
            })?;
        *self.model() = model;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering;

    use ringfence_bus::Gsi;
    use ringfence_bus::InterruptController;
    use ringfence_bus::MsiMessage;

    use super::*;
    use crate::Timers;

    const DATA: u16 = 0;
    const INTERRUPT_ENABLE: u16 = 1;
    const INTERRUPT_ID: u16 = 2;
    const LINE_STATUS: u16 = 5;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl InterruptController for Edges {
        fn set_line(&self, _: Gsi, high: bool) {
            self.0.fetch_add(u32::from(high), Ordering::SeqCst);
        }
        fn send_msi(&self, _: MsiMessage) {}
    }

    fn port(output: Option<Arc<SerialOutput>>) -> (SerialPort, Arc<Edges>) {
        let edges = Arc::new(Edges::default());
        let irq = IrqLine::new(edges.clone(), Gsi(4));
        (SerialPort::new(irq, output), edges)
    }

    fn read(port: &SerialPort, offset: u16) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn what_the_guest_sends_reaches_the_output() {
        let (mut reader, writer) = io::pipe().expect("a pipe");
        let timers = Timers::new().expect("timers");
        let limits = OutputLimits {
            bytes_per_s: 100,
            burst_bytes: 100,
            total_bytes: 100,
        };
        let output = SerialOutput::new(writer.into(), limits, &timers).expect("a timer");
        let (port, _) = port(Some(output));
        for byte in b"ok\n" {
            port.write(DATA, &[*byte]);
        }
        let mut bytes = [0; 3];
        reader.read_exact(&mut bytes).expect("written");
        assert_eq!(&bytes, b"ok\n");
    }

    #[test]
    fn received_bytes_interrupt_and_are_read() {
        let (port, edges) = port(None);
        port.write(INTERRUPT_ENABLE, &[1]);
        let before = edges.0.load(Ordering::SeqCst);
        assert_eq!(port.receive(b"hi"), 2);
        assert!(edges.0.load(Ordering::SeqCst) > before);
        assert_eq!(read(&port, INTERRUPT_ID) & 0xf, 4);
        assert_eq!(read(&port, LINE_STATUS) & 1, 1);
        assert_eq!([read(&port, DATA), read(&port, DATA)], *b"hi");
        assert_eq!(read(&port, LINE_STATUS) & 1, 0);
    }

    #[test]
    fn a_guest_that_does_not_read_gets_a_bufferful() {
        let (port, _) = port(None);
        let taken = port.receive(&[0; 1000]) + port.receive(&[0; 1000]);
        assert_eq!(taken, 64);
        assert_eq!(port.receive_capacity(), 0);
    }

    #[test]
    fn whoever_feeds_the_port_hears_when_it_is_empty() {
        let (port, _) = port(None);
        let port = Arc::new(port);
        let fed = Arc::clone(&port);
        port.on_drained(Box::new(move || assert_eq!(fed.receive(b"z"), 1)));
        port.receive(b"xy");
        let bytes: Vec<u8> = (0..4).map(|_| read(&port, DATA)).collect();
        assert_eq!(bytes, b"xyzz");
    }

    #[test]
    fn a_restored_port_has_its_registers_and_its_input() {
        let (one, _) = port(None);
        one.write(7, &[0x5a]);
        one.receive(b"x");
        let (two, _) = port(None);
        two.restore(one.save()).expect("fits");
        assert_eq!((read(&two, 7), read(&two, DATA)), (0x5a, b'x'));
        let mut long = one.save();
        long.received = vec![0; 65];
        assert!(matches!(
            two.restore(long),
            Err(RestoreError::Mismatch { .. })
        ));
    }
}
