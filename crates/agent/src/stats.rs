//! How the guest is doing, from /proc (proc(5)).

use crate::error::AgentError;
use crate::error::Tried;
use serde::Serialize;
use std::fs;

/// Ticks of /proc/stat a second, the same on every x86 kernel.
const TICKS: f64 = 100.0;

/// See docs/reference/agent-protocol.md.
#[derive(Debug, Serialize)]
pub(crate) struct Stats {
    uptime_s: f64,
    memory_total_bytes: u64,
    memory_available_bytes: u64,
    cpu_user_s: f64,
    cpu_system_s: f64,
    cpu_idle_s: f64,
    load_1: f64,
    processes: usize,
    cpus: usize,
}

/// Reads them.
///
/// # Errors
///
/// /proc isn't there.
pub(crate) fn read() -> Result<Stats, AgentError> {
    let text = |path: &str| fs::read_to_string(path).tried(|| format!("cannot read {path}"));
    let memory = text("/proc/meminfo")?;
    let cpu = text("/proc/stat")?;
    let load = text("/proc/loadavg")?;
    let uptime = text("/proc/uptime")?;
    let ticks: Vec<f64> = numbers(cpu.lines().next().unwrap_or_default());
    let seconds = |fields: &[usize]| {
        let sum: f64 = fields.iter().filter_map(|at| ticks.get(*at)).sum();
        sum / TICKS
    };
    let cpus = cpu.lines().filter(|line| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    });
    let processes = fs::read_dir("/proc").tried(|| "cannot list /proc".into())?;
    let processes = processes.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    Ok(Stats {
        uptime_s: numbers(&uptime).first().copied().unwrap_or(0.0),
        memory_total_bytes: memory_field(&memory, "MemTotal:"),
        memory_available_bytes: memory_field(&memory, "MemAvailable:"),
        // user, nice; system, interrupts, soft interrupts; idle, waiting for disks
        cpu_user_s: seconds(&[0, 1]),
        cpu_system_s: seconds(&[2, 5, 6]),
        cpu_idle_s: seconds(&[3, 4]),
        load_1: numbers(&load).first().copied().unwrap_or(0.0),
        processes: processes.count(),
        cpus: cpus.count(),
    })
}

fn numbers(line: &str) -> Vec<f64> {
    line.split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

fn memory_field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib: Option<u64> = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}
