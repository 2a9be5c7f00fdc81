//! The process from its start to its end.

use std::io::Read;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ringfence_clock::TscCalibration;
use ringfence_device::tracing;
use ringfence_engine::ErrorKind;
use ringfence_machine::Machine;
use ringfence_machine::MachineEnd;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::ExitStatus;
use crate::VmError;
use crate::assemble;
use crate::assemble::Parts;
use crate::assemble::Timing;
use crate::config;
use crate::config::Config;
use crate::config::ConfigError;
use crate::config::Fd;
use crate::config::MAX_DOCUMENT_BYTES;
use crate::control;
use crate::control::Connection;
use crate::control::Mailbox;
use crate::control::Subject;
use crate::descriptors;
use crate::descriptors::Descriptors;
use crate::engines;
use crate::error::kind_name;
use crate::exit;
use crate::heap;
use crate::jail::Jail;
use crate::jail::Report;
use crate::log;

/// Runs the process: see the crate's page.
#[must_use]
pub fn main() -> ExitCode {
    heap::share();
    let calibration = TscCalibration::start();
    let mut timing = Timing::start();
    let (mut connection, result) = start(calibration, &mut timing);
    let status = match result {
        Ok(running) => running.serve(connection.as_mut()),
        Err(error) => fail(connection.as_mut(), &error),
    };
    ExitCode::from(status)
}

/// Tells whoever listens why there is no machine.
fn fail(connection: Option<&mut Connection>, error: &VmError) -> ExitStatus {
    let status = match error.kind() {
        ErrorKind::Config | ErrorKind::Format | ErrorKind::Unsupported => ExitStatus::BadConfig,
        _ => ExitStatus::NotStarted,
    };
    let message = error.full_message();
    log::write_line(&format!("ringfence-vm: {message}"));
    let path = match error {
        VmError::Config(error) => error.path(),
        _ => None,
    };
    if let Some(connection) = connection {
        connection.send(&json!({
            "event": "exit",
            "reason": status.reason(),
            "kind": kind_name(error.kind()),
            "message": message,
            "path": path,
        }));
    }
    status
}

/// A machine that runs.
struct Running {
    subject: Subject,
    mailbox: Arc<Mailbox>,
}

/// The number after `--config-fd`, the only thing to say on the command line.
fn config_fd() -> Result<Fd, VmError> {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(number), None) if flag == "--config-fd" => number
            .to_str()
            .and_then(|number| number.parse().ok())
            .filter(|&number| number > 2)
            .map(Fd)
            .ok_or(VmError::Usage),
        _ => Err(VmError::Usage),
    }
}

fn read_config() -> Result<Config, VmError> {
    let file = descriptors::take_config(config_fd()?)?;
    let mut text = Vec::new();
    file.take(MAX_DOCUMENT_BYTES as u64 + 1)
        .read_to_end(&mut text)
        .map_err(ConfigError::Read)?;
    Ok(config::parse(&text)?)
}

/// Starts the machine. The connection, as soon as there is one, comes back either way.
fn start(
    calibration: TscCalibration,
    timing: &mut Timing,
) -> (Option<Connection>, Result<Running, VmError>) {
    let mut connection = None;
    let result = try_start(calibration, timing, &mut connection);
    (connection, result)
}

fn try_start(
    calibration: TscCalibration,
    timing: &mut Timing,
    connection: &mut Option<Connection>,
) -> Result<Running, VmError> {
    let config = read_config()?;
    let mut descriptors = Descriptors::claim(&config)?;
    *connection = Some(Connection::new(descriptors.take(config.control_fd)?));
    install_log(&config);
    timing.phase("configured");

    let mut jail = Jail::begin(&config)?;
    engines::learn(&config.engine)?;
    let engine_device = assemble::engine_device(&config, &mut descriptors)?;
    let memory = jail.enter_namespaces()?;
    timing.phase("namespaces entered");

    let mailbox = Mailbox::new()?;
    let observer = Arc::clone(&mailbox);
    let assembled = assemble::assemble(
        &config,
        Parts {
            descriptors,
            engine_device,
            calibration,
            observer: Box::new(move |event| observer.put(event)),
            disk_thread: jail.disk_thread(),
        },
        timing,
    )?;
    let vhost = assembled.has_vhost();
    if vhost {
        jail.allow_vhost();
    }
    jail.close(&assembled.reach)?;
    drop(assembled.reach);
    timing.phase("jailed");

    let hook = Arc::new(jail.thread_filters());
    let machine = Machine::start(assembled.board, &assembled.first_state, hook)?;
    jail.filter_control()?;
    timing.phase("started");
    let subject = Subject {
        machine,
        name: config.name,
        engine: config.engine,
        vcpus: config.vcpus,
        devices: assembled.devices,
        handles: assembled.handles,
        doorbells: assembled.doorbells,
        vhost,
        started: Instant::now(),
        memory,
        jail: report(jail.report()),
        phases: phases(timing),
    };
    if let Some(connection) = connection {
        connection.send(&json!({
            "event": "ready",
            "jail": subject.jail,
            "cards": subject.cards(),
            "start_phases_us": subject.phases,
        }));
    }
    Ok(Running { subject, mailbox })
}

fn install_log(config: &Config) {
    let log = log::StderrLog::new(&config.name);
    // Nothing else in the process installs one.
    let _ = tracing::subscriber::set_global_default(log);
    std::panic::set_hook(Box::new(|panic| {
        log::write_line(&format!("ringfence-vm: internal error: {panic}"));
    }));
}

fn report(report: &Report) -> Value {
    report
        .iter()
        .map(|(name, layer)| (name.to_owned(), layer.to_string().into()))
        .collect::<Map<_, _>>()
        .into()
}

fn phases(timing: &Timing) -> Value {
    timing
        .phases()
        .iter()
        .map(|(name, took)| {
            let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            ((*name).to_owned(), us.into())
        })
        .collect::<Map<_, _>>()
        .into()
}

impl Running {
    /// Serves the machine until it has ended, and says how it did.
    fn serve(mut self, connection: Option<&mut Connection>) -> ExitStatus {
        let end = match connection {
            Some(connection) => {
                let end = control::serve(connection, &self.mailbox, &mut self.subject);
                self.finish(&end);
                connection.send(&exit::event(&end));
                end
            }
            None => self.subject.machine.wait(),
        };
        ExitStatus::from(&end)
    }

    /// Brings what the guest was told is safe to its place. A machine that is pulled out of the
    /// wall isn't waited for.
    fn finish(self, end: &MachineEnd) {
        if *end == MachineEnd::Stopped {
            std::mem::forget(self);
        } else {
            drop(self);
        }
    }
}
