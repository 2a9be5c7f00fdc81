//! What can be asked of a running machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use ringfence_engine::ErrorKind;
use ringfence_machine::Machine;
use ringfence_machine::MachineError;
use ringfence_machine::MachineState;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::Connection;
use crate::assemble::PlacedDevice;
use crate::devices::Handles;
use crate::error::kind_name;

/// What the methods are about.
pub(crate) struct Subject {
    pub(crate) machine: Machine,
    pub(crate) name: String,
    pub(crate) engine: String,
    pub(crate) vcpus: u32,
    pub(crate) devices: Vec<PlacedDevice>,
    pub(crate) handles: Handles,
    /// The engine's own doorbells are used.
    pub(crate) doorbells: bool,
    /// The threads' filters let them use vhost-net.
    pub(crate) vhost: bool,
    pub(crate) started: Instant,
    /// /proc/self/status, opened while there were paths.
    pub(crate) memory: Option<File>,
    /// The jail's report.
    pub(crate) jail: Value,
    /// How long the start's phases took.
    pub(crate) phases: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    id: i64,
    method: String,
    #[serde(default)]
    params: Map<String, Value>,
}

/// Why a request failed.
pub(super) struct Refusal {
    pub(super) kind: ErrorKind,
    pub(super) message: String,
}

impl From<MachineError> for Refusal {
    fn from(error: MachineError) -> Self {
        Self {
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}

impl Refusal {
    pub(super) fn config(message: String) -> Self {
        Self {
            kind: ErrorKind::Config,
            message,
        }
    }
}

pub(super) type Answer = Result<Value, Refusal>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonTarget {
    target_mib: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleSize {
    /// Which one, in the order of the document.
    #[serde(default)]
    console: usize,
    columns: u16,
    rows: u16,
}

/// The parameters of a method, by their names.
fn typed<T: DeserializeOwned>(params: Map<String, Value>) -> Result<T, Refusal> {
    serde_path_to_error::deserialize(Value::Object(params))
        .map_err(|error| Refusal::config(format!("params: {error}")))
}

/// The parameters of a method that has none.
fn none(params: Map<String, Value>) -> Result<(), Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    typed(params).map(|Nothing {}| ())
}

impl Subject {
    /// The answer to one line.
    pub(crate) fn answer(&mut self, line: &[u8], connection: &mut Connection) -> Value {
        let request: Request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("not a request: {error}");
                return json!({"id": null, "error": {"kind": "config", "message": message}});
            }
        };
        match self.call(&request.method, request.params, connection) {
            Ok(result) => json!({"id": request.id, "result": result}),
            Err(refusal) => json!({
                "id": request.id,
                "error": {"kind": kind_name(refusal.kind), "message": refusal.message},
            }),
        }
    }

    fn call(
        &mut self,
        method: &str,
        params: Map<String, Value>,
        connection: &mut Connection,
    ) -> Answer {
        match method {
            "pause" => none(params).and_then(|()| Ok(self.machine.pause()?))?,
            "resume" => none(params).and_then(|()| Ok(self.machine.resume()?))?,
            "power_button" => {
                none(params)?;
                self.machine.board().press_power_button();
            }
            "kill" => {
                none(params)?;
                self.machine.stop();
            }
            "add_card" => {
                let fds = connection.take_fds();
                return self.add_card(&typed(params)?, fds);
            }
            "remove_card" => self.remove_card(&typed(params)?)?,
            "balloon" => self.balloon(&typed(params)?)?,
            "console_size" => self.console_size(&typed(params)?)?,
            "stats" => return none(params).map(|()| self.stats()),
            "counters" => return none(params).map(|()| self.counters()),
            "inspect" => return none(params).and_then(|()| self.inspect()),
            #[cfg(feature = "testing")]
            "misbehave" => return Ok(crate::misbehave::run(&self.machine, &typed(params)?)),
            _ => return Err(Refusal::config(format!("there is no method {method:?}"))),
        }
        Ok(json!({}))
    }

    /// Asks the guest to give memory back until this much is missing from it.
    fn balloon(&self, target: &BalloonTarget) -> Result<(), Refusal> {
        let balloon = self.handles.balloons.first().ok_or_else(|| Refusal {
            kind: ErrorKind::Unsupported,
            message: "the machine has no balloon".to_owned(),
        })?;
        let total = self.machine.board().ram().size_bytes() >> 20;
        if target.target_mib > total {
            return Err(Refusal::config(format!(
                "target_mib: the guest has {total} MiB in all"
            )));
        }
        balloon.set_target_bytes(target.target_mib << 20);
        Ok(())
    }

    /// Tells the guest the size of a console's terminal.
    fn console_size(&self, size: &ConsoleSize) -> Result<(), Refusal> {
        let console = self.handles.consoles.get(size.console).ok_or_else(|| {
            let count = self.handles.consoles.len();
            Refusal::config(format!("console: the machine has {count} of them"))
        })?;
        console.resize(size.columns, size.rows);
        Ok(())
    }

    /// Figures that change all the time.
    fn stats(&self) -> Value {
        let board = self.machine.board();
        let (written, dropped) = board
            .serial_output()
            .map_or((0, 0), |output| output.counts());
        let devices: Map<String, Value> = self
            .devices
            .iter()
            .map(|device| {
                let counters = ringfence_device::Inspect::counters(&*device.pci);
                (device.name.clone(), pairs(counters))
            })
            .collect();
        json!({
            "state": self.machine.state().to_string(),
            "uptime_ms": u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "cpu_ms": cpu_ms(),
            "memory": {
                "guest_bytes": board.ram().size_bytes(),
                "process": self.memory.as_ref().map(process_memory),
            },
            "serial": {"written_bytes": written, "dropped_bytes": dropped},
            "devices": devices,
            "balloon": self.handles.balloons.first().map(|balloon| json!({
                "target_bytes": balloon.target_bytes(),
                "actual_bytes": balloon.actual_bytes(),
            })),
            "engine": self.counters(),
        })
    }

    fn counters(&self) -> Value {
        pairs(self.machine.board().vm().counters())
    }

    /// What the machine is, and where its processors are while it is paused.
    fn inspect(&self) -> Answer {
        let board = self.machine.board();
        let pci: Vec<Value> = board
            .pci()
            .list()
            .into_iter()
            .map(|(address, vendor, device)| {
                json!({
                    "address": address.to_string(),
                    "vendor": format!("{vendor:04x}"),
                    "device": format!("{device:04x}"),
                })
            })
            .collect();
        let vcpus = match self.machine.state() {
            MachineState::Paused => (0..self.vcpus)
                .map(|index| self.registers(index))
                .collect::<Result<Vec<_>, _>>()?,
            _ => Vec::new(),
        };
        Ok(json!({
            "name": self.name,
            "engine": self.engine,
            "state": self.machine.state().to_string(),
            "vcpus": self.vcpus,
            "memory_bytes": board.ram().size_bytes(),
            "devices": self.devices.iter().map(|device| &device.name).collect::<Vec<_>>(),
            "cards": self.cards(),
            "pci": pci,
            "jail": self.jail,
            "start_phases_us": self.phases,
            "registers": vcpus,
        }))
    }

    /// The network cards, and who moves their frames.
    pub(crate) fn cards(&self) -> Vec<Value> {
        self.devices
            .iter()
            .filter_map(|device| Some(device.card?.describe(&device.name)))
            .collect()
    }

    fn registers(&self, index: u32) -> Answer {
        let state = self
            .machine
            .with_vcpu(index, |vcpu| vcpu.state())?
            .map_err(MachineError::from)?;
        let hex = |value: u64| format!("{value:#x}");
        Ok(json!({
            "gpr": state.regs.gpr.map(hex),
            "rip": hex(state.regs.rip),
            "rflags": hex(state.regs.rflags),
            "cr0": hex(state.sregs.cr0),
            "cr2": hex(state.sregs.cr2),
            "cr3": hex(state.sregs.cr3),
            "cr4": hex(state.sregs.cr4),
            "efer": hex(state.sregs.efer),
        }))
    }
}

fn pairs(counters: Vec<(&'static str, u64)>) -> Value {
    counters
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect::<Map<_, _>>()
        .into()
}

/// Processor time of the whole process.
fn cpu_ms() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds * 1000 + nanoseconds / 1_000_000
}

/// Resident sizes in bytes, by what backs them (proc_pid_status(5)). Guest memory is shared memory,
/// so what the process needs for itself is the anonymous part.
fn process_memory(file: &File) -> Value {
    let mut text = vec![0; 4096];
    let len = file.read_at(&mut text, 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&text[..len]);
    let size = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = rest.split_whitespace().next()?.parse().ok()?;
        kib.checked_mul(1024)
    };
    json!({
        "resident_bytes": size("VmRSS:"),
        "anonymous_bytes": size("RssAnon:"),
        "file_bytes": size("RssFile:"),
        "shared_bytes": size("RssShmem:"),
    })
}
